"""Context binaries: an NPU's graphs compiled for one chip at conversion, so that a device loads them without compiling."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from edgekit.graph import Graph

from .providers import GraphSession, open_session

__all__ = ["write_contexts"]

_COMPILED = ("prefill", "decode")


def write_contexts(directory: Path, graph: Graph) -> tuple[str, ...]:
    """Compile the prefill and the decode graph into one binary, in which they share their weights.

    Args:
        directory: The bundle.
        graph: A program of `onnx-qdq`; its `npu` names the chip.

    Returns:
        The files written, relative to the bundle: for each graph an ONNX file that stands for it, then the binary.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        BundleError: Qualcomm's compiler does not take a graph.
    """
    kept: list[GraphSession] = []  # what is shared lives as long as the first session
    written = []
    for number, name in enumerate(_COMPILED):
        file = next(file for file in graph.files if file.endswith(f"/{name}.onnx"))
        place = file.replace(f"{name}.onnx", f"{name}_context.onnx")
        options = ort.SessionOptions()
        settings = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(directory / place),
            "ep.context_embed_mode": "0",
            "ep.share_ep_contexts": "1",
            "ep.stop_share_ep_contexts": str(int(number == len(_COMPILED) - 1)),
        }
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        chip = dict(graph.npu) | {"enable_htp_weight_sharing": "1"}
        kept.append(open_session(directory / file, "qnn", options=options, provider_options=chip, only=True))
        written.append(place)
    binaries = sorted((directory / written[0]).parent.glob("*_context_qnn.bin"))
    return (*written, *(path.relative_to(directory).as_posix() for path in binaries))
