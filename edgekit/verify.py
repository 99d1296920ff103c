"""Verification: a program is run and compared with the full-precision reference before a bundle is called good.

Program and reference see the same tokens (`edgekit.goldens`). Mean KL divergence (reference against program, in nats, over the
whole vocabulary) and top-1 agreement are taken over the positions that the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit.goldens import MARGIN_TOLERANCE, Goldens, GoldenText, greedy_tokens
from edgekit.progress import Progress, ProgressFn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.engine import LoadedModel

__all__ = ["Comparison", "compare", "compare_with_goldens", "greedy_match"]

TOP_TOKENS = 64
ROWS = 64  # positions whose logits are held at a time


@dataclass(frozen=True, slots=True)
class Comparison:
    """A program against the reference. KL in nats; agreement is the share of positions with the same best token."""

    positions: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float


def compare(
    model: LoadedModel, reference: LoadedModel, goldens: Goldens, *, on_progress: ProgressFn | None = None
) -> tuple[Comparison, Goldens]:
    """Compare a program with the reference on the goldens' texts.

    Returns:
        The comparison, and the goldens with the reference's most probable tokens.
    """
    import numpy as np

    divergences, agreements, tokens, kept = [], [], list[tuple[int, ...]](), list[tuple[float, ...]]()
    for number, text in enumerate(goldens.texts):
        pairs = zip(_log_probabilities(model, text), _log_probabilities(reference, text), strict=True)
        for found, expected in pairs:
            divergences.append((np.exp(expected) * (expected - found)).sum(-1))
            agreements.append(found.argmax(-1) == expected.argmax(-1))
            top = _top(expected)
            tokens.extend(tuple(row) for row in top.tolist())
            kept.extend(tuple(row) for row in np.take_along_axis(expected, top, -1).round(4).tolist())
        if on_progress:
            on_progress(Progress("compare", number + 1, len(goldens.texts), "texts"))
    completed = replace(goldens, top_tokens=tuple(tokens), top_log_probabilities=tuple(kept))
    return _comparison(divergences, agreements), completed


def compare_with_goldens(model: LoadedModel, goldens: Goldens) -> Comparison | None:
    """Compare a program with the reference's stored log-probabilities; None where the bundle holds none.

    The KL is over the stored tokens and all others as one, which is at most the whole KL.
    """
    import numpy as np

    if not goldens.top_tokens:
        return None
    divergences, agreements, first = [], [], 0
    for text in goldens.texts:
        for found in _log_probabilities(model, text):
            rows = slice(first, first + len(found))
            top = np.asarray(goldens.top_tokens[rows])
            expected = np.asarray(goldens.top_log_probabilities[rows], np.float64)
            divergences.append(_divergence_of_top(expected, np.take_along_axis(found, top, -1)))
            agreements.append(found.argmax(-1) == top[:, 0])
            first += len(found)
    return _comparison(divergences, agreements)


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
        logits = decoder.forward(part, rows=len(part), rope_length=len(text.tokens)).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


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


def _comparison(divergences: list[NDArray[np.float64]], agreements: list[NDArray[np.bool_]]) -> Comparison:
    """Rounded, so that the last bits of a sum do not change a bundle's bytes."""
    import numpy as np

    kl, same = np.concatenate(divergences), np.concatenate(agreements)
    mean, p99 = max(float(kl.mean()), 0.0), max(float(np.quantile(kl, 0.99)), 0.0)
    return Comparison(len(kl), float(f"{mean:.4g}"), float(f"{p99:.4g}"), round(float(same.mean()), 4))
