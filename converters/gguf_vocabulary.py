"""The vocabulary in a GGUF's metadata, read with every value checked: a GGUF may come from anyone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import SourceError

__all__ = [
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "USER_DEFINED",
    "Vocabulary",
    "read_flag",
    "read_merges",
    "read_scores",
    "read_text",
    "read_token_id",
    "read_vocabulary",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_KINDS = range(7)

# The longest token in use is a run of a few hundred spaces; deriving merges takes the square of a token's length.
_MAX_TOKEN_CHARS = 1024

_HINT = "the file is damaged or was written by a faulty converter; convert or download it again"
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: Text of each token as the file spells it; distinct and never empty.
        kinds: Kind of each token: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, 5 unused, 6 byte, 0 undefined.
        ids: Id of each text.
    """

    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]


def read_text(metadata: Mapping[str, object], name: str) -> str | None:
    """Return the text under `tokenizer.ggml.<name>`, None where it is absent.

    Raises:
        SourceError: The value is no text.
    """
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(name, "is not a text")
    return value


def read_flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    """Return the boolean under `tokenizer.ggml.<name>`.

    Raises:
        SourceError: The value is no boolean.
    """
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(name, "is not true or false")
    return bool(value)


def read_token_id(metadata: Mapping[str, object], name: str, vocabulary: Vocabulary) -> int | None:
    """Return the token id under `tokenizer.ggml.<name>`, None where it is absent.

    Raises:
        SourceError: The value is no id of this vocabulary.
    """
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise _wrong(name, "is not a whole number")
    if not 0 <= value < len(vocabulary.tokens):
        raise _wrong(name, f"names no token of the {len(vocabulary.tokens)} in the vocabulary")
    return int(value)


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Read tokens and their kinds.

    Raises:
        SourceError: They are missing, of a wrong type, repeated, or disagree in number.
    """
    tokens = _read_texts(metadata, "tokens")
    if not tokens:
        raise _wrong("tokens", "is missing or empty")
    # Converters fill holes in a vocabulary with empty texts, and no two tokens may share one.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if len(token) > _MAX_TOKEN_CHARS:
            raise _wrong("tokens", f"has a token {index} of {len(token)} characters, more than {_MAX_TOKEN_CHARS}")
        if ids.setdefault(token, index) != index:
            raise _wrong("tokens", f"has the same text for the tokens {ids[token]} and {index}")
    kinds = _read_numbers(metadata, "token_type")
    if kinds is None:
        return Vocabulary(tokens, [NORMAL] * len(tokens), ids)
    _check_length("token_type", kinds, tokens)
    if not all(kind in _KINDS for kind in kinds):
        raise _wrong("token_type", "has a kind that is not one of 0 to 6")
    return Vocabulary(tokens, [int(kind) for kind in kinds], ids)


def read_scores(metadata: Mapping[str, object], vocabulary: Vocabulary) -> list[float]:
    """Read the score of each token.

    Raises:
        SourceError: They are missing, no numbers, or not one for each token.
    """
    scores = _read_numbers(metadata, "scores")
    if scores is None:
        raise _wrong("scores", "is missing, and there is no tokenizer.ggml.merges either")
    _check_length("scores", scores, vocabulary.tokens)
    return scores


def read_merges(metadata: Mapping[str, object], vocabulary: Vocabulary) -> list[tuple[str, str]] | None:
    """Read the merges in order, None where the file has none.

    Raises:
        SourceError: One of them is malformed, or names or makes a text that is no token.
    """
    lines = _read_texts(metadata, "merges")
    if lines is None:
        return None
    merges = []
    for index, line in enumerate(lines):
        # A space in first place is the left part itself, so the separator is the first one after it.
        cut = line.find(" ", 1)
        left, right = (line[:cut], line[cut + 1 :]) if cut > 0 else (line, "")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise _wrong("merges", f"has a merge {index} that names no token: {_shown(line)}")
        merges.append((left, right))
    return merges


def _read_list(metadata: Mapping[str, object], name: str) -> list[object] | None:
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, "is not a list")
    return list(value)


def _read_texts(metadata: Mapping[str, object], name: str) -> list[str] | None:
    items = _read_list(metadata, name)
    return None if items is None else [_text(name, index, item) for index, item in enumerate(items)]


def _text(name: str, index: int, item: object) -> str:
    if not isinstance(item, str):
        raise _wrong(name, f"has an entry {index} that is not a text")
    try:
        # Half a surrogate pair is no character, and no JSON reader takes it.
        item.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, f"has an entry {index} that is not a valid text") from error
    return str(item)


def _read_numbers(metadata: Mapping[str, object], name: str) -> list[float] | None:
    items = _read_list(metadata, name)
    return None if items is None else [_number(name, index, item) for index, item in enumerate(items)]


def _number(name: str, index: int, item: object) -> float:
    if isinstance(item, bool) or not isinstance(item, (int, float, np.integer, np.floating)):
        raise _wrong(name, f"has an entry {index} that is not a number")
    try:
        number = float(item)
    except OverflowError as error:
        raise _wrong(name, f"has an entry {index} that is out of range") from error
    if not math.isfinite(number):
        raise _wrong(name, f"has an entry {index} that is not finite")
    return number


def _check_length(name: str, values: Sequence[object], tokens: list[str]) -> None:
    if len(values) != len(tokens):
        raise _wrong(name, f"has {len(values)} entries for {len(tokens)} tokens")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _wrong(name: str, problem: str) -> SourceError:
    return SourceError(f"GGUF metadata {_PREFIX}{name} {problem}", hint=_HINT)
