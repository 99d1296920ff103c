"""A user's own text, cut into windows that a model can be compared on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import SourceError
from edgekit.goldens import GoldenText

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["read_windows"]

WINDOW = 256  # tokens, each window read from an empty cache
MOST_POSITIONS = 4096
SLOW_POSITIONS = 256  # where reading them takes minutes
LARGEST_BYTES = 16_000_000


def read_windows(model: LoadedModel, file: str | Path) -> tuple[GoldenText, ...]:
    """Windows of a text file in the model's tokens, evenly spread over it where it has more than 4,096 (256 for a slow runtime).

    Raises:
        SourceError: The file can't be read as UTF-8 text, or is too short or too large.
    """
    content = _read(Path(file))
    first = model.token_ids("", add_special_tokens=True)
    length = min(WINDOW, model.context - len(first))
    tokens = model.token_ids(content, add_special_tokens=False)
    if length < 2 or len(tokens) < length:
        raise SourceError(
            f"{file} has {len(tokens):,} tokens, the comparison needs at least {max(length, 2)}",
            hint="give a longer text",
        )
    places = range(0, len(tokens) - length + 1, length)
    most = SLOW_POSITIONS if model.provider.is_slow else MOST_POSITIONS
    wanted = min(max(most // length, 1), len(places))
    chosen = [places[number * len(places) // wanted] for number in range(wanted)]
    return tuple(GoldenText("", (*first, *tokens[place : place + length]), max(len(first), 1)) for place in chosen)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise SourceError(f"{path} has over {LARGEST_BYTES:,} bytes", hint="give a part of it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SourceError(f"{path} is not UTF-8 text", hint="--text takes a plain text file") from error
