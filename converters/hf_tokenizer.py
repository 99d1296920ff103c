"""The tokenizer, chat template, end tokens and licence of a Hugging Face directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.errors import UnsupportedError
from edgekit.source import TokenizerFiles

from .byte_level_tokenizer import MERGES, SAVE_HINT, VOCABULARY, byte_level_tokenizer, class_settings
from .hf_added_tokens import AddedTokens, added_tokens, is_id, token_ids, token_text, with_added_tokens
from .json_files import optional_json, read_json, read_text
from .spm_tokenizer import sentencepiece_tokenizer

__all__ = ["generation_defaults", "read_licence", "tokenizer_from_directory"]

LARGEST_SETTING = 1e9
_TEMPLATE_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def tokenizer_from_directory(directory: Path, config: Mapping[str, object]) -> TokenizerFiles:
    """Read tokenizer.json, or make it of the older files, with what transformers keeps beside it.

    Raises:
        SourceError, UnsupportedError: There is no tokenizer, it is of an unknown kind, or a file is malformed.
    """
    generation = optional_json(directory / "generation_config.json")
    tokenizer, settings = _open_tokenizer(directory, added_tokens(directory), config)
    tokenizer |= {"truncation": None, "padding": None}  # left by a training run, they would cut prompts silently
    ids = token_ids(tokenizer)
    special = {name: text for name in _TEMPLATE_NAMES if (text := token_text(settings.get(name)))}

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


def _open_tokenizer(
    directory: Path, added: AddedTokens, config: Mapping[str, object]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The values of a tokenizer.json with every added token, and the settings that go with it."""
    rows = config.get("vocab_size")
    rows = rows if is_id(rows) else None
    path, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if path.is_file():
        return with_added_tokens(read_json(path), added, rows=rows), added.settings
    if model.is_file():
        made = json.loads(sentencepiece_tokenizer(model, added.settings, str(config.get("model_type"))))
        with_added_tokens(made, added, rows=rows)
        for entry in made["added_tokens"]:  # normalized, their text would begin with a space
            entry["normalized"] = False
        return made, added.settings
    if (directory / VOCABULARY).is_file() or (directory / MERGES).is_file():
        added = replace(added, settings=class_settings(added.settings, config))
        return byte_level_tokenizer(directory, added, rows=rows), added.settings
    raise UnsupportedError(f"{directory} has no tokenizer.json", hint=SAVE_HINT)


def _token_ids(value: object) -> tuple[int, ...]:
    values: Sequence[object] = value if isinstance(value, list) else [value]
    return tuple(item for item in values if is_id(item))


def _chat_template(directory: Path, settings: Mapping[str, object]) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = directory / name
        if path.is_file():
            return read_text(path) if path.suffix == ".jinja" else _template_of(read_json(path))
    return _template_of(settings)


def _template_of(values: Mapping[str, object]) -> str | None:
    template = values.get("chat_template")
    if isinstance(template, list):  # several named templates: the plain one is called "default"
        plain = [item for item in template if isinstance(item, Mapping) and item.get("name") == "default"]
        template = plain[0].get("template") if plain else None
    return template if isinstance(template, str) else None
