"""MIL's operators that move numbers and change none, in numpy. What they return may be a view of what they were given as x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from .mil_operators import Kernel
from .mil_types import ArrayLike

__all__ = ["MOVING", "slice_update"]

Slices = tuple[slice | int, ...]
_PAD_MODES: Mapping[str, Literal["reflect", "edge"]] = {"reflect": "reflect", "replicate": "edge"}


def reshape(x: ArrayLike, shape: ArrayLike) -> ArrayLike:
    """Another shape, where 0 takes x's length of that axis, if there are as many, and -1 what is left."""
    same_rank = len(shape) == x.ndim
    return x.reshape([x.shape[axis] if same_rank and not length else int(length) for axis, length in enumerate(shape)])


def transpose(x: ArrayLike, perm: ArrayLike) -> ArrayLike:
    """Axes in another order."""
    return x.transpose([int(axis) for axis in perm])


def squeeze(x: ArrayLike, axes: ArrayLike | None = None) -> ArrayLike:
    """Without these axes of length 1, or without all of them."""
    return np.squeeze(x, None if axes is None else tuple(map(int, axes)))


def expand_dims(x: ArrayLike, axes: ArrayLike) -> ArrayLike:
    """With axes of length 1 at these places of the result."""
    return np.expand_dims(x, tuple(map(int, axes)))


def slice_by_index(
    x: ArrayLike,
    begin: ArrayLike,
    end: ArrayLike,
    stride: ArrayLike | None = None,
    begin_mask: ArrayLike | None = None,
    end_mask: ArrayLike | None = None,
    squeeze_mask: ArrayLike | None = None,
) -> ArrayLike:
    """From begin to before end; masks leave out a bound, or take the one index at begin and drop the axis."""
    return np.asarray(x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


def slice_by_size(x: ArrayLike, begin: ArrayLike, size: ArrayLike) -> ArrayLike:
    """`size` elements from `begin` on; a size of -1 takes the rest.

    Raises:
        IndexError: They are not all in x.
    """
    ends = [
        length if count == -1 else int(start) + int(count)
        for start, count, length in zip(begin, size, x.shape, strict=True)
    ]
    if any(not 0 <= start <= end <= length for start, end, length in zip(begin, ends, x.shape, strict=True)):
        raise IndexError(f"a slice from {begin.tolist()} to {ends} of a tensor of shape {x.shape}")
    return x[tuple(slice(int(start), end) for start, end in zip(begin, ends, strict=True))]


def slice_update(
    x: ArrayLike,
    update: ArrayLike,
    begin: ArrayLike,
    end: ArrayLike,
    stride: ArrayLike | None = None,
    begin_mask: ArrayLike | None = None,
    end_mask: ArrayLike | None = None,
    squeeze_mask: ArrayLike | None = None,
    *,
    in_place: bool = False,
) -> ArrayLike:
    """x with `update` at the place that `slice_by_index` would take; x itself changes only where `in_place` is set.

    Raises:
        ValueError: The place has another shape, as where it reaches past x.
    """
    place = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[place].shape != update.shape:
        raise ValueError(f"an update of shape {update.shape} at a place of shape {x[place].shape}")
    updated = x if in_place else x.copy()
    updated[place] = update
    return updated


def split(
    x: ArrayLike, axis: int, num_splits: int | None = None, split_sizes: ArrayLike | None = None
) -> list[ArrayLike]:
    """Parts along an axis: of these sizes, or so many equal ones."""
    if split_sizes is None:
        return np.split(x, int(num_splits or 0), axis=int(axis))
    if int(split_sizes.sum()) != x.shape[int(axis)]:
        raise ValueError(f"parts of {split_sizes.tolist()} of a length of {x.shape[int(axis)]}")
    return np.split(x, np.cumsum(split_sizes)[:-1], axis=int(axis))


def concat(values: list[ArrayLike], axis: int, interleave: bool = False) -> ArrayLike:
    """One after the other along an axis, or their elements in turn."""
    if not interleave:
        return np.concatenate(values, axis=int(axis))
    stacked = np.stack(values, axis=int(axis) % values[0].ndim + 1)
    shape = list(values[0].shape)
    shape[int(axis)] *= len(values)
    return stacked.reshape(shape)


def stack(values: list[ArrayLike], axis: int) -> ArrayLike:
    """Along a new axis."""
    return np.stack(values, axis=int(axis))


def tile(x: ArrayLike, reps: ArrayLike) -> ArrayLike:
    """Repeated along each axis."""
    return np.tile(x, tuple(map(int, reps)))


def gather(
    x: ArrayLike, indices: ArrayLike, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> ArrayLike:
    """Slices of x along an axis.

    Raises:
        IndexError: An index is beyond the axis, which on a device gives anything.
    """
    batch_dims, axis = int(batch_dims) % max(x.ndim, 1), int(axis) % x.ndim
    _check_indices(indices, x.shape[axis])
    if not batch_dims:
        return np.take(x, indices.astype(np.int64), axis=axis)
    pairs = zip(x, indices, strict=True)
    return np.stack([gather(each, index, axis - 1, batch_dims - 1) for each, index in pairs])


def gather_along_axis(x: ArrayLike, indices: ArrayLike, axis: int = 0, validate_indices: bool = False) -> ArrayLike:
    """For each place the element of x whose index along the axis is given; raises as `gather`."""
    _check_indices(indices, x.shape[int(axis)])
    return np.take_along_axis(x, indices.astype(np.int64), axis=int(axis))


def select(cond: ArrayLike, a: ArrayLike, b: ArrayLike) -> ArrayLike:
    """a where the condition holds, else b."""
    return np.where(cond, a, b)


def identity(x: ArrayLike) -> ArrayLike:
    """x."""
    return x


def shape(x: ArrayLike) -> ArrayLike:
    """The lengths of x."""
    return np.array(x.shape, np.int32)


def reverse(x: ArrayLike, axes: ArrayLike | None = None) -> ArrayLike:
    """Backwards along these axes, or all of them."""
    return np.flip(x, None if axes is None else tuple(map(int, axes)))


def pad(x: ArrayLike, pad: ArrayLike, mode: str = "constant", constant_val: float = 0.0) -> ArrayLike:
    """Longer at both ends of the last axes: `pad` has two counts for each of them."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    return np.pad(x, widths, mode=_PAD_MODES[mode])


MOVING: Mapping[str, Kernel] = {
    kernel.__name__: kernel
    for kernel in (
        reshape, transpose, squeeze, expand_dims, slice_by_index, slice_by_size, slice_update, split, concat, stack,
        tile, gather, gather_along_axis, select, identity, shape, reverse, pad,
    )
}  # fmt: skip


def _slices(
    x: ArrayLike,
    begin: ArrayLike,
    end: ArrayLike,
    stride: ArrayLike | None,
    begin_mask: ArrayLike | None,
    end_mask: ArrayLike | None,
    squeeze_mask: ArrayLike | None,
) -> Slices:
    zeros = [0] * x.ndim
    columns = (begin, end, zeros if stride is None else stride)
    masks = (zeros if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask))
    return tuple(
        int(not open_first and first)
        if alone
        else slice(None if open_first else int(first), None if open_last else int(last), int(step) or None)
        for first, last, step, open_first, open_last, alone in zip(*columns, *masks, strict=True)
    )


def _check_indices(indices: ArrayLike, length: int) -> None:
    if indices.size and not 0 <= indices.min() <= indices.max() < length:
        raise IndexError(f"indices from {indices.min()} to {indices.max()} into a length of {length}")
