"""Core AI: an .aimodel for iOS and macOS 27, traced from the PyTorch decoder and lowered with coreai-torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekit.config import ModelConfig
from edgekit.graph import CacheLayout, Graph
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.quiet import quieted
from edgekit.source import Source

from .disk_space import check_space, writing
from .stored_weights import stored_weights
from .torch_decoder import TorchDecoder
from .torch_weights import load_weights
from .vendor_tools import lowering

with quieted():
    from coreai_torch import TorchConverter, get_decomp_table

    from .coreai_canonical import save_program
    from .coreai_ops import register_lowerings
    from .coreai_parts import CoreAIAttention, CoreAIParts, with_own_sizes

__all__ = ["export"]

# As Apple's own runtime for language models (apple/coreai-models, `CoreAILanguageModels`) looks for them.
PROGRAM = "model.aimodel"
INPUTS = {"tokens": "input_ids", "positions": "position_ids"}
ROPE_LENGTH = "rope_length"
OUTPUTS = {"logits": "logits"}
CACHES = ("keyCache", "valueCache")
FUNCTION = "main"


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the program into `directory`/coreai.

    Args:
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: Core AI's tools fail, or the files can't be written.
    """
    config = source.config
    check_space(directory, plan.memory.weights_bytes)
    dtype = torch.float32 if plan.scheme.format.bits == 32 else torch.float16
    stored = stored_weights(source, plan, directory.parent, texts=texts, on_progress=on_progress)
    sized = (with_own_sizes(weight, dtype) for weight in stored)
    weights = load_weights(sized, config, CoreAIParts(dtype, wide_residual=config.norm == "sandwich"))
    attention = CoreAIAttention(config, plan.context)
    decoder = TorchDecoder(config, weights, attention, context=plan.context, dtype=dtype, last_row=False)
    program = CachedProgram(decoder, attention)
    with lowering("Core AI", on_progress):
        files, operators = _lower(program, config, plan, directory / "coreai" / PROGRAM)
    return Graph(
        format="coreai",
        files=tuple(f"coreai/{PROGRAM}/{name}" for name in files),
        inputs=INPUTS | ({"rope_length": ROPE_LENGTH} if program.takes_rope_length else {}),
        outputs=OUTPUTS,
        cache=_layout(config, plan),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch if program.takes_rope_length else 0,
        weights=weights.reports,
        operators=operators,
    )


class CachedProgram(nn.Module):
    """The decoder as a program of tensors alone: caches are inputs that it changes, and what it must know is in the shapes.

    Positions are those of all tokens, of which the last are new: so Apple's runtime gives them.
    """

    def __init__(self, decoder: TorchDecoder, attention: CoreAIAttention) -> None:
        super().__init__()
        self.decoder, self.attention = decoder, attention
        self.takes_rope_length = bool(decoder.positions.switch)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, key_cache: Tensor, value_cache: Tensor,
        rope_length: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Append tokens.

        Args:
            input_ids: int32 [1, new].
            position_ids: int32 [1, tokens], from 0 on, of those in the cache and the new ones.
            key_cache, value_cache: [layers, 1, kv_heads, capacity, head_dim]; written to.
            rope_length: int32 [1]; see `TorchDecoder.forward`.

        Returns:
            Logits [1, new, vocabulary].
        """
        positions = self.attention.bind(key_cache, value_cache, position_ids, input_ids.shape[1])
        logits: Tensor = self.decoder(input_ids, positions, rope_length)
        for given, changed in zip((key_cache, value_cache), self.attention.take(), strict=True):
            given.copy_(changed)
        return logits


def _lower(
    program: CachedProgram, config: ModelConfig, plan: Plan, asset: Path
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Trace the program and write it; its files, and how often each function has each operator."""
    inputs, shapes = _example(config, plan, program.takes_rope_length)
    with torch.no_grad():
        exported = torch.export.export(program, inputs, dynamic_shapes=shapes)
        exported = exported.run_decompositions(get_decomp_table())
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    register_lowerings(converter)
    names = [*INPUTS.values()] + [ROPE_LENGTH] * program.takes_rope_length
    converter.add_exported_program(
        exported, input_names=names, output_names=[*OUTPUTS.values()], state_names=CACHES, entrypoint_name=FUNCTION
    )
    with writing(asset):
        return save_program(converter.to_coreai(), asset, f"{config.model_type} decoder, converted by EdgeKit")


def _example(config: ModelConfig, plan: Plan, takes_rope_length: bool) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """Inputs to trace with, and which of their sizes are known at run time only."""
    most = max(plan.context, 8)  # sizes of 1 and of the most would be taken for constants
    new, tokens, capacity = (torch.export.Dim(name, min=1, max=most) for name in ("new", "tokens", "capacity"))
    heads = config.attention
    cache = torch.zeros(
        len(config.layers), 1, heads.kv_heads, 7, heads.head_dim, dtype=getattr(torch, plan.cache.value)
    )
    inputs = (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32), cache, cache.clone())
    shapes = ({1: new}, {1: tokens}, {3: capacity}, {3: capacity})
    if takes_rope_length:
        return (*inputs, torch.zeros(1, dtype=torch.int32)), (*shapes, None)
    return inputs, shapes


def _layout(config: ModelConfig, plan: Plan) -> CacheLayout:
    heads, (key, value) = config.attention, CACHES
    return CacheLayout(len(config.layers), heads.kv_heads, heads.head_dim, plan.cache.value, key, value, key, value)
