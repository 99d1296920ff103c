"""ModelConfig: one description of a decoder, whatever file it came from.

It says what differs between decoder models and nothing about formats or devices. Architecture modules make it, emitters and
the plan read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Activation", "AttentionConfig", "LayerConfig", "ModelConfig", "NormPlacement", "RopeConfig", "RopeKind"]

RopeKind: TypeAlias = Literal["default", "linear", "llama3", "yarn", "longrope", "factors"]
Activation: TypeAlias = Literal["silu", "gelu_tanh"]
NormPlacement: TypeAlias = Literal["pre", "sandwich"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and its scaling.

    Attributes:
        theta: Base of the frequencies.
        dim: Rotated dimensions of each head; even, at most the head's.
        kind: How frequencies are scaled. `factors` divides each by its own factor (a GGUF's `rope_freqs`).
        factor: Context extension factor of linear, llama3 and yarn.
        original_context: Positions of the original training, where the scaling needs it or the checkpoint says it.
        low_freq_factor, high_freq_factor: Of llama3.
        beta_fast, beta_slow, truncate: Of yarn (arXiv:2309.00071).
        attention_factor: Multiplies cosine and sine (yarn, longrope).
        short_factors, long_factors: One divisor per frequency: longrope (arXiv:2402.13753) uses the long ones once a
            sequence is longer than `original_context`; `factors` uses the short ones always.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention (arXiv:2305.13245); what all layers share.

    `scale` multiplies query times key; `softcap` bounds the scores by `softcap * tanh(score / softcap)`, 0 is off.
    `query_key_norm` is an RMS norm over each head of query and key, before the rotation. A query at position p is multiplied
    by 1 + query_growth * ln(1 + floor(p / query_growth_context)): so Ministral 3 keeps attention sharp in long texts.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False
    softcap: float = 0.0
    query_growth: float = 0.0
    query_growth_context: int = 0

    @property
    def stored_head_dim(self) -> int:
        """Size of a head in the cache: the runtimes' kernels want multiples of 8 and get zeros for what is missing."""
        return -(-self.head_dim // 8) * 8

    @property
    def qkv_rows(self) -> int:
        """Rows of the packed query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer: the rotation (None: no positions) and the sliding window (0: full attention)."""

    rope: RopeConfig | None
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only language model. Sizes are in elements, lengths in tokens.

    Attributes:
        norm: `pre` has a norm before attention and feed-forward; `sandwich` (Gemma) one after each as well.
        norm_offset: Added to norm weights on reading: Gemma checkpoints store w, the model multiplies by 1 + w.
        embedding_scale: Multiplies the embedding's output.
        logits_softcap: Bounds logits like `AttentionConfig.softcap`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    context: int
    attention: AttentionConfig
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    activation: Activation = "silu"
    norm: NormPlacement = "pre"
    norm_offset: float = 0.0
    mlp_bias: bool = False
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logits_softcap: float = 0.0

    @property
    def longrope_switch(self) -> int:
        """Sequence length above which the long rotary factors apply; 0 where there are none."""
        switches = {layer.rope.original_context for layer in self.layers if layer.rope and layer.rope.long_factors}
        return max(switches, default=0)

    @property
    def window(self) -> int:
        """Tokens that every layer sees, the newest among them; 0 where a layer sees all."""
        windows = [layer.window for layer in self.layers]
        return max(windows) if windows and all(windows) else 0

    def positions(self, context: int) -> int:
        """Tokens that a sequence may reach with a cache of `context`, where its layers slide over it; 0 where they don't."""
        return self.context if 0 < self.window < context < self.context else 0
