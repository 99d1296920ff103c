"""Calibration: what each matrix of a decoder is multiplied with on given texts, one layer at a time.

Each layer is run by ONNX Runtime in full precision on the hidden states that the layer before left. So memory holds the hidden
states of the texts, and besides, in turn: one layer in float32 with its second moments (float64 [columns, columns] of each
matrix), those with what preparing the largest takes (two copies of it more), and one layer's guides (half as large as the
moments) while its matrices are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ConversionError
from edgekit.progress import Progress, ProgressFn
from edgekit.source import Source

from .gptq import RoundingGuide, make_guide
from .layer_run import WITHOUT_CALIBRATION, embed_tokens, open_layer

__all__ = ["rounding_guides", "second_moments"]

Floats = NDArray[np.float32]


def rounding_guides(
    source: Source, texts: Sequence[Sequence[int]], place: Path, roles: frozenset[str]
) -> Iterator[Mapping[str, RoundingGuide]]:
    """How to round the matrices of each layer, by role, and at last the head; see `second_moments`.

    Raises:
        SourceError, ConversionError: See there; or memory does not suffice.
    """
    try:
        for moments in second_moments(source, texts, place, roles):
            yield {role: make_guide(moments.pop(role)) for role in list(moments)}
    except MemoryError as error:
        raise ConversionError("not enough memory to calibrate", hint=WITHOUT_CALIBRATION) from error


def second_moments(
    source: Source,
    texts: Sequence[Sequence[int]],
    place: Path,
    roles: frozenset[str],
    *,
    stage: str = "",
    on_progress: ProgressFn | None = None,
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Sums of products of each pair of inputs, float64 [columns, columns], of the matrices of each layer, by role, and at last
    of the head (which is the embedding where they are tied). Each mapping is the receiver's alone.

    Args:
        source: The checkpoint.
        texts: Token ids.
        place: Where one layer's weights in float32 are written aside.
        roles: Those that are asked for; layers after the last of them are not run.
        stage: What progress is called.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: A layer does not run, or computes values that are too large.
    """
    config = source.config
    context = max(map(len, texts))
    states = [embed_tokens(source.parts["embedding"], np.asarray(text, np.int64), source.config) for text in texts]
    normed = states
    # Both, where they are tied but stored apart; an embedding that is not the head is only looked up.
    head = roles & ({"embedding", "head"} if config.tied_embeddings else {"head"})
    last = len(config.layers) - 1 if head else max(int(role.split(".")[1]) for role in roles)
    for index in range(last + 1):
        moments, states, normed = _run_layer(source, index, roles, states, context, place)
        _check(moments)
        if on_progress:
            on_progress(Progress(stage, index + 1, last + 1, "layers"))
        if moments:
            yield moments
        del moments
    for role in head:
        total = np.zeros((config.hidden_size, config.hidden_size))
        for rows in normed:
            _add_products(rows, total)
        _check({role: total})
        yield {role: total}


def _run_layer(
    source: Source, index: int, roles: frozenset[str], states: list[Floats], context: int, place: Path
) -> tuple[dict[str, NDArray[np.float64]], list[Floats], list[Floats]]:
    """Second moments of the layer's inputs by role, the hidden states after it, and those normed for what follows."""
    moments: dict[str, NDArray[np.float64]] = {}
    after, normed = [], []
    with open_layer(source, index, place, context=context) as layer:
        for state in states:
            found = layer.run(state, keep=roles)
            after.append(found.residual)
            normed.append(found.normed)
            for role, rows in found.factors.items():
                _add_products(rows, moments.setdefault(role, np.zeros((rows.shape[1], rows.shape[1]))))
    return moments, after, normed


def _add_products(rows: Floats, total: NDArray[np.float64]) -> None:
    """Add the products of each pair of columns, summed over the rows, to float64 [columns, columns]."""
    with np.errstate(over="ignore", invalid="ignore"):  # `_check` tells
        total += rows.T @ rows


def _check(moments: Mapping[str, NDArray[np.float64]]) -> None:
    for role, total in moments.items():
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(total.sum())
        if not finite:
            raise ConversionError(f"{role} sees values too large to calibrate on", hint=WITHOUT_CALIBRATION)
