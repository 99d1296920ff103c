"""The decoder's layers in plain operators of static shape, from the embedding's output to the last residual stream.

Values are [new, size], or [1, heads, new, size] within the attention. Keys lie transposed, [1, kv_heads, head_dim, tokens], as
they are multiplied. What depends on positions (the rotation's cosines and sines, the masks) comes in from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.config import LayerConfig, ModelConfig, RopeConfig

from .qdq_graph import Canvas, Matrix

__all__ = [
    "HIDDEN",
    "MASK_RANGE",
    "PAST_KEY",
    "PAST_VALUE",
    "PRESENT_KEY",
    "PRESENT_VALUE",
    "PROBABILITIES",
    "RESIDUAL_RANGE",
    "LayerEmitter",
    "ReadVector",
    "StaticSize",
    "cosine_name",
    "distinct_ropes",
    "mask_name",
    "rotation_range",
    "sine_name",
]

HIDDEN, RESIDUAL_RANGE = "hidden", "layers.{}.residual"
MASK_RANGE, PROBABILITIES = "mask", "probabilities"
PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE = "past_key.{}", "past_value.{}", "present_key.{}", "present_value.{}"
ReadVector = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class StaticSize:
    """Tokens that a graph takes at a time, and those that its cache has room for: 0 for a graph without one."""

    new: int | str
    past: int

    @property
    def total(self) -> int | str:
        """Tokens that attention looks at."""
        return self.new if isinstance(self.new, str) else self.new + self.past


def distinct_ropes(config: ModelConfig) -> list[RopeConfig]:
    """The model's rotations, each once."""
    return list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))


def cosine_name(number: int) -> str:
    """The input with the cosines of a rotation, [new, 1, dim / 2]."""
    return f"cosine.{number}"


def sine_name(number: int) -> str:
    """The input with the sines of a rotation, [new, 1, dim / 2]."""
    return f"sine.{number}"


def mask_name(window: int) -> str:
    """The input with the mask of layers with this window, [new, past + new]: 0 to see, far below to hide."""
    return f"mask.{window}" if window else "mask"


def rotation_range(number: int) -> str:
    """The range of a rotation's cosines and sines."""
    return f"rotation.{number}"


class LayerEmitter:
    """Draws layers on a canvas.

    Args:
        read_vector: The numbers of a norm or a bias, by role.
    """

    def __init__(self, config: ModelConfig, canvas: Canvas, size: StaticSize, read_vector: ReadVector) -> None:
        self.config, self.canvas, self.size = config, canvas, size
        self.read_vector = read_vector
        self.ropes = distinct_ropes(config)

    def emit(self, layers: Iterable[int]) -> str:
        """Declare the inputs and draw these layers, from `HIDDEN` on; the residual stream after them."""
        layers = list(layers)
        self._declare_inputs([self.config.layers[index] for index in layers])
        hidden = self.canvas.input(HIDDEN, [self.size.new, self.config.hidden_size], self._stream(layers[0]))
        for index in layers:
            hidden = self._layer(index, hidden)
        return hidden

    def _stream(self, index: int) -> str:
        """The range of the residual stream before a layer."""
        return RESIDUAL_RANGE.format(index - 1) if index else HIDDEN

    def _declare_inputs(self, layers: list[LayerConfig]) -> None:
        canvas, new = self.canvas, self.size.new
        for rope in dict.fromkeys(layer.rope for layer in layers if layer.rope):
            number = self.ropes.index(rope)
            for name in (cosine_name(number), sine_name(number)):
                canvas.input(name, [new, 1, rope.dim // 2], rotation_range(number))
        for window in sorted({layer.window for layer in layers}):
            canvas.input(mask_name(window), [new, self.size.total], MASK_RANGE)

    def _layer(self, index: int, hidden: str) -> str:
        name, canvas, sandwich = f"layers.{index}.", self.canvas, self.config.norm == "sandwich"
        attended = self._attention(index, self.config.layers[index], self._norm(hidden, name + "attention_norm"))
        change = self._linear(name + "output", attended)
        if sandwich:
            change = self._norm(change, name + "post_attention_norm")
        hidden = canvas.op("Add", [hidden, change], name + "middle")
        change = self._mlp(name, self._norm(hidden, name + "mlp_norm"))
        if sandwich:
            change = self._norm(change, name + "post_mlp_norm")
        return canvas.op("Add", [hidden, change], RESIDUAL_RANGE.format(index))

    def _attention(self, index: int, layer: LayerConfig, normed: str) -> str:
        """The heads' outputs side by side, [new, heads * head_dim]."""
        name, canvas, attention = f"layers.{index}.", self.canvas, self.config.attention
        heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
        query = canvas.move(
            "Transpose", [self._heads(name + "query", 0, normed, layer)], name + "query.by_head", perm=[1, 0, 2]
        )
        key = self._heads(name + "key", heads, normed, layer)
        value = self._projected(name + "value", heads + kv_heads, kv_heads, normed)
        key = canvas.recode(key, name + "key.kept", name + "key_cache")
        value = canvas.recode(value, name + "value.kept", name + "value_cache")
        keys = canvas.move("Transpose", [key], PRESENT_KEY.format(index), perm=[1, 2, 0])
        values = canvas.move("Transpose", [value], PRESENT_VALUE.format(index), perm=[1, 0, 2])
        if self.size.past:
            keys, values = self._with_past(index, keys, values)
        # Queries that share a key-value head are rows of one product.
        grouped = canvas.move("Reshape", [query, canvas.shape([kv_heads, -1, size])], name + "query.grouped")
        scores = self._softcapped(canvas.op("MatMul", [grouped, keys], name + "products"), name)
        apart = canvas.move("Reshape", [scores, canvas.shape([heads, -1, 0])], name + "scores.by_head")
        masked = canvas.op("Add", [apart, mask_name(layer.window)], name + "masked")
        weights = canvas.op("Softmax", [masked], name + "weights", bounds=PROBABILITIES, axis=-1)
        weights = canvas.move("Reshape", [weights, canvas.shape([kv_heads, -1, 0])], name + "weights.grouped")
        mixed = canvas.op("MatMul", [weights, values], name + "mixed")
        mixed = canvas.move("Reshape", [mixed, canvas.shape([heads, -1, size])], name + "mixed.by_head")
        mixed = canvas.move("Transpose", [mixed], name + "mixed.by_token", perm=[1, 0, 2])
        return canvas.move("Reshape", [mixed, canvas.shape([-1, heads * size])], name + "attended")

    def _with_past(self, index: int, key: str, value: str) -> tuple[str, str]:
        """The cache and behind it the new keys and values, which are outputs too."""
        canvas, size, name = self.canvas, self.size, f"layers.{index}."
        heads, dim = self.config.attention.kv_heads, self.config.attention.head_dim
        past_key = canvas.input(PAST_KEY.format(index), [heads, dim, size.past], name + "key_cache")
        past_value = canvas.input(PAST_VALUE.format(index), [heads, size.past, dim], name + "value_cache")
        canvas.output(key, [heads, dim, size.new])
        canvas.output(value, [heads, size.new, dim])
        keys = canvas.move("Concat", [past_key, key], name + "keys", axis=2)
        return keys, canvas.move("Concat", [past_value, value], name + "values", axis=1)

    def _projected(self, name: str, first_head: int, heads: int, normed: str, *, factor: float = 1.0) -> str:
        """Some heads of the packed projection, [1, new, heads, head_dim]."""
        canvas, size = self.canvas, self.config.attention.head_dim
        role = name.rpartition(".")[0] + ".qkv"
        matrix = Matrix(name, role, first_head * size, heads * size, self.config.hidden_size, factor)
        value = self._linear_part(matrix, normed)
        return canvas.move("Reshape", [value, canvas.shape([-1, heads, size])], f"{name}.heads")

    def _heads(self, name: str, first_head: int, normed: str, layer: LayerConfig) -> str:
        """Queries or keys, normed and rotated, [1, new, heads, head_dim]; queries are scaled already."""
        attention, is_query = self.config.attention, first_head == 0
        scale = attention.scale if is_query else 1.0
        heads = attention.heads if is_query else attention.kv_heads
        norms = attention.query_key_norm
        value = self._projected(name, first_head, heads, normed, factor=1.0 if norms else scale)
        if norms:
            value = self._norm(value, f"{name}_norm", factor=scale)
        return self._rotated(value, layer.rope) if layer.rope else value

    def _rotated(self, value: str, rope: RopeConfig) -> str:
        """The first `rope.dim` dimensions of each head rotated, the pairs half of them apart."""
        canvas, half, number = self.canvas, rope.dim // 2, self.ropes.index(rope)
        rest = self.config.attention.head_dim - rope.dim
        parts = [f"{value}.left", f"{value}.right", f"{value}.rest"][: 3 if rest else 2]
        left, right, *unrotated = canvas.split(value, parts, [half, half, rest][: len(parts)])
        turned, crossed, output = f"{value}.turned", f"{value}.crossed", f"{value}.rotated"
        cosine, sine = cosine_name(number), sine_name(number)
        sums = [
            canvas.op(
                kind,
                [
                    canvas.op("Mul", [one, cosine], f"{turned}.{side}"),
                    canvas.op("Mul", [other, sine], f"{crossed}.{side}"),
                ],
                f"{output}.{side}",
                bounds=output,
            )
            for side, kind, one, other in (("left", "Sub", left, right), ("right", "Add", right, left))
        ]
        kept = [canvas.recode(part, f"{output}.rest", output) for part in unrotated]
        return canvas.move("Concat", [*sums, *kept], output, axis=-1)

    def _softcapped(self, scores: str, name: str) -> str:
        softcap = self.config.attention.softcap
        if not softcap:
            return scores
        canvas = self.canvas
        capped = canvas.op(
            "Mul", [scores, canvas.constant("score_rate", np.array([1 / softcap], np.float32))], name + "capped"
        )
        bent = canvas.op("Tanh", [capped], name + "bent")
        return canvas.op("Mul", [bent, canvas.constant("score_cap", np.array([softcap], np.float32))], name + "scores")

    def _mlp(self, name: str, normed: str) -> str:
        canvas, wide, hidden = self.canvas, self.config.intermediate_size, self.config.hidden_size
        gate, up = (
            self._linear_part(Matrix(name + part, name + "gate_up", number * wide, wide, hidden), normed)
            for number, part in enumerate(("gate", "up"))
        )
        if self.config.activation == "silu":
            active = canvas.op("Mul", [gate, canvas.op("Sigmoid", [gate], name + "sigmoid")], name + "active")
        else:
            active = canvas.op("Gelu", [gate], name + "active", approximate="tanh")
        return self._linear(name + "down", canvas.op("Mul", [active, up], name + "product"))

    def _linear(self, role: str, value: str) -> str:
        """value times a whole role's weight."""
        columns = (
            self.config.intermediate_size
            if role.endswith("down")
            else self.config.attention.heads * self.config.attention.head_dim
        )
        return self._linear_part(Matrix(role, role, 0, self.config.hidden_size, columns), value)

    def _linear_part(self, matrix: Matrix, value: str) -> str:
        """value times a matrix, and its bias where the role has one."""
        if not self._has_bias(matrix.role):
            return self.canvas.linear(value, matrix, matrix.name)
        product = self.canvas.linear(value, matrix, f"{matrix.name}.product")
        numbers = self.read_vector(f"{matrix.role}_bias")[matrix.first_row : matrix.first_row + matrix.rows]
        bias = self.canvas.constant(f"{matrix.name}.bias", numbers * np.float32(matrix.factor))
        return self.canvas.op("Add", [product, bias], matrix.name)

    def _has_bias(self, role: str) -> bool:
        config = self.config
        kinds = {"qkv": config.attention.qkv_bias, "output": config.attention.output_bias}
        return kinds.get(role.rpartition(".")[2], config.mlp_bias)

    def _norm(self, value: str, role: str, *, factor: float = 1.0) -> str:
        numbers = self.canvas.constant(f"{role}.weight", self.read_vector(role) * np.float32(factor))
        return self.canvas.op(
            "SimplifiedLayerNormalization", [value, numbers], f"{role}.normed", axis=-1, epsilon=self.config.norm_eps
        )
