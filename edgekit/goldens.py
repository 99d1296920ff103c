"""Goldens: what a bundle remembers of its verification, so that any runtime can check itself without the source.

The model itself writes the texts, sampled after prompts in its own chat format: the first program that is verified does so,
or the reference where that one's runtime is slow. The last text is read past half of the context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import cycle, islice
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
    "read_goldens",
    "render_prompts",
    "sampled_tokens",
    "with_greedy",
    "write_texts",
]

POSITIONS = 256
TEXTS = 4
SEED = 20261122
GREEDY_TOKENS = 32
SLOW_GREEDY_TOKENS = 4  # after the first prompt alone, where a token takes seconds
LATE_POSITIONS = 32
LATEST_START = 8192  # where half of the context lies further on, checking there would take minutes
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
    """A rendered prompt and what the model went on to write; the positions compared are those that predict `tokens[start:]`.

    A `late` one follows other texts, so far that these positions lie past half of the context; no program writes after it.
    """

    prompt: str
    tokens: tuple[int, ...]
    start: int
    late: bool = False


@dataclass(frozen=True, slots=True)
class Goldens:
    """What lets any runtime check itself without the source; see `design`: `goldens.json`.

    `greedy` has for each program its tokens after each text's prompt, none where it did not write there.
    """

    texts: tuple[GoldenText, ...]
    greedy: Mapping[str, tuple[tuple[int, ...], ...]]
    margins: Mapping[str, tuple[tuple[float, ...], ...]]
    top_tokens: tuple[tuple[int, ...], ...]
    top_log_probabilities: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The file's JSON object."""
        return asdict(self) | {"margin_tolerance": MARGIN_TOLERANCE}


def write_texts(writer: LoadedModel, *, on_progress: ProgressFn | None = None) -> tuple[GoldenText, ...]:
    """Let a model write: sampled texts to compare programs on, none where the context is too short for any prompt.

    Positions are fewer than 256 where the context is too short for them.
    """
    prompts, texts = render_prompts(writer, _QUESTIONS, _OPENINGS), list[GoldenText]()
    for number, (prompt, add_special_tokens) in enumerate(prompts):
        ids = writer.token_ids(prompt, add_special_tokens=add_special_tokens)
        room = writer.context - len(ids)
        if room < 1:
            continue
        sampled = sampled_tokens(writer, ids, min(POSITIONS // TEXTS, room), SEED + number)
        texts.append(GoldenText(prompt, (*ids, *sampled), len(ids)))
        if on_progress:
            on_progress(Progress("generate", number + 1, len(prompts), "texts"))
    return (*texts, *_late_text(texts, writer.context))


def _late_text(texts: Sequence[GoldenText], context: int) -> tuple[GoldenText, ...]:
    """The last text behind as many tokens of the others as bring it past half of the context; nothing where there is no room."""
    if len(texts) < TEXTS:
        return ()
    *others, last = texts
    filling = [token for text in others for token in text.tokens]
    before = max(min(context // 2, LATEST_START) + 1 - last.start, 0)
    start = before + last.start
    count = min(LATE_POSITIONS, len(last.tokens) - last.start, context - start)
    if count < 1:
        return ()
    tokens = (*islice(cycle(filling), before), *last.tokens[: last.start + count])
    return (GoldenText("", tokens, start, late=True),)


def with_greedy(goldens: Goldens, model: LoadedModel, format: str) -> Goldens:
    """The goldens with a program's own greedy tokens."""
    written = [_greedy(model, text, number) for number, text in enumerate(goldens.texts)]
    return replace(
        goldens,
        greedy={**goldens.greedy, format: tuple(tokens for tokens, _ in written)},
        margins={**goldens.margins, format: tuple(gaps for _, gaps in written)},
    )


def _greedy(model: LoadedModel, text: GoldenText, number: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    slow = model.provider.is_slow
    if text.late or (slow and number):
        return (), ()
    ids = list(text.tokens[: text.start])
    return greedy_tokens(model, ids, min(SLOW_GREEDY_TOKENS if slow else GREEDY_TOKENS, model.context - len(ids)))


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


def _parsed(values: Mapping[str, Any], formats: Iterable[str]) -> Goldens:
    texts = tuple(
        GoldenText(text["prompt"], tuple(map(int, text["tokens"])), int(text["start"]), bool(text.get("late")))
        for text in values["texts"]
    )
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
        and not goldens.texts[0].late
        and all(0 < text.start < len(text.tokens) <= context for text in goldens.texts)
        and all(0 <= token < vocabulary for token in ids)
        and len(goldens.greedy[format]) == len(goldens.margins[format]) == len(goldens.texts)
        and all(
            len(tokens) == len(margins) <= context - text.start
            for text, tokens, margins in zip(
                goldens.texts, goldens.greedy[format], goldens.margins[format], strict=True
            )
        )
        and bool(goldens.greedy[format][0])
        and all(goldens.top_tokens)
        and len(goldens.top_tokens) == len(goldens.top_log_probabilities)
        and len(goldens.top_tokens) in {0, positions}
        and len({len(row) for row in (*goldens.top_tokens, *goldens.top_log_probabilities)}) <= 1
    )
