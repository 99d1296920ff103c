"""Context binaries: an NPU's graphs compiled for one chip at conversion, so that a device loads them without compiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgekit.child import answer, run_child
from edgekit.errors import MissingExtraError
from edgekit.graph import Graph
from edgekit.registry import OPTIONAL

from .providers import GraphSession, open_session

__all__ = ["write_contexts"]

_COMPILED = ("prefill", "decode")
_COMPILER = "onnxruntime_qnn"
COMPILE_TIMEOUT_S = 7200.0  # so long that only a compiler that hangs meets it


def write_contexts(directory: Path, graph: Graph) -> tuple[str, ...]:
    """Compile the prefill and the decode graph into one binary, in which they share their weights.

    Qualcomm's compiler runs in another process: its crash is not ours.

    Args:
        directory: The bundle.
        graph: A program of `onnx-qdq`; its `npu` names the chip.

    Returns:
        The files written, relative to the bundle: for each graph an ONNX file that stands for it, then the binary.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ChildError: The compiler does not take a graph, crashed, or did not end.
    """
    if find_spec(_COMPILER) is None:
        raise MissingExtraError(*OPTIONAL[_COMPILER])
    graphs = [next(file for file in graph.files if file.endswith(f"/{name}.onnx")) for name in _COMPILED]
    task = {"directory": str(directory), "graphs": graphs, "chip": dict(graph.npu)}
    written: list[str] = run_child(__name__, task, timeout_s=COMPILE_TIMEOUT_S)["written"]
    return tuple(written)


def _compile(directory: str, graphs: Sequence[str], chip: Mapping[str, str]) -> dict[str, Any]:
    """In the child: compile the graphs, files of the bundle in this directory, for the chip."""
    kept: list[GraphSession] = []  # what is shared lives as long as the first session
    written = []
    for number, file in enumerate(graphs):
        place = f"{file.removesuffix('.onnx')}_context.onnx"
        options = ort.SessionOptions()
        settings = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(Path(directory) / place),
            "ep.context_embed_mode": "0",
            "ep.share_ep_contexts": "1",
            "ep.stop_share_ep_contexts": str(int(number == len(graphs) - 1)),
        }
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        compiled = {**chip, "enable_htp_weight_sharing": "1"}
        kept.append(open_session(Path(directory) / file, "qnn", options=options, provider_options=compiled, only=True))
        written.append(place)
    binaries = sorted((Path(directory) / written[0]).parent.glob("*_context_qnn.bin"))
    return {"written": [*written, *(path.relative_to(directory).as_posix() for path in binaries)]}


if __name__ == "__main__":
    answer(_compile)
