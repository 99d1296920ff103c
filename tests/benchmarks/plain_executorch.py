"""A plain ExecuTorch export of a llama checkpoint: what a careful user gets from the vendors' own parts. Not a benchmark itself.

Transformers' own layers, with the cache in buffers and ExecuTorch's operators for attention; torchao's 4 bits in groups of
32 with 8-bit dynamic activations, an 8-bit embedding, an untied head; XNNPACK. EdgeKit's programs are measured beside it:

    python tests/benchmarks/plain_executorch.py HF_DIRECTORY OUT.pte [--context 2048] [--layers N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 - the operators that attention calls
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

GROUP = 32
_CHECK: Any = torch._check
_INT4: Any = vars(torch)["int4"]  # not in PyTorch's type hints


class Attention(nn.Module):
    """A layer's projections, with the cache in buffers and ExecuTorch's operators."""

    def __init__(self, layer: Any, config: Any, context: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.scale = layer, layer.head_dim, layer.scaling
        shape = (1, context, config.num_key_value_heads, layer.head_dim)
        self.keys, self.values = (nn.Buffer(torch.zeros(shape)) for _ in range(2))

    def forward(self, x: Any, rotation: tuple[Any, Any], start: Any) -> Any:
        """x [1, new, hidden] -> [1, new, hidden]."""
        new = x.shape[1]
        query, key, value = (
            part(x).view(1, new, -1, self.head_dim)
            for part in (self.layer.q_proj, self.layer.k_proj, self.layer.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation, unsqueeze_dim=2)
        torch.ops.llama.update_cache(key, self.keys, start)
        torch.ops.llama.update_cache(value, self.values, start)
        mixed = torch.ops.llama.custom_sdpa(query, self.keys, self.values, start, None, 0.0, True, self.scale)
        return self.layer.o_proj(mixed.reshape(1, new, -1))


class Decoder(nn.Module):
    """forward(tokens int64 [1, new], input_pos int64 [1]) -> the last token's logits, [1, 1, vocabulary]."""

    def __init__(self, model: Any, context: int, layers: int | None) -> None:
        super().__init__()
        self.context, self.rotary, self.norm = context, model.model.rotary_emb, model.model.norm
        self.layers: Any = model.model.layers[:layers]
        for layer in self.layers:
            layer.self_attn = Attention(layer.self_attn, model.config, context)
        self.embedding = model.model.embed_tokens
        self.embedding.padding_idx = None
        vocabulary, hidden = model.lm_head.weight.shape
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied

    def forward(self, tokens: Any, input_pos: Any) -> Any:
        """See the class."""
        start, new, check = input_pos[0].item(), tokens.shape[1], _CHECK
        check(start >= 0)
        check(start + new <= self.context)
        x = self.embedding(tokens)
        rotation = self.rotary(x, (torch.arange(new) + start)[None])
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), rotation, start)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.norm(x[:, -1:]))


def quantize(decoder: Decoder) -> None:
    """4 bits in linear layers, 8 bits in the embedding."""
    groups = Int8DynamicActivationIntxWeightConfig(weight_dtype=_INT4, weight_granularity=PerGroup(GROUP))
    rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(decoder, groups)
    quantize_(decoder, rows, lambda module, _: isinstance(module, nn.Embedding))


def export(decoder: Decoder) -> Any:
    """The program's bytes."""
    program = torch.export.export(
        decoder,
        (torch.zeros((1, 8), dtype=torch.long), torch.zeros(1, dtype=torch.long)),
        dynamic_shapes=({1: torch.export.Dim("new", min=1, max=decoder.context - 1)}, None),
    )
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    settings = ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        extract_delegate_segments=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
    )
    return edge.to_executorch(settings)


def main() -> int:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Hugging Face directory of a llama")
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="the first ones only, for a trial")
    parser.add_argument("--fp32", action="store_true", help="without quantization")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).eval()
    with torch.no_grad():
        decoder = Decoder(model, arguments.context, arguments.layers).eval()
        if not arguments.fp32:
            quantize(decoder)
        program = export(decoder)
    with arguments.out.open("wb") as file:
        program.write_to_file(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
