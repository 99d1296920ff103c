"""SentencePiece models without a tokenizer.json: ids against the sentencepiece package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.converters.hf_tokenizer import tokenizer_from_directory
from edgekit.converters.spm_tokenizer import sentencepiece_tokenizer
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError

TEXTS = ["Hello world", "  two spaces", "naïve café – 東京 🙂", "tab\tand\nline", "a", "x = y + 1;", ""]


def trained(directory: Path, **options: Any) -> Path:
    import sentencepiece

    corpus = directory / "corpus.txt"
    words = ["hello", "world", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "spaces"]
    lines = [" ".join(words[(i * step) % len(words)] for i in range(8)) for step in range(1, 60)]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "minloglevel": 3,
    } | options
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(directory / "tokenizer"), **settings)
    return directory / "tokenizer.model"


@pytest.mark.parametrize("model_type", ["", "llama", "gemma2"])
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_equal_sentencepiece(tmp_path: Path, prefix: bool, model_type: str) -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    path = trained(tmp_path, add_dummy_prefix=prefix)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(sentencepiece_tokenizer(path, {}, model_type))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == [reference.bos_id(), *reference.encode(text)], text


def test_model_type_counts(tmp_path: Path) -> None:
    path = trained(tmp_path)
    llama, phi3 = (json.loads(sentencepiece_tokenizer(path, {}, name)) for name in ("llama", "phi3"))
    assert not any(token["rstrip"] for token in llama["added_tokens"])
    assert any(token["rstrip"] for token in phi3["added_tokens"])  # Phi-3 eats the space after them


OLD_FILES: dict[str, Any] = {
    "special_tokens_map.json": {
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|user|>"],
    },
    "added_tokens.json": {"<|user|>": 330, "<|end|>": 331, "<think>": 332},
}
LISTED = {
    str(330 + index): {"content": text, "lstrip": False, "rstrip": strip, "single_word": False, "normalized": False}
    | {"special": True}
    for index, (text, strip) in enumerate([("<|user|>", True), ("<|end|>", False), ("<think>", False)])
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_have_the_ids_of_transformers(listed: bool, legacy: bool, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    trained(tmp_path)
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    # In both files: transformers takes such a token of added_tokens.json as special only where the settings say so too.
    settings["additional_special_tokens"] = ["<|user|>"]
    files = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": settings}
    files |= {"tokenizer_config.json": settings | {"added_tokens_decoder": LISTED}} if listed else OLD_FILES
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(tmp_path)
    found = Tokenizer.from_str(tokenizer_from_directory(tmp_path, {"model_type": "llama"}).tokenizer_json)
    stripped = ["a <|user|>   b"] if listed else []  # a text that begins with a space goes as in SentencePiece
    for text in [
        *TEXTS[2:],
        "<|user|>hello world<|end|>\nthe <think>quick</think> fox",
        "a <|user|>b<|end|>c<pad>",
        *stripped,
    ]:
        ids = expected(text)["input_ids"]
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def test_begin_token_is_left_out_where_the_settings_say_so(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(sentencepiece_tokenizer(trained(tmp_path), {"add_bos_token": False}))
    assert tokenizer.encode("hello").ids[0] != 1


def test_unigram_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="unigram"):
        sentencepiece_tokenizer(trained(tmp_path, model_type="unigram", vocab_size=300, hard_vocab_limit=False), {})


def test_damaged_files_are_source_errors(tmp_path: Path) -> None:
    whole = trained(tmp_path).read_bytes()
    path = tmp_path / "damaged.model"
    for end in range(1, len(whole), 97):
        path.write_bytes(whole[:end])
        try:
            json.loads(sentencepiece_tokenizer(path, {}))
        except EdgeKitError:
            continue
    path.write_bytes(b"\x0a\xff\xff\xff\xff\x0f")
    with pytest.raises(SourceError, match="ends in the middle"):
        sentencepiece_tokenizer(path, {})
