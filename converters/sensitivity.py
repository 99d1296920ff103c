"""Sensitivity: what rounding each matrix of a decoder to each format does to what the model says.

A cost is the expected squared error of the matrix's products on calibration text, times what an error there does downstream.

The error is a sum over columns: that of rounding in a column times what the column counts (with GPTQ: what is left once later
columns have made up for it); and where products are computed in int8, what rounding the inputs of each block to 8 bits
adds. With weights of 8 bits that is most of it, and what smaller blocks are better for.

What it does downstream is measured: the matrix alone is rounded to a probing format, the error is added to what it computes and
carried through all that follows to the logits; the KL divergence over the size of the error is the gain. All matrices' errors
ride along in one pass over the layers, so that each layer is loaded once. That such costs add up holds to first order in the
squared errors (for perplexity: arXiv:2411.17525, theorem 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ConversionError
from edgekit.progress import Progress, ProgressFn
from edgekit.quant import BLOCK_SIZES, Rounding, Scaling, WeightFormat
from edgekit.source import Source, Tensor

from .calibrate import second_moments
from .gptq import make_guide
from .layer_run import WITHOUT_CALIBRATION, LayerRun, embed_tokens, open_layer
from .quantize import Floats, dequantize, quantize
from .scaling import SCALED, search_scales, shared_channels, some_rows

__all__ = ["Sensitivity", "expected_errors", "measure_costs", "probe_layers"]

PROBE = WeightFormat(4, 64)
PROBE_TEXTS, PROBE_TOKENS, PROBE_SKIPPED = 6, 64, 24  # of each text this many tokens; the first are not compared
# Of what the guide expects, the error that GPTQ leaves on texts it did not learn from: between 0.5 and 0.9 in 20 matrices of
# SmolLM2-135M, with 2 and 4 bits. The guide counts products of different columns by half, and so expects too much.
UNSEEN = 0.75
ROWS_SAMPLED = 256  # of each matrix
_VOCABULARY_AT_ONCE = 4096

Moments = NDArray[np.float64]


def measure_costs(
    source: Source,
    texts: Sequence[Sequence[int]],
    place: Path,
    formats: Mapping[str, Sequence[WeightFormat]],
    rounding: Rounding,
    scaling: Scaling,
    *,
    int8_activations: bool,
    on_progress: ProgressFn | None = None,
) -> dict[str, tuple[float, ...]]:
    """Nats of KL divergence that each format of each role is expected to cost.

    Args:
        source: The checkpoint.
        texts: Token ids that the model meets.
        place: A folder where layers are written aside.
        formats: Block formats by role.
        int8_activations: Whether products are computed in int8.

    Raises:
        SourceError, ConversionError: See `second_moments`; or memory does not suffice.
    """
    try:
        scales: dict[str, Floats] | None = {} if scaling == "awq" else None
        errors = expected_errors(
            source, texts, place, formats, rounding,
            scales=scales, int8_activations=int8_activations, on_progress=on_progress,
        )  # fmt: skip
        found = probe_layers(source, texts, place, frozenset(formats), scales=scales or {}, on_progress=on_progress)
    except MemoryError as error:
        raise ConversionError("not enough memory to measure sensitivities", hint=WITHOUT_CALIBRATION) from error
    return {
        role: tuple(
            found[role].gain * (error + (found[role].input_error(form.block_size) if int8_activations else 0))
            for error, form in zip(errors[role], some, strict=True)
        )
        for role, some in formats.items()
    }


def expected_errors(
    source: Source,
    texts: Sequence[Sequence[int]],
    place: Path,
    formats: Mapping[str, Sequence[WeightFormat]],
    rounding: Rounding,
    *,
    scales: dict[str, Floats] | None = None,
    int8_activations: bool = False,
    on_progress: ProgressFn | None = None,
) -> dict[str, tuple[float, ...]]:
    """The mean squared error of each role's products for one token, summed over its rows, for each of its formats.

    Args:
        scales: Gets the factors that columns are scaled by before they are rounded; None: they are not.
        int8_activations: Whether products are computed in int8, which the factors mind.
    """
    found, tokens = {}, sum(map(len, texts))
    for some in second_moments(source, texts, place, frozenset(formats), stage="measure", on_progress=on_progress):
        for role in list(some):
            moments = some.pop(role)
            rows, total = some_rows(source.parts[role], ROWS_SAMPLED)
            if scales is not None and role.rpartition(".")[2] in SCALED:
                channels = shared_channels(source.config, role, rows.shape[1])
                # As for the probing format: factors hardly depend on the format.
                scales[role] = search_scales(rows, moments, PROBE, channels, int8_activations=int8_activations)
                rows, moments = rows * scales[role], moments / np.outer(scales[role], scales[role]).astype(np.float64)
            counts = make_guide(moments).costs * UNSEEN if rounding == "gptq" else moments.diagonal()
            weight = total / len(rows) / tokens
            found[role] = tuple(_error(rows, form, counts) * weight for form in formats[role])
    if "embedding" in formats and not source.config.tied_embeddings:  # only looked up: one row for a token
        rows, _ = some_rows(source.parts["embedding"], ROWS_SAMPLED)
        one = np.full(rows.shape[1], source.config.embedding_scale**2 / len(rows))
        found["embedding"] = tuple(_error(rows, form, one) for form in formats["embedding"])
    return found


def _error(rows: Floats, form: WeightFormat, counts: Moments) -> float:
    difference = dequantize(quantize(rows, form), form, rows.shape[1]) - rows
    return float(np.square(difference, dtype=np.float64).sum(axis=0) @ counts)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What is downstream of a role's products, and what they are of.

    Attributes:
        gain: Nats of KL divergence for each unit of squared error of one token's products, over all rows.
        peaks: By block size, float64 [blocks]: the largest square of a block's inputs, on the mean of the tokens.
        energy: float64 [columns]: the sum of the squares of the weight's column.
    """

    gain: float
    peaks: Mapping[int, Moments]
    energy: Moments

    def input_error(self, block_size: int) -> float:
        """Squared error of one token's products where each block of its inputs is rounded to 255 levels over its range."""
        if block_size not in self.peaks:
            return 0.0
        peaks = self.peaks[block_size]
        columns = np.pad(self.energy, (0, len(peaks) * block_size - len(self.energy)))
        return (
            float(columns.reshape(len(peaks), -1).sum(axis=1) @ peaks) / 127**2 / 12
        )  # of a uniform error: step^2 / 12


@dataclass(slots=True)
class _Probe:
    """A copy of the model in which one role is rounded (none: the undisturbed one).

    Attributes:
        states: The hidden states of each text, float32 [tokens, hidden].
        squared_error: Of the role's products, over all tokens and rows.
        peaks: By block size, the sum over tokens of the largest square in each block of the role's inputs.
        energy: Of the weight's columns: the sums of their squares.
    """

    role: str
    states: list[Floats]
    squared_error: float = 0.0
    normed: list[Floats] = field(default_factory=list)
    peaks: dict[int, Moments] = field(default_factory=dict)
    energy: Moments = field(default_factory=lambda: np.zeros(1))

    def see(self, inputs: Floats) -> None:
        """Add a text's inputs, float32 [tokens, columns]."""
        for size in BLOCK_SIZES:
            blocks = -(-inputs.shape[1] // size)
            padded = np.pad(inputs, ((0, 0), (0, blocks * size - inputs.shape[1])))
            largest = np.abs(padded).reshape(len(inputs), blocks, size).max(axis=2)
            self.peaks[size] = self.peaks.get(size, 0) + np.square(largest, dtype=np.float64).sum(axis=0)


def probe_layers(
    source: Source,
    texts: Sequence[Sequence[int]],
    place: Path,
    roles: frozenset[str],
    *,
    scales: Mapping[str, Floats] = MappingProxyType({}),
    on_progress: ProgressFn | None = None,
) -> dict[str, Sensitivity]:
    """Measure what is downstream of each role, on the first tokens of some of the texts.

    Args:
        scales: By role, what a matrix's columns are multiplied by, and its inputs divided.
    """
    probed = [text[:PROBE_TOKENS] for text in _spread(texts)]
    tokens = sum(map(len, probed))
    plain = _Probe(
        "", [embed_tokens(source.parts["embedding"], np.asarray(text, np.int64), source.config) for text in probed]
    )
    probes = [plain]
    head = "embedding" if source.config.tied_embeddings else "head"
    if "embedding" in roles:
        probes.append(_embedding_probe(source, plain))
    if head in roles - {"embedding"}:
        probes.append(_Probe(head, plain.states))
    layers = len(source.config.layers)
    for index in range(layers):
        with open_layer(source, index, place, context=max(map(len, probed)), changes=True) as layer:
            _advance(source, layer, probes, roles, scales)
        if on_progress:
            on_progress(Progress("probe", index + 1, layers, "layers"))
    divergences = _divergences(source, probes, head)
    return {
        probe.role: Sensitivity(
            divergence * tokens / probe.squared_error if probe.squared_error else 0.0,
            {size: total / tokens for size, total in probe.peaks.items()},
            probe.energy,
        )
        for probe, divergence in zip(probes[1:], divergences, strict=True)
    }


def _spread(texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Some of the texts, evenly spread, of those that are long enough."""
    long = [text for text in texts if len(text) > PROBE_SKIPPED] or list(texts)
    step = max(len(long) // PROBE_TEXTS, 1)
    return long[::step][:PROBE_TEXTS]


def _embedding_probe(source: Source, plain: _Probe) -> _Probe:
    """With rounded hidden states to begin with. Of tied embeddings the head's products, found later, are the error."""
    scale = np.float32(source.config.embedding_scale)
    rounded = [dequantize(quantize(state / scale, PROBE), PROBE, state.shape[1]) * scale for state in plain.states]
    if source.config.tied_embeddings:
        return _Probe("embedding", rounded)
    error = sum(float(np.square(after - before).sum()) for after, before in zip(rounded, plain.states, strict=True))
    return _Probe("embedding", rounded, error)


def _advance(
    source: Source, layer: LayerRun, probes: list[_Probe], roles: frozenset[str], scales: Mapping[str, Floats]
) -> None:
    """Carry every probe through a layer, and add those that start in it."""
    starting = {role: _Probe(role, []) for role in layer.factors if role in roles}
    changes = {}
    for role, probe in starting.items():
        changes[role], energy = _probing_error(source.parts[role])
        probe.energy = energy * np.square(scales.get(role, 1.0), dtype=np.float64)
    for state in probes[0].states:
        factors = layer.run(state, keep=frozenset(starting)).factors
        for role, probe in starting.items():
            probe.see(factors[role] / scales[role] if role in scales else factors[role])
            change = factors[role] @ changes[role].T
            probe.squared_error += float(np.vdot(change, change))
            found = layer.run(state, changes={role: change})
            probe.states.append(found.residual)
            probe.normed.append(found.normed)
    for probe in probes:
        outputs = [layer.run(state) for state in probe.states]
        probe.states, probe.normed = [out.residual for out in outputs], [out.normed for out in outputs]
    probes.extend(starting.values())


def _probing_error(tensors: tuple[Tensor, ...]) -> tuple[Floats, Moments]:
    """What rounding changes in a weight, float32 [rows, columns], and the sums of the squares of its columns."""
    weights = np.concatenate([tensor.read() for tensor in tensors])
    error: Floats = dequantize(quantize(weights, PROBE), PROBE, weights.shape[1]) - weights
    return error, np.square(weights, dtype=np.float64).sum(axis=0)


def _divergences(source: Source, probes: list[_Probe], head: str) -> list[float]:
    """Mean KL divergence of each probe's next tokens from the undisturbed model's; the head is read in parts, twice."""
    softcap, parts = source.config.logits_softcap, _HeadParts(source.parts[head])
    plain, *others = probes
    rows, reference = _compared(plain), _LogSum(len(_compared(plain)))
    probed = [probe for probe in others if probe.role == head]
    for weights in parts.read():
        reference.add(_logits(rows, weights, softcap))
        for probe in probed:
            probe.energy = probe.energy + np.square(weights, dtype=np.float64).sum(axis=0)
    for probe, text in ((probe, text) for probe in probed for text in plain.normed):
        probe.see(text)
    sums, gaps = [_LogSum(len(rows)) for _ in others], np.zeros((len(others), len(rows)))
    for weights in parts.read():
        logits = _logits(rows, weights, softcap)
        probabilities = np.exp(logits - reference.value[:, None])
        for number, probe in enumerate(others):
            mine, theirs = weights, _compared(probe)
            if probe.role == head:
                mine = dequantize(quantize(weights, PROBE), PROBE, weights.shape[1])
                change = theirs @ (mine - weights).T
                probe.squared_error += float(np.vdot(change, change)) * sum(map(len, probe.normed)) / len(theirs)
            found = _logits(theirs, mine, softcap)
            sums[number].add(found)
            gaps[number] += np.einsum("ij,ij->i", probabilities, logits - found, dtype=np.float64)
    return [float(np.mean(gap - reference.value + total.value)) for gap, total in zip(gaps, sums, strict=True)]


@dataclass(frozen=True, slots=True)
class _HeadParts:
    tensors: tuple[Tensor, ...]

    def read(self) -> Iterator[Floats]:
        """Rows of the head, some at a time."""
        for tensor in self.tensors:
            for start in range(0, tensor.shape[0], _VOCABULARY_AT_ONCE):
                yield tensor.read(start, min(start + _VOCABULARY_AT_ONCE, tensor.shape[0]))


class _LogSum:
    """The logarithm of a sum of exponentials along rows, of which columns come some at a time."""

    def __init__(self, rows: int) -> None:
        self._most, self._sum = np.full(rows, -np.inf), np.zeros(rows)

    def add(self, logits: Floats) -> None:
        """Add columns, float32 [rows, columns]."""
        most = np.maximum(self._most, logits.max(axis=1))
        self._sum *= np.exp(self._most - most)
        self._sum += np.exp(logits - most[:, None].astype(np.float32)).sum(axis=1, dtype=np.float64)
        self._most = most

    @property
    def value(self) -> Moments:
        """Of each row, float64."""
        value: Moments = self._most + np.log(self._sum)
        return value


def _compared(probe: _Probe) -> Floats:
    """The normed states whose next tokens are compared; a text's first ones have seen too little."""
    return np.concatenate([text[min(PROBE_SKIPPED, len(text) - 1) :] for text in probe.normed])


def _logits(rows: Floats, weights: Floats, softcap: float) -> Floats:
    logits: Floats = rows @ weights.T
    if softcap:
        logits = np.tanh(logits / np.float32(softcap)) * np.float32(softcap)
    return logits
