"""ONNX: a program for ONNX Runtime, written straight from the description of the decoder. No PyTorch, no tracing."""

from __future__ import annotations

from pathlib import Path

from edgekit.config import ModelConfig
from edgekit.errors import UnsupportedError
from edgekit.graph import Graph
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

from .onnx_decoder import FIRST_POSITION, INPUTS, OUTPUTS, ROPE_LENGTH, cache_layout, emit_decoder
from .weight_writer import write_weights

__all__ = ["export"]

PROGRAM, WEIGHTS = "model.onnx", "model.onnx.data"
HEAD_MULTIPLE = 16


def export(source: Source, plan: Plan, directory: Path, *, on_progress: ProgressFn | None = None) -> Graph:
    """Write the program and its weights into `directory`/onnx.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        UnsupportedError: ONNX Runtime does not run such a model.
        ConversionError: The files can't be written.
    """
    config, bits = source.config, plan.scheme.activation_bits
    _check_head_sizes(config)
    folder = directory / "onnx"
    folder.mkdir(parents=True)
    emitted = emit_decoder(
        config,
        plan.weights,
        context=plan.context,
        activation_bits=bits,
        accuracy_level=plan.accuracy_level,
        data_file=WEIGHTS,
    )
    weights = write_weights(folder / WEIGHTS, emitted, config, plan.weights, source.parts, on_progress=on_progress)
    program = emitted.builder.model(config.model_type).SerializeToString(deterministic=True)
    (folder / PROGRAM).write_bytes(program)
    inputs = dict(INPUTS)
    if config.longrope_switch:
        inputs["rope_length"] = ROPE_LENGTH
    if config.positions(plan.context):
        inputs["first_position"] = FIRST_POSITION
    return Graph(
        format="onnx",
        files=(f"onnx/{PROGRAM}", f"onnx/{WEIGHTS}"),
        inputs=inputs,
        outputs=OUTPUTS,
        cache=cache_layout(config, bits),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch,
        weights=weights,
        window=config.window,
        positions=config.positions(plan.context),
    )


def _check_head_sizes(config: ModelConfig) -> None:
    """ONNX Runtime's attention rotates in vectors of 8 pairs and would refuse other sizes only when it runs."""
    head_dim = config.attention.head_dim
    rotated = {layer.rope.dim for layer in config.layers if layer.rope}
    if rotated and (head_dim % HEAD_MULTIPLE or any(dim % HEAD_MULTIPLE for dim in rotated)):
        raise UnsupportedError(
            f"heads of {head_dim} with {max(rotated)} rotated dimensions are not run by ONNX Runtime",
            hint=f"both must be multiples of {HEAD_MULTIPLE}",
        )
