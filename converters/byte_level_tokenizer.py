"""`vocab.json` and `merges.txt` as a `tokenizer.json`: byte-level BPE as GPT-2 saved it, and early Qwen2 uploads still do.

The two files do not say how text is cut into words before its merges run: the tokenizer's class does. A class that is not in
the table here is an error, never a guess: the ids would look right on most texts and be wrong on some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError, UnsupportedError

from .gguf_pretokenizer import PRE_TOKENIZERS
from .hf_added_tokens import AddedTokens, is_id, token_ids, token_text, with_added_tokens
from .json_files import FETCH_AGAIN, read_json, read_text
from .tokenizer_document import (
    BYTE_LEVEL,
    bpe_model,
    split_pre_tokenizer,
    tokenizer_document,
    wrapping_post_processor,
)

__all__ = ["MERGES", "SAVE_HINT", "VOCABULARY", "byte_level_tokenizer", "class_settings"]

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_SAVE = "from transformers import AutoTokenizer as T; T.from_pretrained(DIR).save_pretrained(DIR)"
SAVE_HINT = f'save one: python -c "{_SAVE}"'
_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class _TokenizerClass:
    """What a class of transformers fixes.

    Attributes:
        pre: The pre-tokenizer's name in PRE_TOKENIZERS.
        compose: Texts are brought to Unicode's composed form (NFC) first.
        names: Special tokens where the settings do not name them.
        plain_names: Special tokens swallow no spaces, whatever their entry says.
    """

    pre: str
    compose: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    plain_names: bool = False


_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
_QWEN2_NAMES = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END)
_CLASSES: Mapping[str, _TokenizerClass] = {
    "CodeGenTokenizer": _TokenizerClass("gpt-2", names=_GPT2_NAMES),
    "GPT2Tokenizer": _TokenizerClass("gpt-2", names=_GPT2_NAMES),
    "GPTNeoXTokenizer": _TokenizerClass("gpt-2", compose=True, names=_GPT2_NAMES | {"pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": _TokenizerClass("qwen2", compose=True, names=_QWEN2_NAMES, plain_names=True),
}
# Of these the class is known whatever their files say; many Qwen2 models name another.
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer"}
_USUAL_CLASS = {"qwen3": "Qwen2Tokenizer"}
# Phi-4 names GPT2Tokenizer and cuts text in ways of its own, which only its tokenizer.json tells.
_MISNAMED = ("phi3",)


def class_settings(settings: Mapping[str, Any], config: Mapping[str, object]) -> dict[str, Any]:
    """The settings with the class's special tokens where they name none, and its name as `tokenizer_class`.

    Raises:
        UnsupportedError: The class is not known.
    """
    name = _class_name(settings, config)
    return {**_CLASSES[name].names, **settings, "tokenizer_class": name}


def byte_level_tokenizer(directory: Path, added: AddedTokens, *, rows: int | None = None) -> dict[str, Any]:
    """The values of a tokenizer.json.

    Args:
        directory: Has vocab.json and merges.txt.
        added: What the directory adds to the vocabulary; its settings are those of `class_settings`.
        rows: Of the embedding.

    Raises:
        SourceError: A file is missing or malformed.
    """
    settings = added.settings
    rules = _CLASSES[settings["tokenizer_class"]]
    vocabulary = _read_vocabulary(directory / VOCABULARY)
    merges = _read_merges(directory / MERGES, vocabulary)
    space_first = dict(BYTE_LEVEL) | {"add_prefix_space": settings.get("add_prefix_space") is True}
    if rules.pre == "gpt-2":  # built in: only so does the space before a text take part in the cutting
        pre_tokenizer = space_first | {"use_regex": True}
    else:
        pre_tokenizer = split_pre_tokenizer(PRE_TOKENIZERS[rules.pre].splits, byte_level=space_first)
    document = tokenizer_document(
        added_tokens=[],
        normalizer={"type": "NFC"} if rules.compose else None,
        pre_tokenizer=pre_tokenizer,
        post_processor=None,
        decoder=BYTE_LEVEL,
        model=bpe_model(vocabulary, merges),
    )
    document = with_added_tokens(document, added, rows=rows, plain_names=rules.plain_names)
    ids = token_ids(document)
    begins, ends = (_wrapper(settings, name, ids) for name in ("bos", "eos"))
    return document | {"post_processor": wrapping_post_processor(begins, ends, ids)}


def _class_name(settings: Mapping[str, Any], config: Mapping[str, object]) -> str:
    model_type = config.get("model_type")
    named = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name = named if isinstance(named, str) else ""
    if name.removesuffix("Fast") in _CLASSES:
        name = name.removesuffix("Fast")
    if isinstance(model_type, str):
        name = _CLASS_OF_MODEL.get(model_type, name or _USUAL_CLASS.get(model_type, ""))
        if model_type in _MISNAMED:
            raise UnsupportedError(
                f"a {model_type} model without tokenizer.json does not say how its tokenizer cuts text",
                hint="take tokenizer.json from the model that this one was made from",
            )
    if name in _CLASSES:
        return name
    known = f"known: {', '.join(sorted(_CLASSES))}; with a tokenizer.json, any"
    if not name:
        raise UnsupportedError(f"no tokenizer_class says how {VOCABULARY} and {MERGES} cut text", hint=known)
    raise UnsupportedError(
        f"the tokenizer class {name[:60]!r} with {VOCABULARY} and {MERGES} is not supported", hint=known
    )


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    if not vocabulary or not all(is_id(number) for number in vocabulary.values()):
        raise SourceError(f"{path} does not map texts to token ids", hint=FETCH_AGAIN)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise SourceError(f"{path} gives one id to two texts", hint=FETCH_AGAIN)
    return vocabulary


def _read_merges(path: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        left, separator, right = line.partition(" ")
        if not separator or not {left, right, left + right} <= vocabulary.keys():
            raise SourceError(
                f"{path}: line {number} does not join two tokens to a third: {line[:60]!r}",
                hint=f"it and {VOCABULARY} are damaged or from different models; download both again",
            )
        merges.append((left, right))
    return merges


def _wrapper(settings: Mapping[str, Any], name: str, ids: Mapping[str, int]) -> list[str]:
    text = token_text(settings.get(f"{name}_token"))
    wanted = settings.get(f"add_{name}_token") is True
    return [text] if wanted and text is not None and text in ids else []
