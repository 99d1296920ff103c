"""A decoder of two layers, exported as ExecuTorch's own documents do it: the backend is tested apart from our converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from edgekit.graph import CacheLayout, Graph
from edgekit.quiet import quieted

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 2, 4, 2, 16, 64, 128
CONTEXT, MOST_TOKENS, MOST_ROWS = 64, 24, 4


class Attention(nn.Module):
    """Grouped-query attention over a cache in buffers, by ExecuTorch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.key, self.value = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM), nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.key_cache, self.value_cache = (nn.Buffer(torch.zeros(1, CONTEXT, KV_HEADS, HEAD_DIM)) for _ in range(2))

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """x [1, new, hidden] -> [1, new, hidden]."""
        new = x.shape[1]
        operators = torch.ops.llama
        operators.update_cache(self.key(x).view(1, new, KV_HEADS, HEAD_DIM), self.key_cache, start)
        operators.update_cache(self.value(x).view(1, new, KV_HEADS, HEAD_DIM), self.value_cache, start)
        query = self.query(x).view(1, new, HEADS, HEAD_DIM)
        mixed: torch.Tensor = operators.custom_sdpa(
            query, self.key_cache, self.value_cache, start, None, 0.0, True, HEAD_DIM**-0.5
        )
        return mixed.reshape(1, new, HEADS * HEAD_DIM)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The same over all tokens at once, without a cache: PyTorch's own attention."""
        new = x.shape[1]
        query, key, value = (
            part(x).view(1, new, -1, HEAD_DIM).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(1, new, -1)


class Decoder(nn.Module):
    """forward(tokens int64 [rows, new], start_pos int64 [1]) -> logits [1, rows, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers: Any = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """See the class."""
        rows, new = tokens.shape
        start: Any = start_pos[0].item()
        check: Any = torch._check
        check(start >= 0)
        check(start + new <= CONTEXT)
        x = self.embedding(tokens[:1])
        for layer in self.layers:
            x = x + layer(x, start)
        logits: torch.Tensor = self.head(x.narrow(1, new - rows, rows))
        return logits

    def whole(self, tokens: list[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary], in plain PyTorch."""
        with torch.no_grad():
            x = self.embedding(torch.tensor([tokens]))
            for layer in self.layers:
                x = x + layer.whole(x)
            logits: torch.Tensor = self.head(x)[0]
        return logits


class Exported(NamedTuple):
    """A program on disk, what the manifest would say of it, and the module that it was made from."""

    directory: Path
    graph: Graph
    module: Decoder

    @property
    def path(self) -> Path:
        """The .pte."""
        return self.directory / self.graph.files[0]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The decoder, lowered to XNNPACK."""
    pytest.importorskip("executorch", reason="executorch is not installed")
    torch.manual_seed(0)
    directory, module = tmp_path_factory.mktemp("executorch"), Decoder().eval()
    with quieted():
        (directory / "model.pte").write_bytes(_lowered(module))
    names = ("layers.{}.key_cache", "layers.{}.value_cache")
    graph = Graph(
        format="executorch",
        files=("model.pte",),
        inputs={"tokens": "tokens", "past_length": "start_pos"},
        outputs={"logits": "logits"},
        cache=CacheLayout(LAYERS, KV_HEADS, HEAD_DIM, "float32", *names, *names),
        vocab_size=VOCABULARY,
        rope_switch=0,
        weights=(),
    )
    return Exported(directory, graph, module)


def _lowered(module: Decoder) -> Any:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 - the operators that Attention calls
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        module,
        (torch.zeros((2, 7), dtype=torch.long), torch.zeros(1, dtype=torch.long)),
        dynamic_shapes=({0: dynamic(min=1, max=MOST_ROWS), 1: dynamic(min=1, max=MOST_TOKENS)}, None),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    edge = to_edge_transform_and_lower(
        {"forward": program},
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    settings = ExecutorchBackendConfig(
        emit_mutable_buffer_names=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
    )
    return edge.to_executorch(settings).buffer
