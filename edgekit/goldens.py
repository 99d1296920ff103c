"""Goldens: what a bundle remembers of its verification, so that any runtime can check itself without the source.

The model itself writes the texts: sampled from the program under test, after prompts in its own chat format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import GOLDENS, Bundle, Program
from edgekit.errors import BundleError, GenerationError
from edgekit.progress import Progress, ProgressFn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.engine import LoadedModel

__all__ = [
    "GoldenText",
    "Goldens",
    "greedy_tokens",
    "make_goldens",
    "read_goldens",
    "render_prompts",
    "sampled_tokens",
    "written_goldens",
]

POSITIONS = 256
TEXTS = 4
SEED = 20261122
GREEDY_TOKENS = 32
DATE = datetime(2026, 1, 1)
# A greedy step may differ on another kernel where its two best logits are closer than this; later steps then follow.
MARGIN_TOLERANCE = 0.5
_QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List three ways to save energy at home.",
)
_OPENINGS = (
    "The capital of France is",
    "Once upon a time, in a lighthouse by the sea,",
    "A bicycle stays upright because",
    "Three ways to save energy at home are",
)


@dataclass(frozen=True, slots=True)
class GoldenText:
    """A rendered prompt and what the model went on to write; the positions compared are those that predict `tokens[start:]`."""

    prompt: str
    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Goldens:
    """What lets any runtime check itself without the source; see `design`: `goldens.json`."""

    texts: tuple[GoldenText, ...]
    greedy: Mapping[str, tuple[tuple[int, ...], ...]]
    margins: Mapping[str, tuple[tuple[float, ...], ...]]
    top_tokens: tuple[tuple[int, ...], ...]
    top_log_probabilities: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The file's JSON object."""
        return asdict(self) | {"margin_tolerance": MARGIN_TOLERANCE}


def make_goldens(
    model: LoadedModel, format: str, *, known: Goldens | None = None, on_progress: ProgressFn | None = None
) -> Goldens:
    """Let the program write: sampled texts to compare on, and the greedy tokens of each prompt.

    Positions are fewer than 256 where the context is too short for them.

    Args:
        known: Another program's goldens, whose texts are taken.
    """
    if known is not None:
        starts = [list(text.tokens[: text.start]) for text in known.texts]
        written = [greedy_tokens(model, ids, min(GREEDY_TOKENS, model.context - len(ids))) for ids in starts]
        return replace(
            known,
            greedy={**known.greedy, format: tuple(tokens for tokens, _ in written)},
            margins={**known.margins, format: tuple(gaps for _, gaps in written)},
        )
    prompts = render_prompts(model, _QUESTIONS, _OPENINGS)
    texts, greedy, margins = [], [], []
    for number, (prompt, add_special_tokens) in enumerate(prompts):
        ids = model.token_ids(prompt, add_special_tokens=add_special_tokens)
        room = model.context - len(ids)
        if room < 1:
            continue
        sampled = sampled_tokens(model, ids, min(POSITIONS // TEXTS, room), SEED + number)
        texts.append(GoldenText(prompt, (*ids, *sampled), len(ids)))
        tokens, gaps = greedy_tokens(model, ids, min(GREEDY_TOKENS, room))
        greedy.append(tokens)
        margins.append(gaps)
        if on_progress:
            on_progress(Progress("generate", number + 1, len(prompts), "texts"))
    return Goldens(tuple(texts), {format: tuple(greedy)}, {format: tuple(margins)}, (), ())


def render_prompts(model: LoadedModel, questions: Sequence[str], openings: Sequence[str]) -> list[tuple[str, bool]]:
    """Questions in the model's chat format, or openings for a model that only continues; and whether special tokens are to
    be added.
    """
    if model.has_chat_template:
        return [(model.render(question, now=DATE), False) for question in questions]
    return [(opening, True) for opening in openings]


def greedy_tokens(model: LoadedModel, prompt: list[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The best token of each step, up to an end token, and each step's margin over the second best logit."""
    import numpy as np

    margins: list[float] = []

    def choose(logits: NDArray[np.float32]) -> int:
        second, first = np.partition(logits, -2)[-2:]
        margins.append(round(float(first - second), 4))
        return int(logits.argmax())

    return tuple(_write(model, prompt, count, choose, model.end_tokens)), tuple(margins)


def sampled_tokens(model: LoadedModel, prompt: list[int], count: int, seed: int) -> list[int]:
    """Tokens sampled at temperature 1, end tokens barred: a text that ends at once would prove little."""
    import numpy as np

    random, ends = np.random.default_rng(seed), sorted(model.end_tokens)

    def choose(logits: NDArray[np.float32]) -> int:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        weights[ends] = 0
        cumulative = np.cumsum(weights)
        return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))

    return _write(model, prompt, count, choose, frozenset())


def _write(
    model: LoadedModel,
    prompt: list[int],
    count: int,
    choose: Callable[[NDArray[np.float32]], int],
    ends: frozenset[int],
) -> list[int]:
    import numpy as np

    decoder, tokens, length = model.backend.decoder(), list[int](), len(prompt) + count
    logits = decoder.forward(np.asarray(prompt, np.int64), rows=1, rope_length=length)
    while True:
        if not np.isfinite(logits).all():
            raise GenerationError("it computes values that are not finite numbers")
        tokens.append(choose(logits[0]))
        if len(tokens) == count or tokens[-1] in ends:
            return tokens
        logits = decoder.forward(np.asarray(tokens[-1:], np.int64), rows=1, rope_length=length)


def read_goldens(bundle: Bundle, program: Program) -> Goldens:
    """Read goldens.json.

    Raises:
        BundleError: It is missing or malformed, or the bundle was made without verification.
    """
    path, format = bundle.directory / GOLDENS, program.graph.format
    if not path.is_file():
        raise BundleError(f"{bundle.directory} has no {GOLDENS}", hint="it was converted with --no-verify")
    vocabulary = program.graph.vocab_size
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        goldens = _parsed(values, [format])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{GOLDENS} is malformed", hint="convert the model again") from error
    if not _consistent(goldens, format, program.context, vocabulary):
        raise BundleError(f"{GOLDENS} contradicts itself or the model", hint="convert the model again")
    return goldens


def written_goldens(directory: Path) -> Goldens | None:
    """Those that the programs of an unfinished bundle have written so far; None where none has."""
    path = directory / GOLDENS
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return _parsed(values, values["greedy"])


def _parsed(values: Mapping[str, Any], formats: Iterable[str]) -> Goldens:
    texts = tuple(GoldenText(t["prompt"], tuple(map(int, t["tokens"])), int(t["start"])) for t in values["texts"])
    return Goldens(
        texts,
        {format: tuple(tuple(map(int, row)) for row in values["greedy"][format]) for format in formats},
        {format: tuple(tuple(map(float, row)) for row in values["margins"][format]) for format in formats},
        tuple(tuple(map(int, row)) for row in values["top_tokens"]),
        tuple(tuple(map(float, row)) for row in values["top_log_probabilities"]),
    )


def _consistent(goldens: Goldens, format: str, context: int, vocabulary: int) -> bool:
    positions = sum(len(text.tokens) - text.start for text in goldens.texts)
    ids = [token for text in goldens.texts for token in text.tokens]
    ids += [token for row in (*goldens.greedy[format], *goldens.top_tokens) for token in row]
    return (
        bool(goldens.texts)
        and all(0 < text.start < len(text.tokens) <= context for text in goldens.texts)
        and all(0 <= token < vocabulary for token in ids)
        and len(goldens.greedy[format]) == len(goldens.margins[format]) == len(goldens.texts)
        and all(
            0 < len(tokens) == len(margins) <= context - text.start
            for text, tokens, margins in zip(
                goldens.texts, goldens.greedy[format], goldens.margins[format], strict=True
            )
        )
        and all(goldens.top_tokens)
        and len(goldens.top_tokens) == len(goldens.top_log_probabilities)
        and len(goldens.top_tokens) in {0, positions}
        and len({len(row) for row in (*goldens.top_tokens, *goldens.top_log_probabilities)}) <= 1
    )
