"""ExecuTorch: a .pte for phones and small boards, whose products run in XNNPACK.

Its one method is what ExecuTorch's own LLM runners call, `forward(tokens, start_pos)`, and the methods without inputs say what
they ask a model for. Weights are whole numbers that the quantizer made; inputs of products are rounded to 8 bits as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgekit.config import ModelConfig
from edgekit.graph import CacheLayout, Graph, TensorReport
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

from .disk_space import check_space, writing
from .executorch_attention import KEY_CACHE, VALUE_CACHE, ComputedPositions, ExecutorchAttention
from .executorch_lowering import METHOD, Lowered, lower
from .executorch_parts import ExecutorchParts
from .stored_weights import stored_weights
from .torch_decoder import TorchDecoder
from .torch_weights import DecoderWeights, load_weights
from .vendor_tools import lowering

__all__ = ["CHUNK", "ROWS", "export"]

PROGRAM = "executorch/model.pte"
CHUNK = 256  # most tokens of one call: what lies between operators is planned for as many
SCORES_BYTES = 64 * 2**20  # and as many as a layer's scores over the whole context have room for in this
ROWS = 16  # most rows of logits of one call
TOKENS, START, ROPE_LENGTH = "tokens", "start_pos", "rope_length"


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the program into `directory`/executorch.

    Args:
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: ExecuTorch's tools fail, or the file can't be written.
    """
    config = source.config
    path = directory / PROGRAM
    check_space(directory, plan.memory.weights_bytes)
    path.parent.mkdir(parents=True)
    inputs = _inputs(config, plan.context)
    stored = stored_weights(source, plan, directory.parent, texts=texts, on_progress=on_progress)
    weights = load_weights(stored, config, ExecutorchParts())
    with lowering("ExecuTorch", on_progress), torch.no_grad(), writing(path):
        exported = _exported(ExecutorchDecoder(config, weights, plan.context), tuple(inputs.values()))
        lowered = lower(exported, _metadata(source, plan.context), path)
    return _graph(config, plan, inputs, weights.reports, lowered)


class ExecutorchDecoder(nn.Module):
    """The decoder as ExecuTorch's LLM runners call it: they want one row of logits, EdgeKit may want several.

    How many is told by the number of rows of the tokens, of which only the first is read: runners give one.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, context: int) -> None:
        super().__init__()
        self.chunk = _chunk(config, context)
        self.decoder = TorchDecoder(config, weights, ExecutorchAttention(config, context), context=context)
        self.decoder.positions = ComputedPositions(config, context, self.decoder.positions)

    def forward(self, tokens: Tensor, start_pos: Tensor, rope_length: Tensor | None = None) -> Tensor:
        """Append tokens to the cache.

        Args:
            tokens: int64 [rows, new]; the first row has the tokens, and `rows` is at most `new`.
            start_pos: int64 [1]: tokens that are in the cache.
            rope_length: int64 [1]: see `TorchDecoder`. Only programs whose context is longer than the rotary switch have it,
                and runners that do not know of it can't call those.

        Returns:
            Logits of the last `rows` tokens, float32 [1, rows, vocabulary].
        """
        rows, new = tokens.shape
        wanted = torch.arange(new - rows, new)
        logits: Tensor = self.decoder(tokens[:1], start_pos, rope_length, wanted)
        return logits


def _graph(
    config: ModelConfig, plan: Plan, inputs: dict[str, str], reports: tuple[TensorReport, ...], lowered: Lowered
) -> Graph:
    attention = config.attention
    return Graph(
        format="executorch",
        files=(PROGRAM,),
        inputs=inputs,
        outputs={"logits": "logits"},
        cache=CacheLayout(
            len(config.layers), attention.kv_heads, attention.head_dim, "float32",
            KEY_CACHE, VALUE_CACHE, KEY_CACHE, VALUE_CACHE,
        ),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch if "rope_length" in inputs else 0,
        weights=reports,
        window=config.window,
        chunk=_chunk(config, plan.context),
        operators={METHOD: lowered.operators},
        delegated=lowered.delegated,
    )  # fmt: skip


def _inputs(config: ModelConfig, context: int) -> dict[str, str]:
    """The method's inputs by meaning, in its order."""
    inputs = {"tokens": TOKENS, "past_length": START}
    return inputs | {"rope_length": ROPE_LENGTH} if 0 < config.longrope_switch < context else inputs


def _exported(decoder: ExecutorchDecoder, inputs: tuple[str, ...]) -> ExportedProgram:
    # An axis that is 1 in the example would be 1 for good.
    sizes = {0: Dim("rows", min=1, max=ROWS), 1: Dim("new", min=1, max=decoder.chunk)}
    return torch.export.export(
        decoder,
        tuple(torch.zeros((2, 3) if name == TOKENS else 1, dtype=torch.int64) for name in inputs),
        dynamic_shapes={name: sizes if name == TOKENS else None for name in inputs},
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _chunk(config: ModelConfig, context: int) -> int:
    """Most tokens of one call; the stock runners' prefill has pieces of as many."""
    room = SCORES_BYTES // (np.float32().nbytes * config.attention.heads * context)
    return min(context, CHUNK, max(room, ROWS))


def _metadata(source: Source, context: int) -> dict[str, Any]:
    """What ExecuTorch's LLM runners ask a program, by the names of its methods (its extension/llm/runner/constants.h)."""
    tokenizer, config = source.tokenizer, source.config
    known: dict[str, Any] = {
        "get_max_seq_len": _chunk(config, context),
        "get_max_context_len": context,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": len(config.layers),
        "get_eos_ids": list(tokenizer.eos_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return known if tokenizer.bos_token_id is None else known | {"get_bos_id": tokenizer.bos_token_id}
