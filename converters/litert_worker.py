"""In LiteRT's own environment: converts a decoder that another process built, and puts its whole numbers into the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.child import answer
from edgekit.errors import ConversionError
from edgekit.quiet import quieted

from .disk_space import writing
from .litert_attention import LitertFunction
from .litert_weights import Integers, digest

__all__ = ["convert"]


def convert(decoder: str, program: str, chunk: int, rope_length: bool) -> dict[str, Any]:
    """Convert.

    Args:
        decoder: A file that torch.save wrote: `function` and `integers`, see `to_litert`.
        program: The file to write.
        chunk: Tokens of `prefill` and `score`.
        rope_length: The functions take one.

    Returns:
        `operators`: for each function, how often it has each.
    """
    with quieted(), writing(Path(program)):
        import torch

        handed = torch.load(decoder, weights_only=False)  # written by the process that started this one
        with torch.no_grad():
            _write_floats(handed["function"].eval(), Path(program), chunk, rope_length)
        return {"operators": _put_integers(Path(program), handed["integers"])}


def _write_floats(function: LitertFunction, path: Path, chunk: int, rope_length: bool) -> None:
    import litert_torch

    functions = {"prefill": (chunk, True), "score": (chunk, False), "decode": (1, False)}
    converter = litert_torch.Converter()
    for name, (new, one_row) in functions.items():
        inputs = function.example(new, one_row=one_row, rope_length=rope_length)
        converter.add_signature(name, function, sample_kwargs=inputs)
    converter.convert(lightweight_conversion=True).export(str(path))


def _put_integers(path: Path, integers: dict[str, Integers]) -> dict[str, dict[str, int]]:
    """Replace the constants that are known by their whole numbers, each kept once; the operators of each function.

    Raises:
        ConversionError: A matrix is not in the file as it was given.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    buffers = dict[str, int]()  # of whole numbers, by digest
    known = dict[int, str]()  # digests of the other buffers; empty where they are no matrix
    for tensor in (tensor for subgraph in model.subgraphs for tensor in subgraph.tensors):
        if tensor.buffer not in known:
            data = model.buffers[tensor.buffer].data
            name = "" if data is None else digest(np.asarray(data))
            known[tensor.buffer] = name if name in integers else ""
        if name := known[tensor.buffer]:
            _store(tensor, buffers.setdefault(name, tensor.buffer), *integers[name])
    missing = len(integers.keys() - buffers.keys())
    if missing:
        raise ConversionError(f"{missing} of {len(integers)} matrices are not in LiteRT's program as they were given")
    for buffer in {index for index, name in known.items() if name} - set(buffers.values()):  # a second copy
        model.buffers[buffer].data = None
    for name, buffer in buffers.items():
        model.buffers[buffer].data = np.ascontiguousarray(integers[name][0]).reshape(-1).view(np.uint8)
    if integers:
        flatbuffer_utils.write_model(model, str(path))
    names = {each.subgraphIndex: each.signatureKey.decode() for each in model.signatureDefs}
    return {
        names[index]: Counter(flatbuffer_utils.opcode_to_name(model, each.opcodeIndex) for each in subgraph.operators)
        for index, subgraph in enumerate(model.subgraphs)
        if index in names
    }


def _store(tensor: Any, buffer: int, values: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    """Make a tensor one of 8-bit numbers with a scale for each row."""
    from ai_edge_litert import schema_py_generated as schema

    tensor.type, tensor.buffer = schema.TensorType.INT8, buffer
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = scales
    tensor.quantization.zeroPoint = np.zeros(len(scales), np.int64)
    tensor.quantization.quantizedDimension = 0


if __name__ == "__main__":
    answer(convert)
