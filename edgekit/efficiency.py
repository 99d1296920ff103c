"""What runtimes make of a device's peaks, and what they take for themselves: the plan's only fitted numbers, in one place.

Fitted by tests/benchmarks/plan_accuracy.py against measured peak memory and decode speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["EFFICIENCY", "Efficiency"]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """One format and the runtime of its programs.

    Attributes:
        weight_bandwidth: By the bits of a stored weight, the share of the memory bandwidth that decoding reads it with.
        cache_bandwidth: The same for keys and values.
        layer_s: Time of a layer's small operators for one token, on any device.
        attention_compute: Share of the int8 rate that one token's attention reaches.
        prefill_compute: Share of the target's int8 rate that prefill reaches. A processor's rate is what its cores reach in
            products (`Cpu.int8_ops_per_s`), an NPU's its published peak.
        runtime_bytes: Interpreter and runtime, ready to run.
        token_bytes: Of the tokenizer, for each token of the vocabulary.
        packed_block_bytes: What the kernels' own layout adds to each quantized block, where the runtime option `prepacking`
            is on: it replaces what is stored, but for the scales, which it has besides.
        looked_up_bytes: Of the mapped file, the most that looking up one row of an embedding makes resident.
        loading_bytes: What loading needs, and gives back.
        widened_layers: Layers whose keys and values, kept in half precision, are there in float32 too while one is computed.
        prefill_chunk: Most tokens that are computed at once.
        scores: Copies of a layer's float32 scores, of the tokens computed at once over the whole context, that are there at
            once; 0 where attention goes through the context in blocks.
        whole_windows: The cache of a layer with a sliding window still holds the whole context.
        unit: What computes.
    """

    weight_bandwidth: Mapping[int, float]
    cache_bandwidth: float
    layer_s: float
    attention_compute: float
    prefill_compute: float
    runtime_bytes: int
    prefill_chunk: int
    token_bytes: int = 0
    packed_block_bytes: float = 0.0
    looked_up_bytes: int = 0
    loading_bytes: int = 0
    widened_layers: int = 0
    scores: int = 0
    whole_windows: bool = True
    unit: Literal["cpu", "npu"] = "cpu"


EFFICIENCY: Mapping[str, Efficiency] = {
    "onnx": Efficiency(
        weight_bandwidth={2: 0.61, 4: 0.61, 8: 0.76, 16: 0.88, 32: 0.88},
        cache_bandwidth=1.34,  # part of it stays in the processor's own caches
        layer_s=56e-6,
        attention_compute=0.11,
        prefill_compute=1.0,
        runtime_bytes=82_000_000,
        token_bytes=285,
        packed_block_bytes=7.5,  # a float32 sum and scale of the block, less what a zero point took
        looked_up_bytes=1_000_000,  # 64 KiB where the system keeps the file in small pages
        loading_bytes=20_000_000,
        widened_layers=6,  # one, in the steps that the arena grows by
        prefill_chunk=128,  # edgekit.runtimes.sequence.PREFILL_CHUNK
    ),
    "onnx-qdq": Efficiency(  # not measured: an NPU's emulator has no speed. NPUs share the memory bus with the cores.
        weight_bandwidth={4: 0.4, 8: 0.4, 16: 0.4, 32: 0.4},
        cache_bandwidth=0.4,
        layer_s=0.0,
        attention_compute=0.11,
        prefill_compute=0.25,
        runtime_bytes=200_000_000,  # with the NPU vendor's libraries
        prefill_chunk=128,  # edgekit.converters.to_onnx_qdq.CHUNK
        unit="npu",
    ),
    # One engine's file of 105 MB decoded 67 tokens/s at 19.7 GB/s here, and prefilled like ONNX Runtime's (2026-11).
    "executorch": Efficiency(
        weight_bandwidth={4: 0.4, 8: 0.5, 16: 0.6, 32: 0.6},
        cache_bandwidth=0.6,
        layer_s=56e-6,
        attention_compute=0.05,
        prefill_compute=1.0,
        runtime_bytes=60_000_000,
        prefill_chunk=128,
        scores=2,
    ),
    "litert": Efficiency(  # not fitted: as XNNPACK in ExecuTorch, which computes its products too
        weight_bandwidth={8: 0.5, 16: 0.6, 32: 0.6},
        cache_bandwidth=0.3,  # copied in each step
        layer_s=56e-6,
        attention_compute=0.05,
        prefill_compute=1.0,
        runtime_bytes=60_000_000,
        prefill_chunk=64,  # edgekit.converters.to_litert.CHUNK
    ),
    # Not measured: neither runs on a device here, and what runs them here says nothing of speed.
    "coreml": Efficiency(
        weight_bandwidth={2: 0.4, 4: 0.4, 6: 0.4, 8: 0.4, 16: 0.4, 32: 0.4},
        cache_bandwidth=0.4,
        layer_s=0.0,
        attention_compute=0.11,
        prefill_compute=0.25,
        runtime_bytes=100_000_000,
        prefill_chunk=64,
        unit="npu",
    ),
    "coreai": Efficiency(
        weight_bandwidth={2: 0.4, 4: 0.4, 8: 0.4, 16: 0.4, 32: 0.4},
        cache_bandwidth=0.4,
        layer_s=0.0,
        attention_compute=0.11,
        prefill_compute=0.25,
        runtime_bytes=100_000_000,
        prefill_chunk=128,
        unit="npu",
    ),
}
