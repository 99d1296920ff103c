from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgekit.runtimes.text import TextStream

MAX_WINDOW = 40
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", *"abcdehlor", "▁a", "▁he", "ll", "好"]
SAMPLES = ["hello 你好你好 😀😀 the cat 👩‍👩‍👧 na\u0308ive ", "aaab aab ab", "\u0915\u094d\u0937 Straße"] * 4

texts = st.text(
    st.one_of(st.sampled_from("ab helo 你好😀\u0301\u200d👩👧\n\ufffd"), st.characters(exclude_categories=["Cs"])),
    max_size=30,
)


def make_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def make_sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    vocab = {piece: place for place, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
    merges = [("▁", "a"), ("l", "l")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return tokenizer


def byte_of(symbol: str) -> int:
    """The byte that a symbol of GPT-2's alphabet stands for: itself, or the next of those that do not print."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return ord(symbol) if ord(symbol) < 256 else others[ord(symbol) - 256]


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    token = tokenizer.token_to_id(piece)
    assert token is not None
    return token


BYTE_LEVEL = make_byte_level()
BYTE_LEVEL_BYTES = {byte_of(symbol): id_of(BYTE_LEVEL, symbol) for symbol in pre_tokenizers.ByteLevel.alphabet()}
LLAMA = make_sentencepiece(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
METASPACE = make_sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
TOKENIZERS = {"byte_level": BYTE_LEVEL, "llama": LLAMA, "metaspace": METASPACE}
SENTENCEPIECE = {"llama": LLAMA, "metaspace": METASPACE}

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
every_sentencepiece = pytest.mark.parametrize("tokenizer", SENTENCEPIECE.values(), ids=SENTENCEPIECE)


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def bytes_of(text: str) -> list[int]:
    """The tokens of a text in which each byte is a token of its own."""
    return [id_of(LLAMA, BYTES[byte]) for byte in text.encode()]


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, found one character at a time."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text).ids
    assert "".join(pieces(TextStream(tokenizer), tokens)) == decode(tokenizer, tokens)


@settings(max_examples=500, deadline=None)
@given(tokens=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=60))
def test_any_byte_level_tokens_join_to_the_decoded_text(tokens: list[int]) -> None:
    assert "".join(pieces(TextStream(BYTE_LEVEL), tokens)) == decode(BYTE_LEVEL, tokens)


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.sampled_from([0x80, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0xFF, 0x41]), max_size=120))
def test_long_runs_of_broken_bytes_join_to_the_decoded_text(data: list[int]) -> None:
    tokens = [BYTE_LEVEL_BYTES[byte] for byte in data]
    assert "".join(pieces(TextStream(BYTE_LEVEL), tokens)) == decode(BYTE_LEVEL, tokens)


@every_sentencepiece
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_pieces_and_whole_characters_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    plain = st.sampled_from([0, 1, 2, *range(259, 259 + len(PIECES)), 9999]).map(lambda token: [token])
    character = st.sampled_from("a é你😀").map(bytes_of)
    tokens = list(itertools.chain(*data.draw(st.lists(plain | character, max_size=30))))
    assert "".join(pieces(TextStream(tokenizer), tokens)) == decode(tokenizer, tokens)


@every_sentencepiece
def test_long_runs_of_stray_fallback_bytes_join_to_the_decoded_text(tokenizer: Tokenizer) -> None:
    tokens = [id_of(LLAMA, "<0x80>")] * 100 + tokenizer.encode("a").ids
    assert "".join(pieces(TextStream(tokenizer), tokens)) == decode(tokenizer, tokens)


def test_a_stray_fallback_byte_keeps_the_characters_already_shown() -> None:
    tokens = [*bytes_of("你"), id_of(LLAMA, "<0xFF>"), id_of(LLAMA, "a")]
    assert pieces(TextStream(LLAMA), tokens) == ["", "", "你", "", "\ufffda", ""]


@every_tokenizer
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "\ufffd" not in "".join(shown)
    assert stream.finish() == ""


def test_a_character_is_shown_with_its_last_byte() -> None:
    stream = TextStream(LLAMA)
    assert [stream.push(token) for token in bytes_of("😀é")] == ["", "", "", "😀", "", "é"]


def test_finish_shows_an_incomplete_character_once() -> None:
    stream = TextStream(LLAMA)
    assert [stream.push(token) for token in bytes_of("😀")[:2]] == ["", ""]
    assert stream.finish() == decode(LLAMA, bytes_of("😀")[:2]) == "\ufffd\ufffd"
    assert stream.finish() == ""


@every_tokenizer
@settings(max_examples=200, deadline=None)
@given(prompt=texts, reply=texts)
def test_continuation_of_a_prompt_keeps_its_spaces(tokenizer: Tokenizer, prompt: str, reply: str) -> None:
    before, tokens = tokenizer.encode(prompt).ids, tokenizer.encode(reply).ids
    stream = TextStream(tokenizer, prompt_tail=before)
    expected = decode(tokenizer, before + tokens)[len(decode(tokenizer, before)) :]
    assert "".join(pieces(stream, tokens)) == expected


def test_leading_space_depends_on_the_prompt() -> None:
    token = id_of(LLAMA, "▁he")
    assert TextStream(LLAMA).push(token) == "he"
    assert TextStream(LLAMA, prompt_tail=[id_of(LLAMA, "a"), id_of(LLAMA, "</s>")]).push(token) == " he"


@every_tokenizer
def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    special = next(token for token, info in tokenizer.get_added_tokens_decoder().items() if info.special)
    tokens = [token for word in tokenizer.encode("a hello 你").ids for token in (special, word, special)]
    assert "".join(pieces(TextStream(tokenizer), [special] * 50 + tokens)) == "a hello 你"


def test_cost_of_a_token_is_bounded() -> None:
    class Counting:
        longest = 0

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            self.longest = max(self.longest, len(tokens))
            text: str = BYTE_LEVEL.decode(tokens, skip_special_tokens=skip_special_tokens)
            return text

    token_lists = (BYTE_LEVEL.encode("hello 你好 😀" * 100).ids, [0] * 500, [id_of(BYTE_LEVEL, "Ģ")] * 500)
    for tokens in token_lists:
        tokenizer: Any = Counting()
        pieces(TextStream(tokenizer, stop=["zzz"]), tokens)
        assert tokenizer.longest <= MAX_WINDOW


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("aaab tail", ["aab"], "a"),
        ("hello hello", ["hello"], ""),
        ("aaaa", ["aaab"], "aaaa"),
        ("abcd", ["abcd", "bc"], "a"),
        ("abcd", ["cd", "bcd"], "a"),
        ("he 你好 lo", ["你好"], "he "),
        ("he 你好 lo", ["好"], "he 你"),
        ("a😀b", ["😀"], "a"),
        ("one\n\ntwo", ["\n\n", "two"], "one"),
        ("hello", [], "hello"),
        ("hello", ["lo!", "o w"], "hello"),
    ],
)
@every_tokenizer
def test_stop_strings_end_the_text(tokenizer: Tokenizer, text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(tokenizer, stop=stops)
    assert "".join(pieces(stream, tokenizer.encode(text).ids)) == expected
    assert stream.stopped == (expected != text)


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(text=st.text("ab好", max_size=30), stops=st.lists(st.text("ab好", min_size=1, max_size=4), max_size=3))
def test_the_stop_string_that_is_complete_first_wins(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    stream = TextStream(tokenizer, stop=stops)
    assert "".join(pieces(stream, tokenizer.encode(text).ids)) == cut_at_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(LLAMA, stop=("aab",))
    assert [stream.push(id_of(LLAMA, letter)) for letter in "aaac"] == ["", "", "a", "aac"]


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = TextStream(LLAMA, stop=("b",))
    assert pieces(stream, [id_of(LLAMA, letter) for letter in "abcd"]) == ["a", "", "", "", ""]
    assert stream.stopped


def test_finish_can_complete_a_stop_string() -> None:
    stream = TextStream(LLAMA, stop=("\ufffd",))
    assert stream.push(id_of(LLAMA, "a")) == "a"
    assert stream.push(bytes_of("😀")[0]) == ""
    assert not stream.stopped
    assert stream.finish() == ""
    assert stream.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(LLAMA, stop=("a", ""))
