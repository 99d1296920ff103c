"""The layers' weights as an NPU multiplies them: in a basis of the residual stream in which no channel stands out.

Language models keep values a hundred times larger than the rest in a few channels of the residual stream. Whole numbers over
such a range leave few steps for all others. An orthogonal change of basis spreads those values over many channels and changes
nothing that the model computes: root mean squares stay the same, and the matrices on either side take it in. The norms'
weights, which do not commute with it, move into the matrices behind them. (As QuaRot does, arXiv:2404.00456.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.source import Source

from .weight_rows import read_floats

__all__ = ["LayerWeights", "ResidualBasis"]

LARGEST_BUTTERFLY = 64
SEED = 404
_NORM_BEFORE = {"qkv": "attention_norm", "gate_up": "mlp_norm"}
Floats = NDArray[np.float32]


class ResidualBasis:
    """An orthogonal matrix of the form signs x (butterfly ⊗ waves), small enough to apply at run time.

    Attributes:
        signs: float32 [size].
        butterfly: A Hadamard matrix, float32 [n, n], n the largest power of two up to 64 that divides the size.
        waves: A cosine transform (DCT-II), float32 [size / n, size / n].
    """

    def __init__(self, size: int) -> None:
        count = math.gcd(size, LARGEST_BUTTERFLY)
        self.signs: Floats = np.asarray(np.random.default_rng(SEED).choice([-1, 1], size), np.float32)
        butterfly: NDArray[np.float64] = np.ones((1, 1))
        while len(butterfly) < count:
            butterfly = np.block([[butterfly, butterfly], [butterfly, -butterfly]]) / math.sqrt(2)
        self.butterfly: Floats = np.asarray(butterfly, np.float32)
        self.waves = _cosine_transform(size // count)

    def enter(self, rows: Floats) -> Floats:
        """Rows of the model's own basis, float32 [rows, size], in this one."""
        blocks = (rows * self.signs).reshape(len(rows), len(self.butterfly), -1)
        return np.asarray(self.butterfly @ blocks @ self.waves, np.float32).reshape(rows.shape)

    def leave(self, rows: Floats) -> Floats:
        """Undo `enter`."""
        blocks = rows.reshape(len(rows), len(self.butterfly), -1)
        return np.asarray(self.butterfly.T @ blocks @ self.waves.T, np.float32).reshape(rows.shape) * self.signs


class LayerWeights:
    """Reads the weights of layers.

    `basis` is None where norms stand behind the matrices too: nothing can take their weights in.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        config = source.config
        self.basis = ResidualBasis(config.hidden_size) if config.norm == "pre" else None

    def matrix(self, role: str) -> Floats:
        """A role's weight, float32 [outputs, inputs].

        Raises:
            SourceError: A weight is not a finite number.
        """
        weights, basis = self._stored(role), self.basis
        layer, _, kind = role.rpartition(".")
        if basis is None:
            return weights
        if kind in _NORM_BEFORE:
            return basis.enter(weights * self._norm(f"{layer}.{_NORM_BEFORE[kind]}"))
        return np.ascontiguousarray(basis.enter(np.ascontiguousarray(weights.T)).T)

    def vector(self, role: str) -> Floats:
        """The numbers of a norm or a bias.

        Raises:
            SourceError: A number is not finite.
        """
        kind = role.rpartition(".")[2]
        if kind.endswith("_norm"):
            numbers = self._norm(role)
            return np.ones_like(numbers) if self.basis and kind in _NORM_BEFORE.values() else numbers
        numbers = self._stored(role)
        return self.basis.enter(numbers[None])[0] if self.basis and kind in {"output_bias", "down_bias"} else numbers

    def _norm(self, role: str) -> Floats:
        return self._stored(role) + np.float32(self._source.config.norm_offset)

    def _stored(self, role: str) -> Floats:
        parts = self._source.parts[role]
        return np.concatenate([read_floats(tensor, 0, tensor.shape[0]) for tensor in parts])


def _cosine_transform(size: int) -> Floats:
    """Orthonormal DCT-II, [size, size]."""
    places = np.arange(size)
    waves = np.cos(np.pi / size * np.outer(places, places + 0.5)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.astype(np.float32)
