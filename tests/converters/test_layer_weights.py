"""The rotated basis of the residual stream: orthogonal, and of no effect on what the layers compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.converters.layer_weights import LayerWeights, ResidualBasis
from edgekit.source import open_source

SIZES = st.sampled_from([8, 24, 63, 64, 96, 576, 1000])
ROUNDING = 1e-5  # of sums of up to a thousand float32 products of size 1


@settings(deadline=None)
@given(size=SIZES, seed=st.integers(0, 1000))
def test_leaving_undoes_entering_and_lengths_stay(size: int, seed: int) -> None:
    basis, rows = ResidualBasis(size), np.random.default_rng(seed).normal(size=(3, size)).astype(np.float32)
    entered = basis.enter(rows)
    np.testing.assert_allclose(basis.leave(entered), rows, atol=ROUNDING)
    np.testing.assert_allclose(np.linalg.norm(entered, axis=1), np.linalg.norm(rows, axis=1), rtol=ROUNDING)


@settings(deadline=None)
@given(size=SIZES)
def test_basis_is_an_orthogonal_matrix(size: int) -> None:
    matrix = ResidualBasis(size).enter(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=ROUNDING)


@pytest.mark.parametrize("size", [64, 576, 4096])
def test_channel_that_stands_out_is_spread(size: int) -> None:
    rows = np.zeros((1, size), np.float32)
    rows[0, size // 3] = 1000
    # Evenly spread it would be 1000 / sqrt(size); the waves' crests are higher by sqrt(2).
    assert np.abs(ResidualBasis(size).enter(rows)).max() <= 1000 * np.sqrt(2 / size) * 1.001


def test_matrices_take_in_norms_and_basis(tiny_model: Any) -> None:
    source = open_source(tiny_model("llama", attention_bias=True, mlp_bias=True))
    weights, stored = LayerWeights(source), dict(source.parts)
    assert weights.basis is not None

    def plain(role: str) -> Any:
        return np.concatenate([tensor.read() for tensor in stored[f"layers.0.{role}"]])

    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    expected = (rows * plain("attention_norm")) @ plain("qkv").T
    np.testing.assert_allclose(weights.basis.enter(rows) @ weights.matrix("layers.0.qkv").T, expected, atol=ROUNDING)
    change = rows @ plain("output").T + plain("output_bias")
    found = rows @ weights.matrix("layers.0.output").T + weights.vector("layers.0.output_bias")
    np.testing.assert_allclose(weights.basis.leave(found), change, atol=ROUNDING)
    np.testing.assert_array_equal(weights.vector("layers.0.mlp_norm"), 1)


def test_norms_behind_the_matrices_leave_the_models_own_basis(tiny_model: Any) -> None:
    source = open_source(tiny_model("gemma2"))
    weights = LayerWeights(source)
    assert weights.basis is None
    plain = np.concatenate([tensor.read() for tensor in source.parts["layers.0.qkv"]])
    np.testing.assert_array_equal(weights.matrix("layers.0.qkv"), plain)
