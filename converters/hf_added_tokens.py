"""Tokens that a Hugging Face directory adds to its vocabulary, wherever it lists them.

Today `added_tokens_decoder` in tokenizer_config.json lists them. Older uploads spread them over `added_tokens.json` (text -> id)
and `special_tokens_map.json` (which is special, under what name); as in transformers, those two count only where there is no
`added_tokens_decoder`. A token that is only named, such as `pad_token`, is added too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from edgekit.errors import SourceError

from .json_files import FETCH_AGAIN, optional_json

__all__ = ["SPECIAL_NAMES", "AddedTokens", "added_tokens", "is_id", "token_ids", "token_text", "with_added_tokens"]

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_NAMES = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL = dict.fromkeys(_FLAGS, False) | {"special": True}
_LISTED, _OLD, _NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """What a directory adds to its vocabulary.

    Attributes:
        settings: tokenizer_config.json, with the names of special_tokens_map.json where those count.
        listed: Id -> token, as an entry of tokenizer.json's `added_tokens` without its id.
        origin: The file that lists them.
    """

    settings: Mapping[str, Any]
    listed: Mapping[int, Mapping[str, Any]]
    origin: str


def added_tokens(directory: Path) -> AddedTokens:
    """Read every file that names or lists tokens, but tokenizer.json.

    Raises:
        SourceError: One is malformed.
    """
    settings = optional_json(directory / _LISTED)
    if "added_tokens_decoder" in settings:
        return AddedTokens(settings, _listed(settings), _LISTED)
    names = optional_json(directory / _NAMES)
    settings |= {key: value for key, value in names.items() if key.endswith("_token") or key in _EXTRA_NAMES}
    special = {text for text, _ in _named(settings)}
    listed: dict[int, Mapping[str, Any]] = {}
    for text, number in optional_json(directory / _OLD).items():
        if not text or not is_id(number) or number in listed:
            raise SourceError(f"{_OLD} is malformed at {text[:60]!r}", hint=FETCH_AGAIN)
        # As transformers does; a token that is not special is looked for in normalized text.
        flags = _SPECIAL if text in special else dict.fromkeys(_FLAGS, False) | {"normalized": True}
        listed[number] = {"content": text, **flags}
    return AddedTokens(settings, listed, _OLD)


def with_added_tokens(
    tokenizer: dict[str, Any], added: AddedTokens, *, rows: int | None = None, plain_names: bool = False
) -> dict[str, Any]:
    """Add them to a tokenizer.json, as transformers does on loading.

    Args:
        tokenizer: The file's values; changed in place.
        added: What the other files list.
        rows: Of the embedding; a token that is only named and would lie beyond is left out: no model can take it.
        plain_names: Named tokens are special and swallow no spaces, whatever their entry says.

    Raises:
        SourceError: The tokenizer is malformed, or a listed id is not the one that the tokenizer gives.
    """
    vocabulary = _vocabulary(tokenizer)
    entries = _entries(tokenizer)
    for number, token in sorted(added.listed.items()):
        known = entries.get(token["content"])
        if known is None:
            entries[token["content"]] = {"id": number, **token}
        elif known["id"] != number:
            raise _contradiction(added.origin, token["content"], number, known["id"])
        elif added.origin == _LISTED:  # goes before tokenizer.json; the older file does not
            known.update(token)
    _check_ids(entries, vocabulary, added.origin)
    new = sum(text not in vocabulary for text in entries)
    for text, flags in _named(added.settings):
        number = vocabulary.get(text, len(vocabulary) + new)
        if text in entries:
            entries[text] |= _SPECIAL if plain_names else {"special": True}
        elif text in vocabulary or rows is None or number < rows:
            entries[text] = {"id": number, "content": text, **(_SPECIAL if plain_names else flags)}
            new += text not in vocabulary
    # The library numbers tokens that are not in its vocabulary in the order of the file.
    tokenizer["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    return tokenizer


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Text -> id of the whole vocabulary, added tokens too."""
    return {**_vocabulary(tokenizer), **{entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}}


def is_id(value: object) -> TypeGuard[int]:
    """Whether it can be a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def token_text(value: object) -> str | None:
    """The text of a token that is written as text or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, bool]]]:
    """Text and flags of every token that has a name or is listed as special, in transformers' order."""
    others = sorted(key for key in settings if key.endswith("_token") and key not in SPECIAL_NAMES)
    values = [settings.get(name) for name in (*SPECIAL_NAMES, *others)]
    for name in _EXTRA_NAMES:
        extra = settings.get(name)
        values += extra.values() if isinstance(extra, Mapping) else extra if isinstance(extra, list) else []
    for value in values:
        text = token_text(value)
        if text:
            yield text, (_flags(value) if isinstance(value, Mapping) else _SPECIAL) | {"special": True}


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {name: bool(token.get(name, False)) for name in _FLAGS}


def _listed(settings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    listed = settings.get("added_tokens_decoder") or {}
    malformed = SourceError(f"{_LISTED} has a malformed added_tokens_decoder", hint=FETCH_AGAIN)
    if not isinstance(listed, Mapping):
        raise malformed
    tokens: dict[int, Mapping[str, Any]] = {}
    for key, token in listed.items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII) or not isinstance(token, Mapping):
            raise malformed
        if not isinstance(token.get("content"), str) or not token["content"]:
            raise malformed
        tokens[int(key)] = {"content": token["content"], **_flags(token)}
    return tokens


def _vocabulary(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in order
        pieces = [item[0] if isinstance(item, list) and item else None for item in vocabulary]
        vocabulary = {piece: index for index, piece in enumerate(pieces) if isinstance(piece, str)}
    if not isinstance(vocabulary, Mapping) or not all(is_id(index) for index in vocabulary.values()):
        raise SourceError("tokenizer.json has no vocabulary, or a malformed one", hint=FETCH_AGAIN)
    return vocabulary


def _entries(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tokens that tokenizer.json itself adds, by text."""
    entries = tokenizer.get("added_tokens", [])
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and is_id(entry.get("id")) and isinstance(entry.get("content"), str)
        for entry in entries
    ):
        raise SourceError("tokenizer.json has malformed added_tokens", hint=FETCH_AGAIN)
    return {entry["content"]: entry for entry in entries}


def _check_ids(entries: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], origin: str) -> None:
    """The tokenizers library gives a token its vocabulary's id, or else the next free one, whatever the file says."""
    following = len(vocabulary)
    for entry in sorted(entries.values(), key=lambda entry: int(entry["id"])):
        number = vocabulary.get(entry["content"], following)
        if number != entry["id"]:
            raise _contradiction(origin, entry["content"], entry["id"], number)
        following += entry["content"] not in vocabulary


def _contradiction(origin: str, text: str, listed: int, number: int) -> SourceError:
    return SourceError(
        f"{origin} lists {text[:60]!r} as token {listed}, the tokenizer makes it {number}",
        hint="the tokenizer's files are from different versions; download all of them again",
    )
