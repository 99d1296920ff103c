"""ONNX Runtime on an NPU: graphs of static shape for the layers, and the embedding and the head on the CPU.

A prompt is computed in chunks, the last one filled up with tokens that nothing sees; a single token has a graph of its own. The
cache holds the whole context from the start, in 8-bit numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError, first_line
from edgekit.graph import Graph
from edgekit.runtime_options import RuntimeOptions

from .providers import GraphSession, find_devices, open_session
from .session_options import session_options
from .static_decoder import HostCacheDecoder

__all__ = ["QdqBackend"]

_GRAPHS = ("embedding", "prefill", "decode", "head")
_RESIDUAL = "residual"
Sessions = Mapping[str, GraphSession]


class QdqBackend:
    """A loaded program.

    Args:
        directory: The bundle.
        graph: The program's description.
        context: Tokens of the cache.
        provider: What runs the NPU's graphs: `qnn`, `openvino`, or `cpu` as a fall-back. The others run on the CPU.
        options: How to load the graphs.

    Raises:
        BundleError: A graph is not taken, or is not what the manifest describes.
        MissingExtraError: The provider is not installed.
    """

    runtime = None
    end_tokens = None

    def __init__(
        self,
        directory: Path,
        graph: Graph,
        *,
        context: int,
        options: RuntimeOptions,
        provider: str = "cpu",
    ) -> None:
        if not graph.chunk:  # a manifest that leaves it out describes another kind of program
            raise _not_described(graph)
        self.graph, self.context = graph, context
        self.sessions: Sessions | None = {
            name: _open(directory, name, provider if name in {"prefill", "decode"} else "cpu", options, graph)
            for name in _GRAPHS
        }
        _check_declared(self.sessions, graph, context)

    def decoder(self) -> QdqDecoder:
        """A new sequence.

        Raises:
            GenerationError: The model is closed.
        """
        if self.sessions is None:
            raise GenerationError("the model is closed", hint="load it again")
        return QdqDecoder(self.graph, self.sessions, self.context)

    def release(self) -> None:
        """See `Backend.release`: there is nothing here that is known to be free."""

    def close(self) -> None:
        """Free the weights, once every decoder is closed too."""
        self.sessions = None


def _open(directory: Path, name: str, provider: str, options: RuntimeOptions, graph: Graph) -> GraphSession:
    if provider == "qnn" and graph.contexts and "npu" in find_devices("qnn"):
        with suppress(BundleError):  # compiled for another chip, or by a newer compiler: it is compiled here
            return _open_context(directory / graph.contexts[("prefill", "decode").index(name)], options)
    return open_session(
        directory / graph.files[_GRAPHS.index(name)],
        provider,
        options=session_options(options),
        provider_options=graph.npu if provider == "qnn" else {},
        only=provider != "cpu",
    )


def _open_context(path: Path, options: RuntimeOptions) -> GraphSession:
    """Load what was compiled at conversion. Only hardware does: the emulator crashes on a context binary (QNN 2.51)."""
    settings = session_options(options)
    settings.add_session_config_entry("ep.share_ep_contexts", "1")
    return open_session(path, "qnn", options=settings, only=True)


def _check_declared(sessions: Sessions, graph: Graph, context: int) -> None:
    """Compare what the manifest says of the program with the graphs."""
    layout = graph.cache
    ends = {"embedding": set(graph.inputs.values()) - {graph.inputs["logits_start"]}}
    ends["head"] = {_RESIDUAL, graph.inputs["logits_start"]}
    agrees = all({value.name for value in sessions[name].get_inputs()} == names for name, names in ends.items())
    agrees = agrees and sessions["head"].get_outputs()[0].shape[-1] == graph.vocab_size
    agrees = agrees and layout.dtype == "uint8" and layout.keys_transposed
    for name, new in (("prefill", graph.chunk), ("decode", 1)):
        shapes = {value.name: list(value.shape) for value in sessions[name].get_inputs()}
        outputs = {value.name: list(value.shape) for value in sessions[name].get_outputs()}
        for index in range(min(layout.layers, len(shapes))):
            key, value = (past.replace("{}", str(index)) for past in layout.past)
            new_key, new_value = (present.replace("{}", str(index)) for present in layout.present)
            agrees = agrees and (
                shapes.get(key) == [layout.kv_heads, layout.head_dim, context]
                and shapes.get(value) == [layout.kv_heads, context, layout.head_dim]
                and outputs.get(new_key) == [layout.kv_heads, layout.head_dim, new]
                and outputs.get(new_value) == [layout.kv_heads, new, layout.head_dim]
            )
        agrees = agrees and _RESIDUAL in outputs and len(outputs) == 1 + 2 * layout.layers
    if not agrees:
        raise _not_described(graph)


def _not_described(graph: Graph) -> BundleError:
    return BundleError(
        f"{graph.files[0]} and the graphs beside it are not the program that the manifest describes",
        hint="convert the model again",
    )


class QdqDecoder(HostCacheDecoder[Sessions]):
    """One sequence and its cache of fixed size."""

    def __init__(self, graph: Graph, sessions: Sessions, context: int) -> None:
        super().__init__(sessions, graph, context)
        self._embedded = [output.name for output in sessions["embedding"].get_outputs()]
        self._outputs = [output.name for output in sessions["decode"].get_outputs()]
        self._first_position = 0

    def rewind(self, length: int) -> None:
        """See `Decoder.rewind`."""
        super().rewind(length)
        if not length:
            self._first_position = 0

    def forget(self, count: int) -> None:
        """See `Decoder.forget`: what is left moves to the front."""
        if not self._graph.positions or not 0 <= count <= self._length:
            raise ValueError(f"forget {count} of {self._length} tokens")
        kept, self._length = self._length - count, 0  # nothing is there if an interrupt comes
        for part in self._parts():
            part[:, :kept] = part[:, count : count + kept].copy()
        self._first_position += count
        self._length = kept

    def write_cache(self, arrays: Sequence[NDArray[np.generic]], first_position: int = 0) -> None:
        """See `Decoder.write_cache`."""
        super().write_cache(arrays, 0 if self._graph.positions else first_position)
        self._first_position = first_position

    def _step(self, program: Sessions, tokens: NDArray[np.int64], wanted: int, rope_length: int) -> NDArray[np.float32]:
        try:
            residual = self._layers(program, tokens, rope_length)
            if wanted < 1:
                return np.empty((0, self._graph.vocab_size), np.float32)
            feeds = {
                _RESIDUAL: residual,
                self._graph.inputs["logits_start"]: np.array([len(tokens) - wanted], np.int64),
            }
            logits: NDArray[np.float32] = program["head"].run([self._graph.outputs["logits"]], feeds)[0][0]
            return logits
        except GenerationError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class but this
            raise GenerationError(f"ONNX Runtime failed: {first_line(error)}") from error

    def _layers(self, program: Sessions, tokens: NDArray[np.int64], rope_length: int) -> NDArray[np.generic]:
        """The residual stream behind the layers, [tokens, hidden]; the cache keeps keys and values."""
        graph, new = self._graph, len(tokens)
        name, size = ("decode", 1) if new == 1 else ("prefill", graph.chunk)
        ids = np.zeros((1, size), np.int64)
        ids[0, :new] = tokens
        numbers = {
            "tokens": ids,
            "past_length": np.array(self._length, np.int64),
            "rope_length": np.array(rope_length, np.int64),
            "first_position": np.array(self._first_position, np.int64),
        }
        feeds = {input_: numbers[meaning] for meaning, input_ in graph.inputs.items() if meaning in numbers}
        found = program["embedding"].run(self._embedded, feeds)
        inputs = dict(zip(self._embedded, found, strict=True)) | self._cache
        outputs = dict(zip(self._outputs, program[name].run(self._outputs, inputs), strict=True))
        self._keep(outputs, new)
        residual: NDArray[np.generic] = outputs[_RESIDUAL][:new]
        return residual
