"""ONNX for NPUs: graphs of static shape in which every value is quantized.

Weights are whole numbers of 8 or 4 bits, activations of 16, keys and values of 8. One graph takes a chunk of the prompt, one a
single token; both multiply with the same weight file. What comes before and after the layers are graphs for the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from edgekit.config import ModelConfig
from edgekit.errors import ConversionError
from edgekit.graph import CacheLayout, Graph, TensorReport
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

from .layer_weights import LayerWeights
from .onnx_decoder import FIRST_POSITION, INPUTS, OUTPUTS, ROPE_LENGTH
from .onnx_graph import count_operators
from .qdq_ends import PAST_LENGTH, RESIDUAL, emit_ends
from .qdq_graph import Encoding, QdqCanvas
from .qdq_layers import PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE, LayerEmitter, StaticSize
from .qdq_ranges import calibrated_encodings
from .qdq_weights import write_matrices
from .weight_writer import write_weights

__all__ = ["CHUNK", "export"]

CHUNK = 128  # what Qualcomm's own exports take at a time
FOLDER, LAYERS, ENDS = "onnx-qdq", "layers.data", "ends.data"
GRAPHS = ("embedding", "prefill", "decode", "head")


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the graphs and their weights into `directory`/onnx-qdq.

    Args:
        texts: Token ids to calibrate on.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: There are no texts, or the files can't be written.
    """
    config = source.config
    if not texts:
        raise ConversionError(
            "NPU graphs are calibrated on texts, and there are none", hint="this is EdgeKit's mistake"
        )
    folder = directory / FOLDER
    folder.mkdir(parents=True)
    weights = LayerWeights(source)
    encodings = calibrated_encodings(source, texts, weights, directory.parent, on_progress=on_progress)
    chunk = min(CHUNK, plan.context)
    operators = {}
    for name, new in (("prefill", chunk), ("decode", 1)):
        canvas = _draw_layers(config, plan, encodings, new, weights)
        operators[name] = _save(canvas.builder.model(f"{config.model_type}_{name}"), folder / f"{name}.onnx")
    matrices = write_matrices(
        folder / LAYERS, canvas.builder.data_bytes, canvas.matrices, source.parts, weights, on_progress=on_progress
    )
    ends = emit_ends(
        config, plan.weights, encodings, weights.basis,
        context=plan.context, chunk=chunk, accuracy_level=plan.accuracy_level, data_file=ENDS,
    )  # fmt: skip
    rest = write_weights(folder / ENDS, ends.weights, config, plan.weights, source.parts, on_progress=on_progress)
    for name, builder in (("embedding", ends.first), ("head", ends.last)):
        operators[name] = _save(builder.model(f"{config.model_type}_{name}"), folder / f"{name}.onnx")
    return replace(
        _graph(config, plan, chunk, (*rest, *matrices)),
        operators={name: operators[name] for name in GRAPHS},
        delegated={"npu": _sum(operators, "prefill", "decode"), "": _sum(operators, "embedding", "head")},
    )


def _sum(operators: Mapping[str, Mapping[str, int]], *graphs: str) -> int:
    return sum(count for name in graphs for count in operators[name].values())


def _draw_layers(
    config: ModelConfig, plan: Plan, encodings: Mapping[str, Encoding], new: int, weights: LayerWeights
) -> QdqCanvas:
    formats = {role: weight.format for role, weight in plan.weights.items()}
    canvas = QdqCanvas(LAYERS, encodings, formats)
    emitter = LayerEmitter(config, canvas, StaticSize(new, plan.context), weights.vector)
    residual = emitter.emit(range(len(config.layers)))
    canvas.output(canvas.move("Identity", [residual], RESIDUAL), [new, config.hidden_size])
    return canvas


def _save(program: onnx.ModelProto, path: Path) -> dict[str, int]:
    """Write a graph; how often it has each operator."""
    path.write_bytes(program.SerializeToString(deterministic=True))
    return count_operators(program)


def _graph(config: ModelConfig, plan: Plan, chunk: int, weights: tuple[TensorReport, ...]) -> Graph:
    inputs = {"tokens": INPUTS["tokens"], "past_length": PAST_LENGTH, "logits_start": INPUTS["logits_start"]}
    if config.longrope_switch:
        inputs["rope_length"] = ROPE_LENGTH
    if config.positions(plan.context):
        inputs["first_position"] = FIRST_POSITION
    attention = config.attention
    return Graph(
        format="onnx-qdq",
        files=tuple(f"{FOLDER}/{name}" for name in (*(f"{graph}.onnx" for graph in GRAPHS), LAYERS, ENDS)),
        inputs=inputs,
        outputs=OUTPUTS,
        cache=CacheLayout(
            len(config.layers), attention.kv_heads, attention.head_dim, "uint8",
            PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE, keys_transposed=True,
        ),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch,
        weights=weights,
        window=config.window,
        positions=config.positions(plan.context),
        chunk=chunk,
    )  # fmt: skip
