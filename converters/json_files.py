"""Text and JSON files of a checkpoint, which may come from anyone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError

__all__ = ["FETCH_AGAIN", "optional_json", "read_json", "read_text"]

FETCH_AGAIN = "download the file again"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: It is missing or not a JSON object.
    """
    text = read_text(path)
    try:
        values = json.loads(text)
        if _SURROGATE.search(text):  # half a surrogate pair is JSON but no text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON", hint=FETCH_AGAIN) from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} does not hold a JSON object", hint=FETCH_AGAIN)
    return values


def optional_json(path: Path) -> dict[str, Any]:
    """The same, empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        SourceError: It is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} is missing", hint="give a directory that a Hugging Face model was downloaded to"
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text", hint=FETCH_AGAIN) from error
