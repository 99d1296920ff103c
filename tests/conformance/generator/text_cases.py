"""text.json: tokens to the text that is shown, piece by piece; and the two tokenizers it needs.

Reference: all bytes so far through Python's UTF-8 decoder, and the rule of the stop strings applied to the whole text so
far, from the beginning, for every token. Nothing is carried from one token to the next, so no state can go wrong.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

SPECIAL = ("<|begin|>", "<|end|>")
PLAIN_ADDED = "<think>"
LONGER_PIECES = (
    b" the", b"hello", b" world", b"lo", b"lo wor", b"ST", b"OP", b"TOP", b"\n\n", b"User", b"aab", b"ab", b"aa",
    "你".encode(), "你好".encode()[:4], "你好".encode()[4:], "😀".encode()[:2], "😀".encode()[2:], " é".encode(), b"\xcc\x81",
)  # fmt: skip
SENTENCEPIECE_PIECES = ("▁", "▁hello", "▁world", "h", "e", "l", "o", "▁a", "好", "▁STOP")


def byte_symbols() -> list[str]:
    """GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


SYMBOLS = byte_symbols()
BYTES_OF_TOKEN = [*(bytes([byte]) for byte in range(256)), *LONGER_PIECES]
TOKEN_OF_BYTES = {piece: token for token, piece in enumerate(BYTES_OF_TOKEN)}
FIRST_ADDED = len(BYTES_OF_TOKEN)
ADDED = {content: FIRST_ADDED + place for place, content in enumerate((*SPECIAL, PLAIN_ADDED))}


def byte_level_tokenizer() -> dict[str, Any]:
    """tokenizers/byte-level.json: every byte, some longer pieces, two special tokens and one that is shown."""
    vocabulary = {"".join(SYMBOLS[byte] for byte in piece): token for token, piece in enumerate(BYTES_OF_TOKEN)}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [_added(token, content, content in SPECIAL) for content, token in ADDED.items()]
    return _tokenizer(added, step, step, {"type": "BPE", "vocab": vocabulary, "merges": []})


def sentencepiece_tokenizer() -> dict[str, Any]:
    """tokenizers/sentencepiece.json: pieces with ▁ for a space, every byte as a fallback, the first space left out."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SENTENCEPIECE_PIECES]
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    return _tokenizer([_added(token, pieces[token], True) for token in range(3)], None, decoder, model)


def _added(token: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}


def _tokenizer(added: list[Any], pre_tokenizer: Any, decoder: Any, model: dict[str, Any]) -> dict[str, Any]:
    rest = {"normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **rest, "model": model}


def suite() -> dict[str, Any]:
    """The file."""
    return {
        "suite": "text",
        "version": 1,
        "cases": [*_stop_cases(), *_utf8_cases(), *_broken_cases(), *_sentencepiece_cases()],
    }


def _stop_cases() -> list[dict[str, Any]]:
    rows: tuple[tuple[str, list[bytes | str], list[str]], ...] = (
        ("no stop string", [b"hello", b" world"], []),
        ("in one token", [b"hello", b"STOP"[:2], b"OP", b" world"], ["OP"]),
        ("over two tokens", [b"hello", b"ST", b"OP", b" world"], ["STOP"]),
        ("over many tokens", [b"hello", *_each("\n\nUser:"), b"x"], ["\n\nUser:"]),
        ("begins inside a token", [b"hello", b" world"], ["lo w"]),
        ("ends inside a token", [b"h", b"e", b"l", b"lo wor", b"l"], ["elo "]),
        ("whole inside a token", [b"lo wor", b"l", b"d"], [" w"]),
        ("at the very beginning", [b"hello", b" world"], ["hello"]),
        ("at the very end", [b"hello", b" world"], ["ld"]),
        ("nearly, then not", [b"ST", b"OP"[:1], b" world"], ["STOP"]),
        ("nearly, at the end", [b"hello", b"ST"], ["STOP"]),
        ("begins again within itself", [b"aa", b"aab", b" the"], ["aab"]),
        ("begins again over tokens", [b"a", b"aa", b"a", b"b", b"x"], ["aab"]),
        ("almost, again and again", [b"aa", b"aa", b"aa", b"x"], ["aab"]),
        ("of two, the first to be complete", [*_each("one two three")], ["three", "two"]),
        ("of two that end together, the longest", [*_each("abcd")], ["cd", "bcd"]),
        ("one inside the other", [*_each("abcd")], ["abcd", "bc"]),
        ("one begins the other", [*_each("a STOP b")], ["STOP", "STOPPED"]),
        ("two in one token", [b"lo wor"], ["wor", "o"]),
        ("longer than the text", [b"h"], ["hello world"]),
        ("the same twice", [b"hello"], ["l", "l"]),
        ("a new line", [b"hello", b"\n\n", b"User"], ["\n"]),
        ("after a new line that is held", [b"hello", b"\n", b"x"], ["\n\n"]),
        ("with characters of several bytes", [b"hello", "你".encode(), *_bytes("好"), b"x"], ["你好"]),
        ("that ends in a character of several tokens", [b"a", b"b", *_bytes("😀"), b"x"], ["b😀"]),
        ("the second of two characters", ["你".encode(), *_bytes("好"), b"x"], ["好"]),
        ("a shared first byte is no beginning", [*_bytes("你"), *_bytes("佡")], ["佢"]),
        ("with a combining accent", [b"e", b"\xcc\x81", b"x"], ["e\u0301"]),
        ("the accent does not matter to a stop string", [b"a", b"e", b"\xcc\x81", b"x"], ["e"]),
        ("upper case is not lower case", [*_each("stop STOP")], ["STOP"]),
        ("special tokens between", [b"ST", "<|end|>", b"OP", b"x"], ["STOP"]),
        ("special tokens are no text", [b"hello", "<|end|>", b" world"], ["<|end|>"]),
        ("an added token is text", [b"hello", "<think>", b"x"], ["<think>"]),
        ("an added token in part", [b"hello", "<think>", b"x"], ["ink"]),
        ("white space", [*_each("a  b   c")], ["   "]),
    )
    return [_byte_level(f"stop string: {name}", tokens, stops) for name, tokens, stops in rows]


def _utf8_cases() -> list[dict[str, Any]]:
    family = "👩‍👩‍👧"
    rows: tuple[tuple[str, list[bytes | str]], ...] = (
        ("one byte a character", [*_each("hello")]),
        ("two bytes", [*_bytes("é")]),
        ("three bytes", [*_bytes("你好")]),
        ("four bytes", [*_bytes("😀😀")]),
        ("the last and the first of four, and of one", [*_bytes("\U0010ffff\U00010000\x00\x7f")]),
        ("the ends of two and three bytes", [*_bytes("\x80\u07ff\u0800\uffff\ud7ff\ue000")]),
        ("two halves", ["😀".encode()[:2], "😀".encode()[2:]]),
        ("text before and after", [b"a", *_bytes("é"), b"b", *_bytes("你"), b"c"]),
        ("joined emoji are several characters", [*_bytes(family)]),
        ("an accent of its own", [b"e", b"\xcc\x81"]),
        ("a special token inside a character", ["😀".encode()[:2], "<|end|>", "😀".encode()[2:]]),
        ("special tokens only", ["<|begin|>", "<|end|>"]),
        ("nothing", []),
        ("a byte order mark is a character", [*_bytes("\ufeffa")]),
    )
    # the whole one may be shown at once or with the next token: both are in order
    half = _byte_level(
        "UTF-8: a character and a half", ["你好".encode()[:4], "你好".encode()[4:], b"x"], [], whole_only=True
    )
    return [*(_byte_level(f"UTF-8: {name}", tokens, []) for name, tokens in rows), half]


def _broken_cases() -> list[dict[str, Any]]:
    rows: tuple[tuple[str, list[bytes | str], list[str]], ...] = (
        ("a stray byte", [b"a", b"\xff", b"b"], []),
        ("a continuation byte", [b"a", b"\x80", b"b"], []),
        ("a character cut short", [b"a", b"\xf0", b"\x9f", b"b"], []),
        ("a character cut short at the end", [b"a", b"\xf0", b"\x9f"], []),
        ("cut short by another", [b"\xe4", b"\xbd", *_bytes("é")], []),
        ("overlong", [b"\xc0", b"\xaf", b"x"], []),
        ("half a surrogate pair", [b"\xed", b"\xa0", b"\x80", b"x"], []),
        ("beyond Unicode", [b"\xf4", b"\x90", b"\x80", b"\x80", b"x"], []),
        ("forty stray bytes", [b"\xff"] * 40, []),
        ("the replacement character itself", [*_bytes("a\ufffdb")], []),
        ("then a stop string", [b"\xff", b"ST", b"OP", b"x"], ["STOP"]),
        ("that is a stop string", [b"a", b"\xf0", b"\x9f"], ["\ufffd"]),
    )
    return [_byte_level(f"not UTF-8: {name}", tokens, stops, whole_only=True) for name, tokens, stops in rows]


def _sentencepiece_cases() -> list[dict[str, Any]]:
    base = {piece: 259 + place for place, piece in enumerate(SENTENCEPIECE_PIECES)}

    def fallback(text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    rows: tuple[tuple[str, list[int], list[int], list[str], list[str], bool], ...] = (
        ("the first space is left out", [], [base["▁hello"], base["▁world"]], [], ["hello", " world"], False),
        (
            "after a prompt the first space stays",
            [base["▁a"]],
            [base["▁hello"], base["▁world"]],
            [],
            [" hello", " world"],
            False,
        ),
        ("after a special token the first space stays", [base["o"], 1], [base["▁hello"]], [], [" hello"], False),
        ("bytes make a character", [], [base["h"], *fallback("😀é")], [], ["h", "", "", "", "😀", "", "é"], False),
        (
            "a stop string over pieces",
            [base["o"]],
            [base["▁hello"], base["▁STOP"], base["o"]],
            ["o ST"],
            [" hell", "", ""],
            True,
        ),
        (
            "a stop string of bytes",
            [base["o"]],
            [base["h"], *fallback("你"), base["e"]],
            ["你"],
            ["h", "", "", "", ""],
            True,
        ),
        ("special tokens are not shown", [base["o"]], [base["h"], 2, base["e"]], [], ["h", "", "e"], False),
        ("a space alone", [base["o"]], [base["h"], base["▁"], base["e"]], [], ["h", " ", "e"], False),
    )
    return [
        {
            "name": f"SentencePiece: {name}",
            "tokenizer": "sentencepiece",
            **({"prompt": prompt} if prompt else {}),
            "tokens": tokens,
            "stop": stops,
            "expect": {"text": "".join(pieces), "pieces": pieces, "rest": "", "stopped": stopped},
        }
        for name, prompt, tokens, stops, pieces, stopped in rows
    ]


def _each(text: str) -> list[bytes | str]:
    return [character.encode() for character in text]


def _bytes(text: str) -> list[bytes | str]:
    return [bytes([byte]) for byte in text.encode()]


def _byte_level(
    name: str, pieces: Sequence[bytes | str], stops: list[str], *, whole_only: bool = False
) -> dict[str, Any]:
    tokens = [ADDED[piece] if isinstance(piece, str) else TOKEN_OF_BYTES[piece] for piece in pieces]
    raw = [b"" if piece in SPECIAL else piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    shown = [_shown(b"".join(raw[: count + 1]), stops, final=False) for count in range(len(raw))]
    text, stopped = _shown(b"".join(raw), stops, final=True)
    lengths = [0, *(len(part) for part, _ in shown)]
    new = [part[start:] for start, (part, _) in zip(lengths, shown, strict=False)]
    timed = {} if whole_only else {"pieces": new, "rest": text[lengths[-1] :]}
    given = {"name": name, "tokenizer": "byte-level", "tokens": tokens, "bytes": [piece.hex() for piece in raw]}
    return {**given, "stop": stops, "expect": {"text": text, **timed, "stopped": stopped}}


def _shown(data: bytes, stops: list[str], *, final: bool) -> tuple[str, bool]:
    """All text shown once these bytes have come, and whether it ended at a stop string."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    held = [length for length in range(1, len(text) + 1) for stop in stops if stop.startswith(text[-length:])]
    return text[: len(text) - (0 if final else max(held, default=0))], False
