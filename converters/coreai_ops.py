"""Core AI's operators as PyTorch sees them: few, so that tracing is quick, and what devices have fused kernels for.

Each is a custom operator with a plain PyTorch meaning and a lowering to Core AI. Attention, norm and rotation become composites
of the names and attributes that Apple's own models use (apple/coreai-models, `export/externalize.py`): a device takes its fused
kernel, anything else computes the body. Bodies compute in float32, as such kernels do inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import coreai_torch._compression.custom_layers  # noqa: F401 - the operator that dequantizes blocks
import numpy as np
import torch
from coreai._compiler.dialects import coreai
from coreai._compiler.ir import Location, RankedTensorType, Value
from coreai_torch import TorchConverter, generate_composite_decl
from torch import Tensor, fx

__all__ = ["append_to_cache", "attend", "register_lowerings", "rms_norm", "rotate"]

_NAMESPACE = "edgekit_coreai"
_TO_THE_END = np.iinfo(np.int32).max
Values = Mapping[str, Value]


@torch.library.custom_op(f"{_NAMESPACE}::append_to_cache", mutates_args=())
def append_to_cache(cache: Tensor, new: Tensor, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The cache with new heads in one layer at positions [start, stop), and what that layer has then.

    Args:
        cache: [layers, 1, kv_heads, capacity, head_dim].
        new: [1, kv_heads, stop - start, head_dim].
        layer: Which.
        start, stop: Positions.

    Returns:
        The cache, and [1, kv_heads, stop, head_dim].
    """
    cache = cache.clone()
    cache[layer, :, :, start:stop] = new
    return cache, cache[layer, :, :, :stop].clone()


@append_to_cache.register_fake
def _(cache: Tensor, new: Tensor, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cache), new.new_empty((1, new.shape[1], stop, new.shape[3]))


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Grouped-query attention of the newest tokens to all.

    Args:
        query: [1, heads, new, head_dim], of the last tokens that the keys are of.
        key, value: [1, kv_heads, tokens, head_dim].
        scale: Multiplies query times key.
        window: Tokens that are seen, the newest among them; 0: all.
        softcap: See `AttentionConfig`.

    Returns:
        As the query.
    """
    new, tokens = query.shape[2], key.shape[2]
    grouped = query.float().reshape(key.shape[1], -1, *query.shape[2:])
    scores = grouped @ key[0, :, None].float().transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    newest, places = torch.arange(tokens - new, tokens)[:, None], torch.arange(tokens)[None]
    visible = (places <= newest) & (places > newest - (window or tokens))
    scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value[0, :, None].float()).reshape(query.shape).to(query.dtype)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op(f"{_NAMESPACE}::rms_norm", mutates_args=())
def rms_norm(value: Tensor, weight: Tensor, eps: float) -> Tensor:
    """value / sqrt(mean(value^2) + eps) * weight over the last axis."""
    wide = value.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(value.dtype)


@rms_norm.register_fake
def _(value: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op(f"{_NAMESPACE}::rotate", mutates_args=())
def rotate(value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the first dimensions of heads [1, heads, new, head_dim]; cosine and sine are [1, 1, new, rotated / 2]."""
    half = cosine.shape[-1]
    first, second, rest = value[..., :half], value[..., half : 2 * half], value[..., 2 * half :]
    return torch.cat([cosine * first - sine * second, sine * first + cosine * second, rest], -1)


@rotate.register_fake
def _(value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return torch.empty_like(value)


def register_lowerings(converter: TorchConverter) -> None:
    """Tell a converter what the operators are in Core AI."""
    lowerings: Mapping[str, Callable[..., Any]] = {
        "append_to_cache": _lower_append_to_cache,
        "attend": _lower_attend,
        "rms_norm": _lower_rms_norm,
        "rotate": _lower_rotate,
    }
    for name, lowering in lowerings.items():
        converter.register_torch_lowering(f"{_NAMESPACE}::{name}.default")(lowering)


def _lower_append_to_cache(values: Values, node: fx.Node, location: Location) -> list[Value]:
    cache, new, start, stop = _operands(values, node, 0, 1, 3, 4)
    layer, end = cast("int", node.args[2]), _TO_THE_END
    before, after = [layer, 0, 0, start, 0], [layer + 1, end, end, stop, end]
    cache = coreai.slice_update(cache, _places(before), _places(after), [1] * 5, coreai.expand_dims(new, [0]))
    # The result's shape is said here: a slice up to a number that is known at run time only has none of its own.
    _, batch, kv_heads, _, head_dim = cache.type.shape
    shape = [1, batch, kv_heads, RankedTensorType.get_dynamic_size(), head_dim]
    kind = RankedTensorType.get(shape, cache.type.element_type)
    steps = coreai.constant([1] * 5)
    cached = coreai.SliceOp(cache, _places([layer, 0, 0, 0, 0]), _places(after), steps, results=[kind]).result
    return [cache, coreai.shrink_dims(cached, [0])]


def _places(numbers: Sequence[int | Value]) -> Value:
    """Numbers, some of them known only at run time (int32 [1]), in one tensor."""
    return coreai.concat(0, [coreai.constant([part]) if isinstance(part, int) else part for part in numbers])


def _lower_attend(values: Values, node: fx.Node, location: Location) -> Value:
    query, key, value = _operands(values, node, 0, 1, 2)
    scale, window, softcap = cast("tuple[float, int, float]", node.args[3:])
    if softcap:  # no composite has it
        return _attention(query, key, value, scale, window, softcap)
    attributes = {"scale": scale, "is_causal": True, "window_size": window}
    declared = generate_composite_decl(
        query.context, "scaled_dot_product_attention", ["query", "key", "value"], ["output"], attributes
    )

    @coreai.graph(private=True, no_inline=True, composite_decl=declared)  # type: ignore[untyped-decorator]  # it has no types
    def sdpa(query: Value, key: Value, value: Value) -> Value:
        return _attention(query, key, value, scale, window, 0.0)

    return sdpa(query, key, value)[0]


def _attention(query: Value, key: Value, value: Value, scale: float, window: int, softcap: float) -> Value:
    """The heads of a group share a key: [kv_heads, group, new, head_dim] times [kv_heads, 1, head_dim, tokens]."""
    kind, (_, heads, _, head_dim), kv_heads = query.type.element_type, query.type.shape, key.type.shape[1]
    query, key, value = (coreai.cast(part, np.float32) for part in (query, key, value))
    new, tokens = (_length(part) for part in (query, key))
    grouped = coreai.reshape(query, [kv_heads, heads // kv_heads, -1, head_dim])
    key = coreai.transpose(key, np.array([1, 0, 3, 2], np.uint32))
    value = coreai.transpose(value, np.array([1, 0, 2, 3], np.uint32))
    scores = coreai.broadcasting_mul(coreai.broadcasting_batch_matmul(grouped, key), np.float32(scale))
    if softcap:
        capped = coreai.tanh(coreai.broadcasting_divide(scores, np.float32(softcap)))
        scores = coreai.broadcasting_mul(capped, np.float32(softcap))
    scores = coreai.broadcasting_where(_visible(new, tokens, window), scores, np.float32(-np.inf))
    attended = coreai.broadcasting_batch_matmul(coreai.softmax(scores, 3), value)
    return coreai.cast(coreai.reshape(attended, [1, heads, -1, head_dim]), kind)


def _visible(new: Value, tokens: Value, window: int) -> Value:
    """What each new token sees: bool [new, tokens]."""
    zero, one = (coreai.constant(number, dtype=np.int32) for number in (0, 1))
    places = coreai.expand_dims(coreai.range_(zero, tokens, one), [0])
    newest = coreai.expand_dims(coreai.range_(coreai.sub(tokens, new), tokens, one), [1])
    visible = coreai.not_(coreai.broadcasting_greater(places, newest))
    if not window:
        return visible
    since = coreai.broadcasting_sub(newest, np.int32(window))
    return coreai.broadcasting_and(visible, coreai.broadcasting_greater(places, since))


def _length(heads: Value) -> Value:
    """The third size, int32 []."""
    size = coreai.slice_(coreai.get_shape(heads), [2], [3], [1])
    return coreai.cast(coreai.shrink_dims(size, [0]), np.int32)


def _lower_rms_norm(values: Values, node: fx.Node, location: Location) -> Value:
    value, weight = _operands(values, node, 0, 1)
    eps = cast("float", node.args[2])
    declared = generate_composite_decl(
        value.context, "rms_norm", ["input", "scale"], ["output"], {"axes": -1, "eps": eps}
    )

    @coreai.graph(private=True, no_inline=True, composite_decl=declared)  # type: ignore[untyped-decorator]  # it has no types
    def rms_norm(input: Value, scale: Value) -> Value:  # noqa: A002 - Apple's name
        wide, factor = (coreai.cast(part, np.float32) for part in (input, scale))
        square = coreai.reduce_mean(coreai.mul(wide, wide), [wide.type.rank - 1])
        inverse = coreai.rsqrt(coreai.broadcasting_add(square, np.float32(eps)))
        normed = coreai.broadcasting_mul(coreai.broadcasting_mul(wide, inverse), factor)
        return coreai.cast(normed, input.type.element_type)

    return rms_norm(value, weight)[0]


def _lower_rotate(values: Values, node: fx.Node, location: Location) -> Value:
    value, cosine, sine = _operands(values, node, 0, 1, 2)
    half, size = cosine.type.shape[-1], value.type.shape[-1]
    attributes = {"scale": 1.0, "base": 10_000.0, "interleaved": False} | (
        {"dims": 2 * half} if 2 * half < size else {}
    )
    declared = generate_composite_decl(value.context, "rope", ["input", "cos", "sin"], ["output"], attributes)

    @coreai.graph(private=True, no_inline=True, composite_decl=declared)  # type: ignore[untyped-decorator]  # it has no types
    def rope(input: Value, cos: Value, sin: Value) -> Value:  # noqa: A002 - Apple's name
        first, second = _columns(input, 0, half), _columns(input, half, 2 * half)
        turned = [
            coreai.sub(coreai.broadcasting_mul(first, cos), coreai.broadcasting_mul(second, sin)),
            coreai.add(coreai.broadcasting_mul(first, sin), coreai.broadcasting_mul(second, cos)),
        ]
        rest = [_columns(input, 2 * half, size)] if 2 * half < size else []
        return coreai.concat(3, [*turned, *rest])

    return rope(value, cosine, sine)[0]


def _columns(heads: Value, first: int, last: int) -> Value:
    """A part of the last axis."""
    return coreai.slice_(heads, [0, 0, 0, first], [_TO_THE_END] * 3 + [last], [1] * 4)


def _operands(values: Values, node: fx.Node, *indices: int) -> list[Value]:
    """Arguments of a node that are tensors, or sizes as int32 [1]."""
    found = []
    for index in indices:
        argument = node.args[index]
        found.append(values[argument.name] if isinstance(argument, fx.Node) else coreai.constant([argument]))
    return found
