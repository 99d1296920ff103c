"""Calibration: what each matrix of a decoder is multiplied with on given texts, one layer at a time.

Each layer is run by ONNX Runtime in full precision on the hidden states that the layer before left. So memory holds the hidden
states of the texts, and besides, in turn: one layer in float32 with its second moments (float64 [columns, columns] of each
matrix), those with what preparing the largest takes (two copies of it more), and one layer's guides (half as large as the
moments) while its matrices are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.calibration import THREADS
from edgekit.config import ModelConfig
from edgekit.errors import ConversionError
from edgekit.plan import WeightPlan
from edgekit.quant import WeightFormat
from edgekit.source import Source, Tensor, part_shapes
from edgekit.staging import working_directory, writable

from .gptq import RoundingGuide, make_guide
from .onnx_decoder import FIRST_POSITION, HIDDEN, INPUTS, ROPE_LENGTH, cache_layout, emit_layer
from .weight_writer import write_weights

__all__ = ["rounding_guides", "second_moments"]

_DATA = "layer.data"
_QUIET = 3
_ROWS_AT_ONCE = 4096
_WITHOUT_CALIBRATION = "use --quant int4, which needs none"

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
        raise ConversionError("not enough memory to calibrate", hint=_WITHOUT_CALIBRATION) from error


def second_moments(
    source: Source, texts: Sequence[Sequence[int]], place: Path, roles: frozenset[str]
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Sums of products of each pair of inputs, float64 [columns, columns], of the matrices of each layer, by role, and at last
    of the head (which is the embedding where they are tied). Each mapping is the receiver's alone.

    Args:
        source: The checkpoint.
        texts: Token ids.
        place: Where one layer's weights in float32 are written aside.
        roles: Those that are asked for; layers after the last of them are not run.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: A layer does not run, or computes values that are too large.
    """
    config = source.config
    context = max(map(len, texts))
    states = [embed_tokens(source.parts["embedding"], np.asarray(text, np.int64), config) for text in texts]
    normed = states
    head = roles & {"embedding" if config.tied_embeddings else "head"}
    last = len(config.layers) - 1 if head else max(int(role.split(".")[1]) for role in roles)
    for index in range(last + 1):
        with working_directory(writable(place)) as folder:
            moments, states, normed = _run_layer(source, index, roles, states, context, folder)
        _check(moments)
        if moments:
            yield moments
        del moments
    for role in head:
        total = np.zeros((config.hidden_size, config.hidden_size))
        for rows in normed:
            _add_products(rows, total)
        _check({role: total})
        yield {role: total}


def embed_tokens(tensors: tuple[Tensor, ...], tokens: NDArray[np.int64], config: ModelConfig) -> Floats:
    """Rows of the embedding, float32 [tokens, hidden]; the table is read in parts."""
    (table,) = tensors
    found = np.empty((len(tokens), table.shape[1]), np.float32)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        here = np.flatnonzero((tokens >= start) & (tokens < start + _ROWS_AT_ONCE))
        if len(here):
            found[here] = table.read(start, min(start + _ROWS_AT_ONCE, table.shape[0]))[tokens[here] - start]
    return found * np.float32(config.embedding_scale)


def _run_layer(
    source: Source, index: int, roles: frozenset[str], states: list[Floats], context: int, folder: Path
) -> tuple[dict[str, NDArray[np.float64]], list[Floats], list[Floats]]:
    """Second moments of the layer's inputs by role, the hidden states after it, and those normed for what follows."""
    config = source.config
    plans = {role: WeightPlan(shape, WeightFormat(32)) for role, shape in part_shapes(config).items()}
    emitted, residual, normed = emit_layer(config, plans, index, context=context, data_file=_DATA)
    write_weights(folder / _DATA, emitted, config, plans, source.parts)
    program = folder / "layer.onnx"
    program.write_bytes(emitted.builder.model(config.model_type).SerializeToString(deterministic=True))
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = THREADS
    with told_as_conversion_errors(index):
        session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    factors = {role: name for role, name in emitted.factors.items() if role in roles}
    names = list(dict.fromkeys([residual, normed, *factors.values()]))
    columns = {role: plans[role].shape[1] for role in factors}
    moments = {role: np.zeros((size, size)) for role, size in columns.items()}
    after, normed_after = [], []
    for state in states:
        with told_as_conversion_errors(index):
            found = dict(zip(names, session.run(names, _feeds(config, index, state, session)), strict=True))
        after.append(found[residual][0])
        normed_after.append(found[normed][0])
        for role, name in factors.items():
            _add_products(found[name][0], moments[role])
    return moments, after, normed_after


@contextmanager
def told_as_conversion_errors(index: int) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's errors share no base class but this
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"layer {index} does not run: {first_line}", hint=_WITHOUT_CALIBRATION) from error


def _feeds(config: ModelConfig, index: int, state: Floats, session: Any) -> dict[str, Any]:
    layout, length = cache_layout(config, 32), len(state)
    empty = np.zeros((1, layout.kv_heads, length, layout.head_dim), np.float32)
    feeds = {
        INPUTS["tokens"]: np.zeros((1, length), np.int64),
        INPUTS["length"]: np.array(length, np.int32),
        INPUTS["logits_start"]: np.zeros(1, np.int64),
        ROPE_LENGTH: np.array(length, np.int64),
        FIRST_POSITION: np.array(0, np.int64),
        HIDDEN: state[None],
    } | {name.replace("{}", str(index)): empty for name in layout.past}
    declared = {value.name for value in session.get_inputs()}
    return {name: value for name, value in feeds.items() if name in declared}


def _add_products(rows: Floats, total: NDArray[np.float64]) -> None:
    """Add the products of each pair of columns, summed over the rows, to float64 [columns, columns]."""
    with np.errstate(over="ignore", invalid="ignore"):  # `_check` tells
        total += rows.T @ rows


def _check(moments: Mapping[str, NDArray[np.float64]]) -> None:
    for role, total in moments.items():
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(total.sum())
        if not finite:
            raise ConversionError(f"{role} sees values too large to calibrate on", hint=_WITHOUT_CALIBRATION)
