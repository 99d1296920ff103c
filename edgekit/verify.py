"""Verification: a program is run and compared with the full-precision reference before a bundle is called good.

Program and reference see the same tokens: the texts that the model wrote (`edgekit.goldens`), and a user's own text
(`edgekit.own_text`). `edgekit.divergence` says what the figures are. What the program wrote says nothing about its
perplexity: that is measured on a user's text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.divergence import Divergence, Figures, log_probabilities
from edgekit.goldens import MARGIN_TOLERANCE, Goldens, GoldenText, greedy_tokens
from edgekit.progress import Progress, ProgressFn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.engine import LoadedModel

__all__ = ["compare", "compare_on_text", "compare_with_goldens", "greedy_match"]

TOP_TOKENS = 64
ROWS = 64  # positions whose logits are held at a time
UNIT = 32  # positions that intervals are drawn by: one text's neighbours are alike


def compare(
    model: LoadedModel, reference: LoadedModel, goldens: Goldens, *, on_progress: ProgressFn | None = None
) -> tuple[Figures, Goldens]:
    """Compare a program with the reference on the goldens' texts.

    Returns:
        The figures, and the goldens with the reference's most probable tokens.
    """
    import numpy as np

    divergence, tokens, kept = Divergence(), list[tuple[int, ...]](), list[tuple[float, ...]]()
    for number, text in enumerate(goldens.texts):
        for expected in _add_text(divergence, model, reference, text):
            top = _top(expected)
            tokens.extend(tuple(row) for row in top.tolist())
            kept.extend(tuple(row) for row in np.take_along_axis(expected, top, -1).round(4).tolist())
        if on_progress:
            on_progress(Progress("compare", number + 1, len(goldens.texts), "texts"))
    completed = replace(goldens, top_tokens=tuple(tokens), top_log_probabilities=tuple(kept))
    return divergence.figures().rounded(), completed


def compare_on_text(
    model: LoadedModel,
    reference: LoadedModel,
    texts: Sequence[GoldenText],
    *,
    on_progress: ProgressFn | None = None,
) -> Divergence:
    """Compare a program with the reference on windows of a text that neither wrote."""
    divergence = Divergence()
    for number, text in enumerate(texts):
        for _ in _add_text(divergence, model, reference, text):
            pass
        if on_progress:
            on_progress(Progress("compare", number + 1, len(texts), "windows"))
    return divergence


def compare_with_goldens(model: LoadedModel, goldens: Goldens) -> Figures | None:
    """Compare a program with the reference's stored log-probabilities; None where the bundle holds none.

    The KL is over the stored tokens and all others as one, which is at most the whole KL.
    """
    import numpy as np

    if not goldens.top_tokens:
        return None
    divergence, first = Divergence(), 0
    for text in goldens.texts:
        for found in _log_probabilities(model, text):
            rows = slice(first, first + len(found))
            top = np.asarray(goldens.top_tokens[rows])
            expected = np.asarray(goldens.top_log_probabilities[rows], np.float64)
            kl = _divergence_of_top(expected, np.take_along_axis(found, top, -1))
            same = found.argmax(-1) == top[:, 0]
            for unit in _units(len(found)):
                divergence.add_compared(kl[unit], same[unit], np.exp(expected[unit, 0]))
            first += len(found)
    return divergence.figures().rounded()


def _add_text(
    divergence: Divergence, model: LoadedModel, reference: LoadedModel, text: GoldenText
) -> Iterator[NDArray[np.float64]]:
    """Compare one text; yields the reference's log-probabilities, some rows at a time."""
    import numpy as np

    tokens, first = np.asarray(text.tokens, np.int64), text.start
    for found, expected in zip(_log_probabilities(model, text), _log_probabilities(reference, text), strict=True):
        followers = tokens[first : first + len(found)]
        for unit in _units(len(found)):
            divergence.add(expected[unit], found[unit], followers[unit])
        first += len(found)
        yield expected


def _units(rows: int) -> Iterator[slice]:
    return (slice(start, start + UNIT) for start in range(0, rows, UNIT))


def greedy_match(model: LoadedModel, goldens: Goldens, format: str) -> tuple[int, bool]:
    """Compare greedy decoding with the stored tokens.

    Returns:
        How many tokens match before the first difference, over all prompts; and whether each first difference (if any) lies
        at a step whose two best logits were within the tolerance, as other kernels may order them otherwise.
    """
    matched, excusable = 0, True
    for text, golden, margins in zip(goldens.texts, goldens.greedy[format], goldens.margins[format], strict=True):
        found, _ = greedy_tokens(model, list(text.tokens[: text.start]), len(golden))
        same = _common_prefix(golden, found)
        matched += same
        if same < len(golden):
            excusable = excusable and margins[same] <= MARGIN_TOLERANCE
    return matched, excusable


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _log_probabilities(model: LoadedModel, text: GoldenText) -> Iterator[NDArray[np.float64]]:
    """Log-probabilities [rows, vocabulary] of the positions that predict the written tokens, some rows at a time."""
    import numpy as np

    decoder, tokens = model.backend.decoder(), np.asarray(text.tokens[:-1], np.int64)
    first = text.start - 1
    if first:
        decoder.forward(tokens[:first], rows=1, rope_length=len(text.tokens))
    for start in range(first, len(tokens), ROWS):
        part = tokens[start : start + ROWS]
        yield log_probabilities(decoder.forward(part, rows=len(part), rope_length=len(text.tokens)))


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
