"""Verification: a program is run and compared with the full-precision reference before a bundle is called good.

Program and reference see the same tokens: the texts that the model wrote (`edgekit.goldens`), and a user's own text
(`edgekit.own_text`). A text is read several tokens at a time, its end once more one at a time from a rewound cache, and a long
one past half of the context. `edgekit.divergence` says what the figures are. What the program wrote says nothing about its
perplexity: that is measured on a user's text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.divergence import Divergence, Figures, log_probabilities
from edgekit.goldens import MARGIN_TOLERANCE, Goldens, GoldenText, greedy_tokens
from edgekit.progress import Progress, ProgressFn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.backend import Decoder
    from edgekit.runtimes.engine import LoadedModel

__all__ = [
    "Comparison",
    "Phase",
    "compare",
    "compare_on_text",
    "compare_with_goldens",
    "greedy_match",
    "reference_match",
]

TOP_TOKENS = 64
ROWS = 64  # positions whose logits are held at a time
UNIT = 32  # positions that intervals are drawn by: one text's neighbours are alike
DECODED = 16  # positions of each text that are computed again, one at a time
SLOW_DECODED = 4  # on the first text alone, where a token takes seconds
SLOW_TOKENS = 512  # of the longest text that is read there


@dataclass(frozen=True, slots=True)
class Phase:
    """Figures of a few positions that were computed in a certain way.

    `first_position` is the smallest of them; `kl_at_once` of decoding the mean KL of the same positions where they were computed
    several at a time.
    """

    positions: int
    first_position: int
    kl_mean: float
    top1_agreement: float
    kl_at_once: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As the manifest and `verify --json` have it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A program's figures: of texts read several tokens at a time, one at a time, and past half of the context.

    The last two are None where no position was computed so.
    """

    figures: Figures
    decode: Phase | None = None
    late: Phase | None = None

    def to_json(self) -> dict[str, Any]:
        """As the manifest and `verify --json` have it."""
        phases = {"decode": self.decode, "late": self.late}
        return self.figures.to_json() | {name: phase and phase.to_json() for name, phase in phases.items()}


class _Expected(Protocol):
    """What the reference says of some positions."""

    def add_to(self, divergence: Divergence, found: NDArray[np.float64], tokens: NDArray[np.int64]) -> None:
        """Compare with what was found; see `Divergence.add`."""
        ...

    def part(self, rows: slice) -> _Expected:
        """Some of the positions."""
        ...


@dataclass(frozen=True, slots=True)
class _Whole:
    """Log-probabilities [rows, vocabulary]."""

    values: NDArray[np.float64]

    def add_to(self, divergence: Divergence, found: NDArray[np.float64], tokens: NDArray[np.int64]) -> None:
        divergence.add(self.values, found, tokens)

    def part(self, rows: slice) -> _Whole:
        return _Whole(self.values[rows])


@dataclass(frozen=True, slots=True)
class _Top:
    """The most probable tokens [rows, top], best first, and their log-probabilities.

    The KL is over them and all others as one, which is at most the whole KL.
    """

    tokens: NDArray[np.int64]
    values: NDArray[np.float64]

    def add_to(self, divergence: Divergence, found: NDArray[np.float64], tokens: NDArray[np.int64]) -> None:
        import numpy as np

        kl = _divergence_of_top(self.values, np.take_along_axis(found, self.tokens, -1))
        divergence.add_compared(kl, found.argmax(-1) == self.tokens[:, 0], np.exp(self.values[:, 0]))

    def part(self, rows: slice) -> _Top:
        return _Top(self.tokens[rows], self.values[rows])


@dataclass(slots=True)
class _Collected:
    """The positions that were compared so far, by how they were computed."""

    prefill: Divergence = field(default_factory=Divergence)
    late: Divergence = field(default_factory=Divergence)
    decode: Divergence = field(default_factory=Divergence)
    at_once: Divergence = field(default_factory=Divergence)
    first_late: int = 0
    first_decoded: int = 0

    def comparison(self) -> Comparison:
        """The figures."""
        figures, decode, late = self.prefill.figures().rounded(), None, None
        if self.decode:
            at_once = self.at_once.figures().rounded().kl_mean
            decode = replace(_phase(self.decode, self.first_decoded), kl_at_once=at_once)
        if self.late:
            late = _phase(self.late, self.first_late)
        return Comparison(figures, decode, late)


def _phase(divergence: Divergence, first_position: int) -> Phase:
    found = divergence.figures().rounded()
    return Phase(found.positions, first_position, found.kl_mean, found.top1_agreement)


def compare(
    model: LoadedModel, reference: LoadedModel, goldens: Goldens, *, on_progress: ProgressFn | None = None
) -> tuple[Comparison, Goldens]:
    """Compare a program with the reference on the goldens' texts.

    Returns:
        The figures, and the goldens with the reference's most probable tokens.
    """
    collected, kept = _Collected(), list[_Top]()
    for number, text in enumerate(goldens.texts):
        _compare_text(
            collected, model, text, _kept(_reference_rows(reference, text), kept), decoded=_decoded(model, number)
        )
        if on_progress:
            on_progress(Progress("compare", number + 1, len(goldens.texts), "texts"))
    completed = replace(
        goldens,
        top_tokens=tuple(tuple(row) for top in kept for row in top.tokens.tolist()),
        top_log_probabilities=tuple(tuple(row) for top in kept for row in top.values.round(4).tolist()),
    )
    return collected.comparison(), completed


def compare_on_text(
    model: LoadedModel,
    reference: LoadedModel,
    texts: Sequence[GoldenText],
    *,
    on_progress: ProgressFn | None = None,
) -> Divergence:
    """Compare a program with the reference on windows of a text that neither wrote."""
    collected = _Collected()
    for number, text in enumerate(texts):
        _compare_text(collected, model, text, _reference_rows(reference, text), decoded=0)
        if on_progress:
            on_progress(Progress("compare", number + 1, len(texts), "windows"))
    return collected.prefill


def compare_with_goldens(model: LoadedModel, goldens: Goldens) -> Comparison | None:
    """Compare a program with the reference's stored log-probabilities; None where the bundle holds none."""
    import numpy as np

    if not goldens.top_tokens:
        return None
    stored = _Top(np.asarray(goldens.top_tokens), np.asarray(goldens.top_log_probabilities, np.float64))
    collected, first = _Collected(), 0
    for number, text in enumerate(goldens.texts):
        last = first + len(text.tokens) - text.start
        mine = (stored.part(slice(start, min(start + ROWS, last))) for start in range(first, last, ROWS))
        _compare_text(collected, model, text, mine, decoded=_decoded(model, number))
        first = last
    return collected.comparison()


def _decoded(model: LoadedModel, number: int) -> int:
    """How many positions of a text, by its number, are computed again one at a time."""
    if model.provider.is_slow:
        return SLOW_DECODED if number == 0 else 0
    return DECODED


def _compare_text(
    collected: _Collected, model: LoadedModel, text: GoldenText, expected: Iterator[_Expected], *, decoded: int
) -> None:
    """Compare one text, and its last positions once more where `decoded` says so."""
    import numpy as np

    if text.late and model.provider.is_slow and len(text.tokens) > SLOW_TOKENS:
        for _ in expected:  # they are kept with the goldens all the same
            pass
        return
    if text.late:
        collected.first_late = text.start
    divergence, tokens, first = collected.late if text.late else collected.prefill, np.asarray(text.tokens), text.start
    with closing(model.backend.decoder()) as decoder:
        for found, wanted in zip(_rows(decoder, text), expected, strict=True):
            followers = tokens[first : first + len(found)]
            for unit in _units(len(found)):
                wanted.part(unit).add_to(divergence, found[unit], followers[unit])
            first += len(found)
        count = 0 if text.late else min(decoded, len(found))
        if count:
            last, place = slice(len(found) - count, None), len(tokens) - count
            wanted.part(last).add_to(collected.at_once, found[last], followers[last])
            wanted.part(last).add_to(collected.decode, _rows_again(decoder, text, count), followers[last])
            collected.first_decoded = min(collected.first_decoded or place, place)


def _units(rows: int) -> Iterator[slice]:
    return (slice(start, start + UNIT) for start in range(0, rows, UNIT))


def _rows(decoder: Decoder, text: GoldenText) -> Iterator[NDArray[np.float64]]:
    """Log-probabilities [rows, vocabulary] of the positions that predict the written tokens, some rows at a time."""
    import numpy as np

    tokens, first = np.asarray(text.tokens[:-1], np.int64), text.start - 1
    if first:
        decoder.forward(tokens[:first], rows=1, rope_length=len(text.tokens))
    for start in range(first, len(tokens), ROWS):
        part = tokens[start : start + ROWS]
        yield log_probabilities(decoder.forward(part, rows=len(part), rope_length=len(text.tokens)))


def _rows_again(decoder: Decoder, text: GoldenText, count: int) -> NDArray[np.float64]:
    """The last `count` of these rows, one token at a time from a rewound cache."""
    import numpy as np

    tokens = np.asarray(text.tokens[:-1], np.int64)
    decoder.rewind(len(tokens) - count)
    return np.concatenate(
        [
            log_probabilities(decoder.forward(tokens[place : place + 1], rows=1, rope_length=len(text.tokens)))
            for place in range(len(tokens) - count, len(tokens))
        ]
    )


def _reference_rows(reference: LoadedModel, text: GoldenText) -> Iterator[_Whole]:
    with closing(reference.backend.decoder()) as decoder:
        yield from map(_Whole, _rows(decoder, text))


def _kept(rows: Iterator[_Whole], kept: list[_Top]) -> Iterator[_Whole]:
    """The rows as they come; their most probable tokens are put aside."""
    import numpy as np

    for some in rows:
        best = _top(some.values)
        kept.append(_Top(best, np.take_along_axis(some.values, best, -1)))
        yield some


def greedy_match(model: LoadedModel, goldens: Goldens, format: str) -> tuple[int, bool]:
    """Compare greedy decoding with the stored tokens.

    Returns:
        How many tokens match before the first difference, over all prompts; and whether each first difference (if any) lies
        at a step whose two best logits were within the tolerance, as other kernels may order them otherwise.
    """
    matched, excusable = 0, True
    for text, golden, margins in _written(goldens, format):
        found, _ = greedy_tokens(model, list(text.tokens[: text.start]), len(golden))
        same = _common_prefix(golden, found)
        matched += same
        if same < len(golden):
            excusable = excusable and margins[same] <= MARGIN_TOLERANCE
    return matched, excusable


def reference_match(reference: LoadedModel, goldens: Goldens, format: str) -> int:
    """How many of a program's greedy tokens the reference would have written too before the first difference, over all prompts.

    The reference reads them and is asked at each what it would have written: until they part, that is its own text.
    """
    import numpy as np

    matched = 0
    for text, golden, _ in _written(goldens, format):
        tokens = np.asarray([*text.tokens[: text.start], *golden[:-1]], np.int64)
        with closing(reference.backend.decoder()) as decoder:
            logits = decoder.forward(tokens, rows=len(golden), rope_length=text.start + len(golden))
            matched += _common_prefix(golden, logits.argmax(-1).tolist())
    return matched


def _written(goldens: Goldens, format: str) -> Iterator[tuple[GoldenText, tuple[int, ...], tuple[float, ...]]]:
    """The texts from whose prompts a program went on, with its tokens and their margins."""
    for text, golden, margins in zip(goldens.texts, goldens.greedy[format], goldens.margins[format], strict=True):
        if golden:
            yield text, golden, margins


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _top(log_probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """The most probable tokens of each row, best first (equal ones by their number)."""
    import numpy as np

    count = min(TOP_TOKENS, log_probabilities.shape[-1])
    found = np.sort(np.argpartition(-log_probabilities, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(log_probabilities, found, -1), axis=-1, kind="stable")
    best: NDArray[np.int64] = np.take_along_axis(found, order, -1)
    return best


def _divergence_of_top(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    smallest = 1e-12  # both sides' probability of all other tokens; rounding may take it under zero
    rest_expected = np.maximum(1 - np.exp(expected).sum(-1), smallest)
    rest_found = np.maximum(1 - np.exp(found).sum(-1), smallest)
    stored = (np.exp(expected) * (expected - found)).sum(-1)
    return np.asarray(stored + rest_expected * np.log(rest_expected / rest_found))
