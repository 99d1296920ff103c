"""The SentencePiece tokenizer of a GGUF against SentencePiece itself and transformers."""

from __future__ import annotations

import io
import json
import random
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgekit.converters.gguf_tokenizer import tokenizer_json
from edgekit.errors import SourceError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS: list[str] = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
VARIED_TEXT = st.text(max_size=60) | st.lists(st.sampled_from([*TEXTS, "'", " ", "7", "\n"]), max_size=4).map("".join)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def corpus() -> list[str]:
    picks = random.Random(7)
    words = re.findall(r"\s*\S+", " ".join(TEXTS))
    return [*TEXTS, *("".join(picks.choices(words, k=12)) for _ in range(300))]


def ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


def built(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(metadata))


# --- a real file ---------------------------------------------------------------------------------------------------


def tiny_sentencepiece(pieces: Sequence[str], **more: object) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *pieces],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *(-float(index) for index in range(len(pieces)))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * len(pieces)],
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


@cache
def sentencepiece_model(prefix: bool, byte_fallback: bool = True) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece is the reference of this test")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in corpus() for line in line.splitlines() if line.isascii()] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=500 if byte_fallback else 240,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\n\n", "\n\n\n", "<tool>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(processor: Any, **more: object) -> dict[str, Any]:
    indices = range(processor.vocab_size())
    tests = ((CONTROL, processor.IsControl), (UNKNOWN, processor.IsUnknown), (BYTE, processor.IsByte))
    kinds = [next((kind for kind, holds in tests if holds(index)), NORMAL) for index in indices]
    tokens = [processor.IdToPiece(index) for index in indices]
    for user_defined in ("\n", "\n\n", "\n\n\n", "<tool>"):
        kinds[tokens.index(user_defined)] = USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([processor.GetScore(index) for index in indices], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(processor.bos_id()),
        "tokenizer.ggml.eos_token_id": np.uint32(processor.eos_id()),
        "tokenizer.ggml.unknown_token_id": np.uint32(processor.unk_id()),
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


@cache
def sentencepiece_copy(prefix: bool, byte_fallback: bool = True) -> Tokenizer:
    return built(sentencepiece_metadata(sentencepiece_model(prefix, byte_fallback), add_space_prefix=prefix))


def comparable(text: str, prefix: bool) -> str:
    """SentencePiece finds user-defined tokens, and drops NUL, by rules of its own."""
    text = re.sub(r"<tool>|<s>|</s>|<unk>|\x00", "", text)
    return text.replace("\n", " ") if prefix else text


@QUICK
@given(text=VARIED_TEXT, prefix=st.booleans(), byte_fallback=st.booleans())
def test_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece(text: str, prefix: bool, byte_fallback: bool) -> None:
    text = comparable(text, prefix)
    ours = sentencepiece_copy(prefix, byte_fallback)
    expected = sentencepiece_model(prefix, byte_fallback).EncodeAsIds(text)
    assert ids(ours, text) == expected
    if byte_fallback:
        assert ours.decode(expected) == text.replace("\u2581", " ")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", [*corpus()[:60], "a\n\n\n\nb <tool>\n"])
def test_sentencepiece_tokenizer_agrees_on_the_fixed_texts(text: str, prefix: bool) -> None:
    text = comparable(text, prefix)
    assert ids(sentencepiece_copy(prefix), text) == sentencepiece_model(prefix).EncodeAsIds(text)


def as_gguf(path: Path, architecture: str, metadata: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the file of this test")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"].tolist())
    writer.add_token_types(metadata["tokenizer.ggml.token_type"].tolist())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_sentencepiece_tokenizer_gives_the_ids_of_transformers(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference of this test")
    metadata = sentencepiece_metadata(sentencepiece_model(prefix=architecture == "llama"))
    as_gguf(tmp_path / "tiny.gguf", architecture, metadata)
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    ours = built({**metadata, "general.architecture": architecture})
    texts = [*corpus(), "a\n\n\n\nb <tool>x"]
    if architecture == "llama":  # where transformers adds a space to the first word only, and only if it has none
        texts = [comparable(text.lstrip(), prefix=True).removeprefix("\u2581") for text in texts]
    for text in texts:
        assert ids(ours, text, special=True) == reference(text)["input_ids"], text


def test_runs_of_line_breaks_are_one_token_without_a_space_before_them() -> None:
    processor = sentencepiece_model(prefix=False)
    ours = built(sentencepiece_metadata(processor, add_space_prefix=False))
    assert ids(ours, "\n\n\n\n") == [processor.PieceToId("\n\n\n"), processor.PieceToId("\n")]


@pytest.mark.parametrize("spelling", ["  ", "\u2581\u2581"])
def test_user_defined_runs_of_spaces_match_spaces_however_they_are_spelled(spelling: str) -> None:
    metadata = tiny_sentencepiece(["a", "\u2581", spelling], add_space_prefix=False)
    metadata["tokenizer.ggml.token_type"][-1] = USER_DEFINED
    tokenizer = built(metadata)
    assert tokenizer.decode(ids(tokenizer, "a   a")) == "a   a"
    assert ids(tokenizer, "a   a") == [3, 5, 4, 3]


def test_gemma_merges_in_the_order_of_ids_and_adds_no_space() -> None:
    metadata = tiny_sentencepiece(["a", "b", "c", "bc", "ab"])
    metadata["tokenizer.ggml.scores"] = [0.0] * 7 + [5.0]
    assert ids(built({**metadata, "general.architecture": "gemma2"}), "abc") == [3, 6]
    assert ids(built({**metadata, "tokenizer.ggml.add_space_prefix": False}), "abc") == [7, 5]


def test_sentencepiece_adds_bos_unless_told_otherwise_and_fuses_unknown_characters() -> None:
    metadata = tiny_sentencepiece(["\u2581", "a"])
    assert ids(built(metadata), "a?!a", special=True) == [1, 3, 4, 0, 4]
    assert ids(built({**metadata, "tokenizer.ggml.add_bos_token": False}), "a", special=True) == [3, 4]


def test_phi3_control_tokens_swallow_the_white_space_after_them() -> None:
    metadata = tiny_sentencepiece(["\u2581", "a", "<|user|>"])
    metadata["tokenizer.ggml.token_type"][-1] = CONTROL
    assert ids(built({**metadata, "general.architecture": "phi3"}), "<|user|>\na") == [5, 3, 4]
    assert ids(built({**metadata, "general.architecture": "phi3"}), "<s> a") == [1, 3, 3, 4]


def test_merges_of_the_file_come_before_scores() -> None:
    metadata = tiny_sentencepiece(["a", "b", "c", "ab", "bc"], add_space_prefix=False, merges=["b c", "a b"])
    assert ids(built(metadata), "abc") == [3, 7]
    assert ids(built({**metadata, "tokenizer.ggml.model": "gemma4"}), "abc") == [3, 7]


def test_merges_of_a_large_vocabulary_are_derived_in_seconds() -> None:
    picks = random.Random(3)
    words = {"".join(picks.choices("abcdefghij", k=picks.randint(1, 12))) for _ in range(60_000)}
    started = time.perf_counter()
    tokenizer_json(tiny_sentencepiece(sorted(words)))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "change",
    [{"precompiled_charsmap": np.zeros(4, np.uint8)}, {"remove_extra_whitespaces": True}],
)
def test_sentencepiece_normalizers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="rewrites text"):
        tokenizer_json(tiny_sentencepiece(["a"], **change))


@pytest.mark.parametrize("scores", [None, [0.0], [0.0, 0.0, 0.0, float("nan")], ["a"] * 4])
def test_broken_scores_are_a_source_error(scores: object) -> None:
    metadata = {**tiny_sentencepiece(["a"]), "tokenizer.ggml.scores": scores}
    with pytest.raises(SourceError, match="scores"):
        tokenizer_json(metadata)
