"""ONNX: a program for ONNX Runtime, written straight from the description of the decoder. No PyTorch, no tracing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekit.cache_scales import find_cache_scales
from edgekit.config import ModelConfig
from edgekit.graph import Graph
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

from .onnx_decoder import FIRST_POSITION, INPUTS, OUTPUTS, ROPE_LENGTH, EmittedDecoder, cache_layout, emit_decoder
from .onnx_graph import count_operators
from .stored_weights import tuned_source
from .weight_writer import write_weights

__all__ = ["export", "program_bytes"]

PROGRAM, WEIGHTS = "model.onnx", "model.onnx.data"


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the program and its weights into `directory`/onnx.

    Args:
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: The files can't be written.
    """
    config = source.config
    folder = directory / "onnx"
    folder.mkdir(parents=True)
    emitted = _emit(config, plan)
    source, guides = tuned_source(source, plan, texts, directory.parent, on_progress=on_progress)
    ranged = find_cache_scales(source, plan, texts, directory, on_progress=on_progress) if emitted.cache_scales else ()
    weights = write_weights(
        folder / WEIGHTS, emitted, config, plan.weights, source.parts,
        rounding=plan.scheme.rounding, guides=guides, cache_scales=ranged, on_progress=on_progress,
    )  # fmt: skip
    program = emitted.builder.model(config.model_type)
    (folder / PROGRAM).write_bytes(program.SerializeToString(deterministic=True))
    return Graph(
        format="onnx",
        files=(f"onnx/{PROGRAM}", f"onnx/{WEIGHTS}"),
        inputs=_inputs(config, plan.context),
        outputs=OUTPUTS,
        cache=cache_layout(config, plan.cache),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch,
        weights=weights,
        window=config.window,
        positions=config.positions(plan.context),
        operators={"main": count_operators(program)},
    )


def program_bytes(source: Source, plan: Plan) -> int:
    """Size of the files that `export` would write."""
    emitted = _emit(source.config, plan)
    return int(emitted.builder.data_bytes + emitted.builder.model(source.config.model_type).ByteSize())


def _emit(config: ModelConfig, plan: Plan) -> EmittedDecoder:
    return emit_decoder(
        config,
        plan.weights,
        context=plan.context,
        activation_bits=plan.scheme.activation_bits,
        accuracy_level=plan.accuracy_level,
        data_file=WEIGHTS,
        cache=plan.cache,
    )


def _inputs(config: ModelConfig, context: int) -> dict[str, str]:
    """The program's inputs by meaning."""
    inputs = dict(INPUTS)
    if config.longrope_switch:
        inputs["rope_length"] = ROPE_LENGTH
    if config.positions(context):
        inputs["first_position"] = FIRST_POSITION
    return inputs
