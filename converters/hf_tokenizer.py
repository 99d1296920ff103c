"""The tokenizer, chat template, end tokens and licence of a Hugging Face directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from edgekit.errors import SourceError, UnsupportedError
from edgekit.source import TokenizerFiles

from .spm_tokenizer import sentencepiece_tokenizer

__all__ = ["generation_defaults", "read_json", "read_licence", "tokenizer_from_directory"]

LARGEST_SETTING = 1e9
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: It is missing or not a JSON object.
    """
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON", hint="download the file again") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} does not hold a JSON object", hint="download the file again")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} is missing", hint="give a directory that a Hugging Face model was downloaded to"
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text", hint="download the file again") from error


def tokenizer_from_directory(directory: Path, config: Mapping[str, object]) -> TokenizerFiles:
    """Read tokenizer.json with what transformers keeps beside it.

    Raises:
        SourceError, UnsupportedError: There is no tokenizer.json, or a file is malformed.
    """
    settings = _optional_json(directory / "tokenizer_config.json")
    generation = _optional_json(directory / "generation_config.json")
    tokenizer = _with_added_tokens(_tokenizer_json(directory, settings, config), settings)
    tokenizer |= {"truncation": None, "padding": None}  # left by a training run, they would cut prompts silently
    ids = _token_numbers(tokenizer)
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name)))}

    def id_of(name: str) -> int | None:
        return ids.get(special.get(name, ""))

    ends = _token_ids(generation.get("eos_token_id")) or _token_ids(config.get("eos_token_id"))
    tokenizer_end = id_of("eos_token")
    if tokenizer_end is not None:
        ends = (*ends, tokenizer_end)
    begins = _token_ids(config.get("bos_token_id"))
    bos = id_of("bos_token")
    return TokenizerFiles(
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")),
        chat_template=_chat_template(directory, settings),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=bos if bos is not None else (begins[0] if begins else None),
        special_tokens=special,
        generation_defaults=generation_defaults(generation),
    )


def generation_defaults(generation: Mapping[str, object]) -> dict[str, float | int | bool]:
    """The publisher's sampling settings, as far as EdgeKit has them."""
    return {
        key: value
        for key in _SAMPLING_KEYS
        if isinstance(value := generation.get(key), bool | int | float) and abs(value) < LARGEST_SETTING
    }


def read_licence(directory: Path) -> str | None:
    """The licence that the model card's front matter names."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return named[1] if named else None


def _tokenizer_json(directory: Path, settings: Mapping[str, object], config: Mapping[str, object]) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    model = directory / "tokenizer.model"
    if model.is_file():
        made: dict[str, Any] = json.loads(sentencepiece_tokenizer(model, settings, str(config.get("model_type"))))
        return made
    save = "from transformers import AutoTokenizer as T; T.from_pretrained(DIR).save_pretrained(DIR)"
    raise UnsupportedError(f"{directory} has no tokenizer.json", hint=f'save one: python -c "{save}"')


def _with_added_tokens(tokenizer: dict[str, Any], settings: Mapping[str, object]) -> dict[str, Any]:
    """Add the tokens that only tokenizer_config.json lists, as transformers does on loading."""
    added = tokenizer.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and _is_id(token.get("id")) and isinstance(token.get("content"), str) for token in added
    ):
        raise SourceError("tokenizer.json has malformed added_tokens", hint="download the file again")
    known = {token["id"] for token in added}
    for number, token in sorted(_listed_tokens(settings).items()):
        if number in known:
            continue
        flags = {
            name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        added.append({"id": number, "content": token["content"], **flags})
    return tokenizer


def _listed_tokens(settings: Mapping[str, object]) -> dict[int, Mapping[str, Any]]:
    listed = settings.get("added_tokens_decoder") or {}
    malformed = SourceError(
        "tokenizer_config.json has a malformed added_tokens_decoder", hint="download the file again"
    )
    if not isinstance(listed, Mapping):
        raise malformed
    tokens = {}
    for key, token in listed.items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII) or not isinstance(token, Mapping):
            raise malformed
        if not isinstance(token.get("content"), str):
            raise malformed
        tokens[int(key)] = token
    return tokens


def _token_numbers(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Text -> id of the whole vocabulary."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in order
        pieces = [item[0] if isinstance(item, list) and item else None for item in vocabulary]
        vocabulary = {piece: index for index, piece in enumerate(pieces) if isinstance(piece, str)}
    if not isinstance(vocabulary, Mapping) or not all(_is_id(index) for index in vocabulary.values()):
        raise SourceError("tokenizer.json has no vocabulary, or a malformed one", hint="download the file again")
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token_ids(value: object) -> tuple[int, ...]:
    values: Sequence[object] = value if isinstance(value, list) else [value]
    return tuple(item for item in values if _is_id(item))


def _chat_template(directory: Path, settings: Mapping[str, object]) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = directory / name
        if path.is_file():
            return _read_text(path) if path.suffix == ".jinja" else _template_of(read_json(path))
    return _template_of(settings)


def _template_of(values: Mapping[str, object]) -> str | None:
    template = values.get("chat_template")
    if isinstance(template, list):  # several named templates: the plain one is called "default"
        plain = [item for item in template if isinstance(item, Mapping) and item.get("name") == "default"]
        template = plain[0].get("template") if plain else None
    return template if isinstance(template, str) else None
