"""The tokenizer of a Hugging Face directory, against transformers' AutoTokenizer where that has a word in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgekit.converters.hf_tokenizer import read_licence, tokenizer_from_directory
from edgekit.errors import SourceError, UnsupportedError
from edgekit.source import TokenizerFiles

TEXTS = [
    "",
    "plain words, and 12345",
    "<|user|>hello<|end|><|assistant|>",
    " <|tool|> and <think>thoughts</think>\n\t<|end|>  ",
    "naïve 你好 👍🏽",
]
NOT_SPECIAL = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
EXTRAS = {
    "261": {"content": "<|tool|>", **NOT_SPECIAL, "special": True},
    "262": {"content": "<think>", **NOT_SPECIAL, "lstrip": True, "rstrip": True},
    "257": {"content": "<|end|>", **NOT_SPECIAL, "special": True},
}


@pytest.fixture
def directory(tiny_model: Any, tmp_path: Path) -> Path:
    target = tmp_path / "tokenizer"
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model("llama") / name, target / name)
    return target


def change(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def opened(directory: Path, **config: Any) -> TokenizerFiles:
    return tokenizer_from_directory(directory, config)


@pytest.mark.parametrize("extras", [{}, EXTRAS, {"262": EXTRAS["262"], "261": EXTRAS["261"]}])
def test_ids_equal_those_of_auto_tokenizer(extras: dict[str, Any], directory: Path) -> None:
    from transformers import AutoTokenizer

    change(directory / "tokenizer_config.json", added_tokens_decoder=extras)
    expected = AutoTokenizer.from_pretrained(directory)
    found = Tokenizer.from_str(opened(directory).tokenizer_json)
    for text in TEXTS:
        assert found.encode(text).ids == expected(text)["input_ids"]
    assert found.token_to_id("<|tool|>") == (261 if extras else None)


OLD_FILES: dict[str, dict[str, Any]] = {
    "special_tokens_map.json": {
        "eos_token": {"content": "<|user|>", **NOT_SPECIAL},
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|extra|>"],
    },
    "added_tokens.json": {"<|tool|>": 261, "<|end|>": 257, "<think>": 262},
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("names", [(), *((name,) for name in OLD_FILES), tuple(OLD_FILES)])
def test_older_files_count_as_in_transformers(names: tuple[str, ...], listed: bool, directory: Path) -> None:
    from transformers import AutoTokenizer

    for name in names:
        change(directory / name, **OLD_FILES[name])
    if listed:  # then the older files do not count
        change(directory / "tokenizer_config.json", added_tokens_decoder=EXTRAS)
    expected, files = AutoTokenizer.from_pretrained(directory), opened(directory)
    found = Tokenizer.from_str(files.tokenizer_json)
    for text in [*TEXTS, "<|pad|> <|extra|><|system|> words"]:
        assert found.encode(text).ids == expected(text)["input_ids"], text
    assert files.special_tokens["eos_token"] == expected.eos_token
    assert expected.eos_token_id in files.eos_token_ids


def test_settings_go_before_the_flags_of_the_tokenizer_file(directory: Path) -> None:
    from transformers import AutoTokenizer

    changed = {"content": "<|user|>", **NOT_SPECIAL, "special": True, "lstrip": True, "rstrip": True}
    change(directory / "tokenizer_config.json", added_tokens_decoder={"258": changed})
    expected, found = AutoTokenizer.from_pretrained(directory), Tokenizer.from_str(opened(directory).tokenizer_json)
    text = "a  <|user|>  b"
    assert found.encode(text).ids == expected(text)["input_ids"]
    assert found.encode(text).ids != found.encode("a<|user|>b").ids[:2]


@pytest.mark.parametrize("number", [257, 261, 300, 5])
def test_id_that_the_tokenizer_would_not_give_is_refused(number: int, directory: Path) -> None:
    """The tokenizers library, and transformers with it, numbers tokens by itself: the weights would not match."""
    change(directory / "added_tokens.json", **{"<|tool|>": number})
    if number == 261:
        opened(directory)
        return
    with pytest.raises(SourceError, match=f"lists '<.*>' as token {number}"):
        opened(directory)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("add_eos", [True, False, None])
@pytest.mark.parametrize("begins", [True, False])
def test_added_ends_are_those_of_the_tokenizer_file(
    add_bos: bool | None, add_eos: bool | None, begins: bool, directory: Path
) -> None:
    """As in transformers 5, which leaves add_bos_token and add_eos_token aside where there is a tokenizer.json."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    if begins:
        saved = Tokenizer.from_file(str(directory / "tokenizer.json"))
        saved.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 256)])
        saved.save(str(directory / "tokenizer.json"))
    change(directory / "tokenizer_config.json", add_bos_token=add_bos, add_eos_token=add_eos)
    expected = AutoTokenizer.from_pretrained(directory)("words")["input_ids"]
    found = Tokenizer.from_str(opened(directory).tokenizer_json).encode("words").ids
    assert found == expected
    assert (found[0] == 256) == begins


def test_truncation_and_padding_of_a_training_run_are_dropped(directory: Path) -> None:
    from transformers import AutoTokenizer

    saved = Tokenizer.from_file(str(directory / "tokenizer.json"))
    saved.enable_truncation(5)
    saved.enable_padding(length=9)
    saved.save(str(directory / "tokenizer.json"))
    found = Tokenizer.from_str(opened(directory).tokenizer_json)
    assert (found.truncation, found.padding) == (None, None)
    expected = AutoTokenizer.from_pretrained(directory)
    assert found.encode(TEXTS[1]).ids == expected(TEXTS[1])["input_ids"]


def test_every_end_token_counts_once_in_the_publishers_order(directory: Path) -> None:
    assert opened(directory, eos_token_id=[258, 257]).eos_token_ids == (258, 257)
    change(directory / "generation_config.json", eos_token_id=[259, 258])
    assert opened(directory, eos_token_id=256).eos_token_ids == (259, 258, 257)


def test_begin_token_is_the_tokenizers_then_the_configs(directory: Path) -> None:
    assert opened(directory, bos_token_id=5).bos_token_id == 256
    change(directory / "tokenizer_config.json", bos_token=None)
    assert opened(directory, bos_token_id=5).bos_token_id == 5
    assert opened(directory).bos_token_id is None


def test_special_tokens_may_be_objects(directory: Path) -> None:
    change(directory / "tokenizer_config.json", eos_token={"content": "<|user|>", "lstrip": False})
    tokenizer = opened(directory)
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|user|>"}
    assert tokenizer.eos_token_ids == (258,)


def test_end_token_of_a_unigram_vocabulary_is_found(directory: Path) -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["</s>", -2.0]]}
    change(directory / "tokenizer.json", model=model, added_tokens=[])
    change(directory / "tokenizer_config.json", eos_token="</s>")
    assert opened(directory).eos_token_ids == (2,)


# ---- Chat templates ----


@pytest.mark.parametrize(
    ("name", "text"), [("chat_template.jinja", "from jinja"), ("chat_template.json", '{"chat_template": "from json"}')]
)
def test_template_file_goes_before_the_settings(name: str, text: str, directory: Path) -> None:
    (directory / name).write_text(text, encoding="utf-8")
    assert opened(directory).chat_template == f"from {name.split('.')[1]}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "rag", "template": "a"}], None),
        ([{"name": [], "template": "a"}, 7], None),
        (None, None),
        (7, None),
    ],
)
def test_template_of_the_settings(template: Any, expected: str | None, directory: Path) -> None:
    change(directory / "tokenizer_config.json", chat_template=template)
    assert opened(directory).chat_template == expected


# ---- Settings of the publisher ----


def test_sampling_defaults_are_taken_where_they_are_usable(directory: Path) -> None:
    text = '{"temperature": 0.6, "top_k": 20, "do_sample": true, "top_p": NaN, "min_p": 1e999, "max_length": 20}'
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    assert opened(directory).generation_defaults == {"temperature": 0.6, "top_k": 20, "do_sample": True}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlanguage: en\nlicense: 'llama3.2'\n---\ntext", "llama3.2"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
    ],
)
def test_licence_is_that_of_the_front_matter(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_licence(tmp_path) == licence


# ---- Malformed files ----


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("tokenizer.json", {"added_tokens": {}}, "malformed added_tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": "1", "content": "x"}]}, "malformed added_tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": -1, "content": "x"}]}, "malformed added_tokens"),
        ("tokenizer.json", {"model": None}, "vocabulary"),
        ("tokenizer.json", {"model": {"vocab": 7}}, "vocabulary"),
        ("tokenizer.json", {"model": {"vocab": {"a": "1"}}}, "vocabulary"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "y"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": 7}}}, "added_tokens_decoder"),
    ],
)
def test_malformed_tokenizer_is_refused(name: str, changes: Any, words: str, directory: Path) -> None:
    change(directory / name, **changes)
    with pytest.raises(SourceError, match=words):
        opened(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_unreadable_file_is_named(name: str, data: bytes, directory: Path) -> None:
    (directory / name).write_bytes(data)
    with pytest.raises(SourceError, match=name):
        opened(directory)


def test_template_that_is_not_text_is_refused(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"chat_template.jinja is not UTF-8"):
        opened(directory)


def test_directory_without_tokenizer_says_how_to_make_one(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no tokenizer.json") as caught:
        opened(directory)
    assert "save_pretrained" in str(caught.value.hint)
