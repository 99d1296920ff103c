"""In LiteRT's own environment: converts a decoder that another process built, and puts its whole numbers into the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit.child import answer
from edgekit.quiet import quieted

from .disk_space import writing
from .litert_attention import LitertFunction
from .litert_integers import put_integers

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
            _write_floats(handed.pop("function").eval(), Path(program), chunk, rope_length)  # and gone: it takes memory
        return {"operators": put_integers(Path(program), handed["integers"])}


def _write_floats(function: LitertFunction, path: Path, chunk: int, rope_length: bool) -> None:
    import litert_torch

    functions = {"prefill": (chunk, True), "score": (chunk, False), "decode": (1, False)}
    converter = litert_torch.Converter()
    for name, (new, one_row) in functions.items():
        inputs = function.example(new, one_row=one_row, rope_length=rope_length)
        converter.add_signature(name, function, sample_kwargs=inputs)
    converter.convert(lightweight_conversion=True).export(str(path))


if __name__ == "__main__":
    answer(convert)
