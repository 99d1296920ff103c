"""Packing at every width, against the definition: value i stands in bits i * width and on of the whole run of bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.converters.packing import pack, unpack
from edgekit.quant import BLOCK_SIZES

WIDTHS = (2, 4, 8)


def by_definition(values: list[int], bits: int) -> bytes:
    whole = sum(value << (place * bits) for place, value in enumerate(values))
    return whole.to_bytes(-(-len(values) * bits // 8), "little")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), bits=st.sampled_from(WIDTHS))
def test_bytes_are_those_of_the_definition_and_come_back(data: st.DataObject, bits: int) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    packed = pack(np.array([values], np.uint8), bits)
    assert packed.tobytes() == by_definition(values, bits)
    assert unpack(packed, bits, len(values)).tolist() == [values]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_whole_blocks_come_back(size: int, bits: int) -> None:
    values = np.random.default_rng(size).integers(0, 1 << bits, (3, 5, size), dtype=np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (3, 5, size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, size), values)
