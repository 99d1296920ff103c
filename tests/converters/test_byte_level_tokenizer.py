"""vocab.json and merges.txt without a tokenizer.json: ids against transformers' own tokenizer of the same directory."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import edgekit
from edgekit.converters.hf_tokenizer import tokenizer_from_directory
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError
from edgekit.source import TokenizerFiles

TEXTS: list[str] = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
TEXTS += [
    "DON'T HE'S it’s A\u030a \u1100\u1161 \u2028f\x85g\r\n\r\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "x<|endoftext|> y  <think> deep </think>\n<|pad|><|extra|> <|named|>",
    "<|not_a_token|>",
]
PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
SPECIAL = PLAIN | {"special": True}
CLASSES = ("CodeGenTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer")
# Beside the two files: tokenizer_config.json, special_tokens_map.json, added_tokens.json; ids count from the vocabulary's end.
ADDITIONS: dict[str, Any] = {
    "nothing": ({}, None, None),
    "listed": (
        {
            "added_tokens_decoder": {
                "0": {"content": "<|endoftext|>", **SPECIAL},
                "1": {"content": "<|im_start|>", **SPECIAL},
                "2": {"content": "<|im_end|>", **SPECIAL, "rstrip": True},
                "3": {"content": "<think>", **PLAIN, "normalized": True},
                "4": {"content": "</think>", **PLAIN, "lstrip": True, "rstrip": True},
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        {"eos_token": "<|never|>"},  # does not count where tokens are listed
        {"<|never|>": 9},
    ),
    "old files": (
        {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|extra|>"]},
        {
            "eos_token": {"content": "<|im_end|>", **PLAIN, "rstrip": True},
            "pad_token": "<|pad|>",
            "additional_special_tokens": ["<|im_start|>", "<|extra|>"],
        },
        {"<|endoftext|>": 0, "<|im_end|>": 1, "<|im_start|>": 2, "<think>": 3},
    ),
    "named only": ({"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "tool_token": "<|named|>"}, None, None),
    "begin and end": ({"bos_token": "<|endoftext|>", "add_bos_token": True, "add_eos_token": True}, None, None),
    "a token of the vocabulary": ({"eos_token": "he"}, None, None),
    "a space first": ({"add_prefix_space": True}, None, None),
}
VARIED = st.text(max_size=60) | st.lists(st.sampled_from([*TEXTS, "'", " ", "7", "\n"]), max_size=4).map("".join)


@cache
def trained() -> Any:
    """A byte-level vocabulary with its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "the other hero heard that he was there 12 123 1234"] * 4, trainer)
    return json.loads(tokenizer.to_str())["model"]


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def write_tokenizer(directory: Path, name: str, additions: str, **config: Any) -> Path:
    model = trained()
    base = len(model["vocab"])
    settings, names, added = ADDITIONS[additions]
    settings = {"tokenizer_class": name} | settings
    if "added_tokens_decoder" in settings:
        decoder = {str(base + int(key)): token for key, token in settings["added_tokens_decoder"].items()}
        settings = settings | {"added_tokens_decoder": decoder}
    write_json(directory / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "config.json", {"model_type": "llama"} | config)
    if names is not None:
        write_json(directory / "special_tokens_map.json", names)
        write_json(directory / "added_tokens.json", {text: base + number for text, number in added.items()})
    return directory


def opened(directory: Path) -> TokenizerFiles:
    return tokenizer_from_directory(directory, json.loads((directory / "config.json").read_text(encoding="utf-8")))


def check_ids(directory: Path, texts: list[str] = TEXTS) -> None:
    from transformers import AutoTokenizer

    expected, files = AutoTokenizer.from_pretrained(directory), opened(directory)
    found = Tokenizer.from_str(files.tokenizer_json)
    for text in texts:
        ids = expected(text)["input_ids"]
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True), text
    assert {number: token.content for number, token in found.get_added_tokens_decoder().items()} == {
        number: token.content for number, token in expected.added_tokens_decoder.items()
    }
    assert found.token_to_id(expected.eos_token) == expected.eos_token_id
    assert expected.eos_token_id in (*files.eos_token_ids, None)


@pytest.mark.parametrize("additions", ADDITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_ids_equal_those_of_auto_tokenizer(name: str, additions: str, tmp_path: Path) -> None:
    check_ids(write_tokenizer(tmp_path, name, additions))


@pytest.mark.parametrize(
    ("model_type", "name", "of"),
    [
        ("qwen2", None, "settings"),
        ("qwen2", "Qwen2TokenizerFast", "settings"),
        ("qwen2", "GPT2Tokenizer", "settings"),  # as transformers, which knows many Qwen2 models to name a wrong one
        ("qwen3", None, "settings"),
        ("qwen3", "GPT2TokenizerFast", "settings"),
        ("llama", "Qwen2Tokenizer", "config"),
        ("smollm3", "GPT2Tokenizer", "settings"),
    ],
)
def test_class_follows_settings_config_and_model(model_type: str, name: str | None, of: str, tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "", "listed", model_type=model_type)
    path = directory / ("tokenizer_config.json" if of == "settings" else "config.json")
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(directory / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "tokenizer_class"})
    values = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, values | ({"tokenizer_class": name} if name else {}))
    check_ids(directory)


@cache
def both(directory: Path) -> tuple[Any, Tokenizer]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory), Tokenizer.from_str(opened(directory).tokenizer_json)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=VARIED)
def test_any_text_has_the_ids_of_transformers(name: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / f"varied-{name}"
    if not directory.is_dir():
        directory.mkdir()
        write_tokenizer(directory, name, "listed")
    expected, found = both(directory)
    assert found.encode(text).ids == expected(text)["input_ids"]


def test_windows_line_ends_in_merges_are_read(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "GPT2Tokenizer", "nothing")
    before = opened(directory).tokenizer_json
    path = directory / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert opened(directory).tokenizer_json == before


def test_named_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    base = len(trained()["vocab"]) + 1  # <|endoftext|>, which the class names, comes first
    for rows, known in ((base, []), (base + 1, ["<|im_end|>"]), (base + 9, ["<|im_end|>", "<|pad|>"])):
        directory = write_tokenizer(tmp_path, "GPT2Tokenizer", "named only", vocab_size=rows)
        found = Tokenizer.from_str(opened(directory).tokenizer_json)
        contents = [token.content for token in found.get_added_tokens_decoder().values()]
        assert [text for text in contents if text in {"<|im_end|>", "<|pad|>"}] == known


def test_model_with_the_two_files_converts_and_answers_as_with_tokenizer_json(tiny_model: Any, tmp_path: Path) -> None:
    whole = tiny_model("llama")
    older = Path(shutil.copytree(whole, tmp_path / "older"))
    tokenizer = json.loads((older / "tokenizer.json").read_text(encoding="utf-8"))
    (older / "tokenizer.json").unlink()
    write_json(older / "vocab.json", tokenizer["model"]["vocab"])
    (older / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8", newline="\n")
    write_json(older / "added_tokens.json", {token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    values = json.loads((older / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(older / "tokenizer_config.json", values | {"tokenizer_class": "GPT2Tokenizer"})
    answers = []
    for name, source in (("whole", whole), ("older", older)):
        out = tmp_path / f"{name}.edgekit"
        edgekit.convert(source, target="raspberry-pi-5", quant="fp32", out=out, verify=False)
        with edgekit.load(out) as model:
            answers.append(model.generate("Why is the sky blue?", max_tokens=8).tokens)
    assert answers[0] == answers[1]


# ---- Refusals ----


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", "CohereTokenizer", None, 7])
def test_unknown_class_is_refused_with_the_known_ones(name: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=str(name) if isinstance(name, str) else "tokenizer_class") as caught:
        opened(write_tokenizer(tmp_path, name, "nothing"))
    assert all(known in str(caught.value.hint) for known in CLASSES)


def test_phi_models_are_refused_whatever_class_they_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"phi3 model without tokenizer.json"):
        opened(write_tokenizer(tmp_path, "GPT2Tokenizer", "nothing", model_type="phi3"))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_half_is_named(name: str, tmp_path: Path) -> None:
    (write_tokenizer(tmp_path, "GPT2Tokenizer", "nothing") / name).unlink()
    with pytest.raises(SourceError, match=f"{name} is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("vocab.json", b"[]", "JSON object"),
        ("vocab.json", b"{}", "does not map"),
        ("vocab.json", b'{"a": -1}', "does not map"),
        ("vocab.json", b'{"a": true}', "does not map"),
        ("vocab.json", b'{"a": 0, "b": 0}', "one id to two"),
        ("vocab.json", b'{"\\ud800": 0}', "not valid JSON"),
        ("vocab.json", b"\xff", "UTF-8"),
        ("merges.txt", b"\xff", "UTF-8"),
        ("merges.txt", b"#version: 0.2\nt h\nth", "line 3 does not join"),
        ("merges.txt", b"h e x", "line 1 does not join"),
        ("merges.txt", b"no-token e", "line 1 does not join"),
        ("added_tokens.json", b'{"<x>": "7"}', "added_tokens.json is malformed"),
        ("added_tokens.json", b'{"": 7}', "added_tokens.json is malformed"),
        ("added_tokens.json", b'{"<x>": 7, "<y>": 7}', "added_tokens.json is malformed"),
        ("added_tokens.json", b'{"<x>": 99999}', "lists '<x>' as token 99999"),
        ("added_tokens.json", b'{"<x>": 3}', "lists '<x>' as token 3"),
        ("special_tokens_map.json", b"[]", "JSON object"),
    ],
)
def test_malformed_files_are_refused(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    (write_tokenizer(tmp_path, "GPT2Tokenizer", "nothing") / name).write_bytes(data)
    with pytest.raises(SourceError, match=words):
        opened(tmp_path)


SETTINGS = ["tokenizer_class", "added_tokens_decoder", "bos_token", "eos_token", "image_token", "add_bos_token"]
SETTINGS += ["extra_special_tokens", "additional_special_tokens", "add_prefix_space", "chat_template"]
JUNK = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.text(max_size=3), max_size=2)
KEYS = st.text(max_size=3) | st.sampled_from(["content", "lstrip", "700", "701"])
TOKENS = st.dictionaries(KEYS, JUNK, max_size=3) | st.fixed_dictionaries({"content": st.text(max_size=3)})
JSON = JUNK | TOKENS | st.lists(TOKENS, max_size=2) | st.dictionaries(KEYS, TOKENS, max_size=2)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.sampled_from(SETTINGS),
        JSON,
        max_size=4,
    ),
    names=st.dictionaries(st.sampled_from(["eos_token", "additional_special_tokens", "x"]), JSON),
)
def test_any_settings_give_a_tokenizer_that_loads_or_an_error_of_ours(
    values: dict[str, Any], names: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "junk"
    directory.mkdir(exist_ok=True)
    write_tokenizer(directory, "GPT2Tokenizer", "nothing")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"} | values)
    write_json(directory / "special_tokens_map.json", names)
    try:
        files = opened(directory)
    except EdgeKitError:
        return
    Tokenizer.from_str(files.tokenizer_json).encode("the <|endoftext|> text")
