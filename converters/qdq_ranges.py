"""Calibration: between which bounds each value of the static graph lies on texts that the model wrote.

The graph's own float rendering is run, one layer at a time over all texts, so that memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from edgekit.calibration import THREADS
from edgekit.config import ModelConfig
from edgekit.errors import ConversionError
from edgekit.progress import Progress, ProgressFn
from edgekit.source import Source, part_shapes
from edgekit.staging import working_directory, writable

from .layer_run import embed_tokens, told_as_conversion_errors
from .layer_weights import LayerWeights
from .qdq_graph import Encoding, FloatCanvas
from .qdq_layers import (
    HIDDEN,
    MASK_RANGE,
    PROBABILITIES,
    LayerEmitter,
    StaticSize,
    cosine_name,
    distinct_ropes,
    mask_name,
    rotation_range,
    sine_name,
)
from .rope import rope_tables
from .weight_writer import open_region_file

__all__ = ["calibrated_encodings"]

# What a hidden score lies under the smallest seen one: e^-20 of its weight would be left.
HIDDEN_SCORE = 20.0
# Ranges are this much wider than on the texts seen: half a step's loss in exchange for fewer clipped values.
HEADROOM = 1.1
NEVER_SEEN = -1e6
WITHOUT_CALIBRATION = "use --format onnx, which need not be calibrated"
_DATA = "layer.onnx.data"
_CACHE_BITS = 8
Floats = NDArray[np.float32]
Bounds = dict[str, tuple[float, float]]


def calibrated_encodings(
    source: Source,
    texts: Sequence[Sequence[int]],
    weights: LayerWeights,
    place: Path,
    *,
    on_progress: ProgressFn | None = None,
) -> dict[str, Encoding]:
    """The encoding of every range.

    Args:
        texts: Token ids to calibrate on.
        weights: The layers'.
        place: Where a layer's float32 weights may lie for a while.

    Raises:
        SourceError: A weight is not a finite number.
        ConversionError: A layer does not run, or computes values that are not finite numbers.
    """
    config = source.config
    bounds: Bounds = {}
    states = [embed_tokens(source.parts["embedding"], np.asarray(text, np.int64), config) for text in texts]
    if weights.basis:
        states = [weights.basis.enter(state) for state in states]
    _widen(bounds, HIDDEN, states)
    for index in range(len(config.layers)):
        with working_directory(writable(place)) as folder:
            states = _run_layer(source, index, states, weights, folder, bounds)
        if on_progress:
            on_progress(Progress("calibrate", index + 1, len(config.layers), "layers"))
    return _encodings(config, bounds)


def _run_layer(
    source: Source, index: int, states: list[Floats], weights: LayerWeights, folder: Path, bounds: Bounds
) -> list[Floats]:
    """The hidden states after a layer; `bounds` grow by those of its values."""
    config = source.config
    canvas = FloatCanvas(_DATA, part_shapes(config))
    output = LayerEmitter(config, canvas, StaticSize("new", 0), weights.vector).emit([index])
    names = [value for value in canvas.range_of if value not in {item.name for item in canvas.builder.inputs}]
    for name in names:
        canvas.builder.output(name, TensorProto.FLOAT, None)
    with open_region_file(folder / _DATA, canvas.builder.data_bytes) as file:
        for role, region in canvas.roles.items():
            file.write_rows(region, 0, weights.matrix(role))
    program = folder / "layer.onnx"
    program.write_bytes(canvas.builder.model(config.model_type).SerializeToString(deterministic=True))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, THREADS
    after = []
    with told_as_conversion_errors(index, WITHOUT_CALIBRATION):
        session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        for state in states:
            found = dict(zip(names, session.run(names, _feeds(config, index, state)), strict=True))
            for name, values in found.items():
                # Of the scores only those count that are seen.
                counted = values[values > NEVER_SEEN / 2] if name.endswith(".masked") else values
                _widen(bounds, canvas.range_of[name], [counted])
            after.append(found[output])
    return after


def _feeds(config: ModelConfig, index: int, state: Floats) -> dict[str, Floats]:
    """A whole text at once, from position 0 on."""
    layer, length = config.layers[index], len(state)
    places = np.arange(length)
    behind = places[:, None] - places
    seen = (behind >= 0) & ((behind < layer.window) | (layer.window == 0))
    feeds = {HIDDEN: state, mask_name(layer.window): np.where(seen, 0, NEVER_SEEN).astype(np.float32)}
    if layer.rope:
        number = distinct_ropes(config).index(layer.rope)
        cosine, sine = rope_tables(layer.rope, length)
        feeds |= {cosine_name(number): cosine[:length, None], sine_name(number): sine[:length, None]}
    return feeds


def _widen(bounds: Bounds, name: str, arrays: Sequence[Floats]) -> None:
    for values in arrays:
        least, most = float(values.min()), float(values.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ConversionError(f"{name} has values that are not finite numbers", hint=WITHOUT_CALIBRATION)
        low, high = bounds.get(name, (0.0, 0.0))
        bounds[name] = min(low, least), max(high, most)


def _encodings(config: ModelConfig, bounds: Bounds) -> dict[str, Encoding]:
    kept = {f"layers.{index}.{part}" for index in range(len(config.layers)) for part in ("key_cache", "value_cache")}
    encodings = {}
    for name, (low, high) in bounds.items():
        wider = low * HEADROOM, high * HEADROOM
        # What is kept has one zero point in all layers: runtimes fill empty places with it.
        encodings[name] = Encoding.centred(*wider, _CACHE_BITS) if name in kept else Encoding.of_range(*wider)
    depth = 0.0
    for index in range(len(config.layers)):
        name = f"layers.{index}.{'scores' if config.attention.softcap else 'products'}"
        scores = encodings[name] = encodings[f"layers.{index}.masked"]
        encodings[f"layers.{index}.masked"] = Encoding.of_range(scores.low - HIDDEN_SCORE, scores.high)
        depth = max(depth, scores.high - scores.low + HIDDEN_SCORE)
    for number, rope in enumerate(distinct_ropes(config)):
        encodings[rotation_range(number)] = Encoding.of_range(-rope.attention_factor, rope.attention_factor)
    fixed = {f"layers.{index}.sigmoid" for index in range(len(config.layers))} | {PROBABILITIES}
    encodings |= dict.fromkeys(fixed, Encoding.of_range(0, 1))
    return encodings | {MASK_RANGE: Encoding.of_range(-depth, 0)}
