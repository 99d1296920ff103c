"""LiteRT programs of one graph out of each other: litert-torch takes too long to convert each faulty one.

A weight or a table of rotation is a constant of the decoder that our converter builds: where two decoders differ, one's is
written over the other's, byte for byte what litert-torch would have put there. A window is a constant of the graph, a cache an
input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.child import run_child

__all__ = ["LitertChild", "cross_caches"]


class LitertChild:
    """Takes the place of `run_child`: converts the first decoder, faulty or not, and changes its program into the others'."""

    def __init__(self) -> None:
        self._first: tuple[dict[str, bytes], bytes, dict[str, Any]] | None = None

    def __call__(self, module: str, task: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Write the program of `task`, and give the child's answer."""
        constants, program = _constants(task["decoder"]), Path(task["program"])
        if self._first is None:
            answer = run_child(module, task, **options)
            self._first = constants, program.read_bytes(), answer
            return answer
        first, data, answer = self._first
        program.write_bytes(data)
        _replace(program, {first[name]: new for name, new in constants.items() if first[name] != new})
        return answer


def _constants(decoder: str) -> dict[str, bytes]:
    """What a program holds of a decoder, by name: whole numbers and their scales, floats, and each layer's window."""
    import torch

    from edgekit.converters.litert_weights import digest

    handed = torch.load(decoder, weights_only=False)
    function, found = handed["function"], dict[str, bytes]()
    for name, tensor in [*function.named_parameters(), *function.named_buffers()]:
        values, scales = handed["integers"].get(digest(tensor.numpy()), (tensor.numpy(), np.empty(0)))
        found |= {name: values.tobytes(), f"{name}.scales": scales.tobytes()}
    windows = enumerate(function.attention.windows)
    return found | {f"windows.{layer}": np.int32(window).tobytes() for layer, window in windows}


def _replace(path: Path, changes: Mapping[bytes, bytes]) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    model, done = flatbuffer_utils.read_model(str(path)), set[bytes]()
    for buffer in model.buffers:
        old = b"" if buffer.data is None else np.asarray(buffer.data).tobytes()
        if old in changes:
            buffer.data = np.frombuffer(changes[old], np.uint8)
            done.add(old)
    assert done == changes.keys(), "what differs is in the program"
    flatbuffer_utils.write_model(model, str(path))


def cross_caches(path: Path) -> None:
    """Each layer of a program of two reads the keys and values that the other one kept."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    for function in model.signatureDefs:
        inputs = {each.name.decode(): each for each in function.inputs}
        for kind in ("key", "value"):
            first, second = (inputs[f"past_{kind}_{layer}"] for layer in range(2))
            first.tensorIndex, second.tensorIndex = second.tensorIndex, first.tensorIndex
    flatbuffer_utils.write_model(model, str(path))
