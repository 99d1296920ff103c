"""Tokenizers of several kinds, and a model of random logits that a constraint holds to its structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgekit.runtimes.constraint import Constraint, TokenizerInfo
from edgekit.runtimes.output import OutputParser, Piece
from edgekit.runtimes.text import TextStream

PADDING = 13  # rows of logits are longer than the vocabulary, as in many real models
ENDS = ("<|end|>", "<|eot|>")
MARKS = (
    "<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]",
    "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>",
)  # fmt: skip
SAMPLES = ['{"name": "Ada", "age": 36, "tags": ["a", "b"]} 你好 😀 the cat née Straße', "true false null -1.5e3"] * 4


class Written(NamedTuple):
    """A reply of the random model."""

    text: str
    tokens: list[int]
    complete: bool


class Taken(NamedTuple):
    """A reply taken apart."""

    piece: Piece
    complete: bool


Write = Callable[..., Written]
WriteParsed = Callable[..., Taken]


def _byte_level(marks: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return _with_marks(tokenizer, marks)


def _sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    pieces = ["▁", *'abcdehlor"{}[]:,0123456789', "▁a", "▁he", "ll", '":', "好"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("l", "l"), ('"', ":")]
    vocabulary = {piece: place for place, piece in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return _with_marks(tokenizer, "special")


def _with_marks(tokenizer: Tokenizer, marks: str) -> Tokenizer:
    if marks == "special":
        tokenizer.add_special_tokens(list(MARKS))
    elif marks == "plain":
        tokenizer.add_tokens(list(MARKS))
    tokenizer.add_special_tokens(list(ENDS))
    return tokenizer


_LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
_METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
TOKENIZERS: dict[str, Tokenizer] = {
    "byte-level": _byte_level("special"),
    "byte-level, marks not special": _byte_level("plain"),
    "byte-level, marks as text": _byte_level("none"),
    "sentencepiece": _sentencepiece(_LLAMA),
    "metaspace": _sentencepiece(_METASPACE),
}


def make_info(tokenizer: Any) -> TokenizerInfo:
    ends = [tokenizer.token_to_id(end) for end in ENDS]
    return TokenizerInfo(tokenizer, tokenizer.get_vocab_size() + PADDING, ends)


INFOS = {name: make_info(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.fixture(params=INFOS)
def info(request: pytest.FixtureRequest) -> TokenizerInfo:
    return INFOS[request.param]


@pytest.fixture
def byte_level() -> TokenizerInfo:
    return INFOS["byte-level"]


@pytest.fixture
def write() -> Write:
    """`write(constraint, info, seed, start="")`: what a model of random logits writes under a constraint.

    The tokens of `start` are wished for first: each comes if the constraint admits it.
    """

    def run(constraint: Constraint, info: TokenizerInfo, seed: int, *, start: str = "", most: int = 2000) -> Written:
        tokens = list(_random_tokens(constraint, info, seed, info.tokenizer.encode(start).ids if start else (), most))
        stream = TextStream(info.tokenizer, prompt_tail=info.visible_tail)
        text = "".join(map(stream.push, tokens)) + stream.finish()
        return Written(text, tokens, constraint.may_end)

    return run


@pytest.fixture
def write_parsed() -> WriteParsed:
    """Like `write`, through a parser."""

    def run(
        constraint: Constraint, parser: OutputParser, info: TokenizerInfo, seed: int, start: str = "", most: int = 2000
    ) -> Taken:
        tokens = _random_tokens(constraint, info, seed, info.tokenizer.encode(start).ids if start else (), most)
        stream, pieces = TextStream(info.tokenizer, prompt_tail=info.visible_tail), list[Piece]()
        for token in tokens:
            mark = parser.marks.get(token)
            pieces.append(parser.push(stream.push(token) if mark is None else stream.finish() + mark))
        pieces += [parser.push(stream.finish()), parser.finish()]
        return Taken(join(pieces), constraint.may_end)

    return run


def join(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
    )


def _random_tokens(
    constraint: Constraint, info: TokenizerInfo, seed: int, start: Sequence[int], most: int
) -> list[int]:
    random, tokens, wished = np.random.default_rng(seed), list[int](), list(start)
    while not constraint.is_complete and len(tokens) < most:
        logits = random.normal(size=info.vocab_size).astype(np.float32)
        if wished:
            logits[wished.pop(0)] += 1000
        masked = constraint.mask(logits)
        token = int(masked.argmax())
        assert masked[token] == logits[token]
        constraint.accept(token)
        if token not in info.end_tokens:
            tokens.append(token)
    return tokens
