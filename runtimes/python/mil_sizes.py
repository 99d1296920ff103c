"""How large an operator's result will be, before it takes memory: a few bytes of an untrusted package could ask for all of it.

So could many results, none of which is large: what is needed at the same time is bounded too. Of single results, only those of
operators which may give more than they are given are here; so are those whose numbers, such as an epsilon, numpy would take as
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from .mil_operators import BINARY
from .mil_types import ArrayLike, TensorType

__all__ = ["GROWING", "LARGEST_RESULT", "LiveMemory", "check_size"]

# Elements: the scores of 32 heads, each of 64 tokens with 131,072, a gigabyte in float32.
LARGEST_RESULT = 1 << 28
# Four such results; attention needs its scores, what is masked of them, and their exponentials at the same time.
LARGEST_LIVE_BYTES = 1 << 32
ITEM_BYTES = 4  # the most that an element takes, as `mil_types` holds them

_Size = Callable[..., int]


class LiveMemory:
    """What the results that are still needed take together; several may be views of one buffer.

    Args:
        constants: They take nothing more.
        state_bytes: What the states take: programs may hold what they were, and what they become, besides.
    """

    def __init__(self, constants: Iterable[Any], state_bytes: int) -> None:
        self._constants = {id(_buffer(value)) for value in constants if isinstance(value, np.ndarray)}
        self._users: dict[int, int] = {}
        self._bytes, self._most_bytes = 0, LARGEST_LIVE_BYTES + 2 * state_bytes

    def check(self, more_bytes: int) -> None:
        """Refuse a result for which there is no room.

        Raises:
            ValueError: There is none.
        """
        if self._bytes + more_bytes > self._most_bytes:
            raise ValueError(
                f"with {self._bytes + more_bytes:,} bytes at once it needs more than the {self._most_bytes:,} there are here"
            )

    def add(self, result: Any) -> None:
        """A result is there from now on."""
        buffer = _buffer(result)
        if id(buffer) not in self._constants:
            users = self._users[id(buffer)] = self._users.get(id(buffer), 0) + 1
            self._bytes += buffer.nbytes if users == 1 else 0

    def remove(self, result: Any) -> None:
        """It is not needed any more."""
        buffer = _buffer(result)
        if id(buffer) in self._users:
            self._users[id(buffer)] -= 1
            if not self._users[id(buffer)]:
                del self._users[id(buffer)]
                self._bytes -= buffer.nbytes


def _buffer(value: Any) -> Any:
    """The array whose memory an array is a view of."""
    while isinstance(getattr(value, "base", None), np.ndarray):
        value = value.base
    return value


def check_size(kind: str, arguments: Mapping[str, Any], declared: TensorType) -> int:
    """Refuse an operator whose result is not of the declared size, or too large.

    Returns:
        The most bytes that its result takes.

    Raises:
        ValueError: It is so. Whatever else numpy raises of arguments that do not fit each other passes through.
    """
    size = GROWING.get(kind)
    if size is None:
        return max((np.size(value) * ITEM_BYTES for value in arguments.values()), default=0)
    count = size(**arguments)
    if declared.is_fixed and count != declared.count:
        raise ValueError(f"the result has {count:,} elements, not those of {declared.shape}")
    _check_largest(count)
    return count * ITEM_BYTES


def _check_largest(count: int) -> None:
    if count > LARGEST_RESULT:
        raise ValueError(f"{count:,} elements are more than the {LARGEST_RESULT:,} that are computed here")


def _broadcast(*values: Any) -> int:
    return prod(np.broadcast_shapes(*map(np.shape, values)))


def _binary(x: ArrayLike, y: ArrayLike) -> int:
    return _broadcast(x, y)


def _select(cond: ArrayLike, a: ArrayLike, b: ArrayLike) -> int:
    return _broadcast(cond, a, b)


def _clip(x: ArrayLike, alpha: Any, beta: Any) -> int:
    return _broadcast(x, alpha, beta)


def _with_epsilon(x: ArrayLike, epsilon: Any = 0.0, **others: Any) -> int:
    return _broadcast(x, epsilon)


def _fill(shape: ArrayLike, value: Any = 0.0) -> int:
    return prod(map(int, shape))


def _range_1d(start: Any, end: Any, step: Any) -> int:
    return max(math.ceil((float(end) - float(start)) / float(step)), 0)


def _tile(x: ArrayLike, reps: ArrayLike) -> int:
    return x.size * prod(map(int, reps))


def _pad(x: ArrayLike, pad: ArrayLike, **others: Any) -> int:
    widths = [0] * (x.ndim - len(pad) // 2) + [int(before) + int(behind) for before, behind in pad.reshape(-1, 2)]
    return prod(length + width for length, width in zip(x.shape, widths, strict=True))


def _joined(values: list[ArrayLike], **others: Any) -> int:
    return sum(value.size for value in values)


def _gather(x: ArrayLike, indices: ArrayLike, axis: int = 0, batch_dims: int = 0, **others: Any) -> int:
    axis, shape = int(axis) % x.ndim, np.shape(indices)[int(batch_dims) % max(x.ndim, 1) :]
    return prod((*x.shape[:axis], *shape, *x.shape[axis + 1 :]))


def _gather_along_axis(x: ArrayLike, indices: ArrayLike, axis: int = 0, **others: Any) -> int:
    others_of_x = list(x.shape)
    others_of_x[int(axis)] = 1
    return prod(np.broadcast_shapes(tuple(others_of_x), np.shape(indices)))


def _linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> int:
    return prod((*x.shape[:-1], weight.shape[0]))


def _matmul(x: ArrayLike, y: ArrayLike, transpose_x: bool = False, transpose_y: bool = False) -> int:
    rows, columns = x.shape[-1 if transpose_x else -2], y.shape[-2 if transpose_y else -1]
    return prod((*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), rows, columns))


def _attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None) -> int:
    scores = (*np.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
    if attn_mask is not None:
        scores = np.broadcast_shapes(scores, attn_mask.shape)
    _check_largest(prod(scores))
    return prod((*np.broadcast_shapes(scores[:-2], value.shape[:-2]), scores[-2], value.shape[-1]))


GROWING: Mapping[str, _Size] = {
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(("log", "rsqrt", "inverse", "l2_norm", "layer_norm"), _with_epsilon),
    **dict.fromkeys(("concat", "stack"), _joined),
    "select": _select,
    "clip": _clip,
    "fill": _fill,
    "range_1d": _range_1d,
    "tile": _tile,
    "pad": _pad,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
