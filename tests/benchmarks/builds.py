"""What the benchmarks compare: EdgeKit's and its peers' builds of one checkpoint. Not a benchmark itself.

Bundles are made anew for every run, as EdgeKit changes; peers' files once, and kept beside the checkpoint's other files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from convert import edgekit_command, genai_command, require, run, write_gguf
from peers import Contender, file_bytes

EDGEKIT_SCHEMES = ("int8", "int4-mixed", "int4")
EDGEKIT_VARIANTS = ("int8-scaled",)
GENAI_VARIANTS: Mapping[str, tuple[str, ...]] = {
    "int4, blocks of 64": ("block_size=64",),
    "int4, blocks of 128": ("block_size=128",),
    "int4, rtn": ("algo_config=rtn",),
    "int4, k_quant": ("algo_config=k_quant",),
    "int4, k_quant_mixed": ("algo_config=k_quant_mixed",),
}
LLAMA_CPP_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
LLAMA_CPP_VARIANTS = {"Q4_K_M": 15, "Q5_K_M": 17}
TORCHAO_RECIPES = {"int4 weight only": "int4wo", "8da4w": "8da4w"}
GGUF_FILE = "the GGUF file"
QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.nthread, options.ftype = 2, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A contender whose artifact is still to be made."""

    name: str
    engine: str
    python: str | None
    make: Callable[[], Path]

    def resolve(self) -> Contender:
        """Make the artifact, or say why not."""
        require(self.engine, self.python)
        assert self.python
        return Contender(self.name, self.engine, self.make(), self.python)


def contenders(source: Path, work: Path, peers_python: str | None) -> list[Candidate]:
    """EdgeKit's main schemes, and the peers' files that most people use."""
    return [
        *(edgekit(source, work, scheme) for scheme in EDGEKIT_SCHEMES),
        genai(source, work, peers_python, "int4", ()),
        *(llama_cpp(source, work, peers_python, kind, number) for kind, number in LLAMA_CPP_TYPES.items()),
    ]


def variants(source: Path, work: Path, peers_python: str | None, torchao_python: str | None) -> list[Candidate]:
    """What else EdgeKit and its peers offer in the same sizes."""
    default = genai(source, work, peers_python, "int4", ())
    k_quants = [llama_cpp(source, work, peers_python, kind, number) for kind, number in LLAMA_CPP_VARIANTS.items()]
    return [
        *(within(source, work, rival) for rival in (default, k_quants[0])),
        *(edgekit(source, work, scheme) for scheme in EDGEKIT_VARIANTS),
        *(genai(source, work, peers_python, name, options) for name, options in GENAI_VARIANTS.items()),
        *k_quants,
        *(torchao(source, work, torchao_python, name, recipe) for name, recipe in TORCHAO_RECIPES.items()),
    ]


def of_file(gguf_file: Path, work: Path, peers_python: str | None) -> list[Candidate]:
    """A quantized GGUF file itself: carried over by EdgeKit, and on llama.cpp."""
    return [
        edgekit(gguf_file, work, "keep", name=f"{GGUF_FILE}: edgekit keep"),
        Candidate(f"{GGUF_FILE}: llama.cpp", "llama.cpp", peers_python, lambda: gguf_file),
    ]


def edgekit(source: Path, work: Path, scheme: str, *, name: str = "") -> Candidate:
    """A bundle."""
    out = work / f"{scheme}.edgekit"

    def make() -> Path:
        run(edgekit_command(source, out, scheme, "--no-verify"), work / "edgekit.log")
        return out

    return Candidate(name or f"edgekit {scheme}", "edgekit", sys.executable, make)


def within(source: Path, work: Path, rival: Candidate) -> Candidate:
    """The bundle that EdgeKit finds for a peer's size."""
    out = work / f"at-{rival.name.replace(' ', '-')}.edgekit"

    def make() -> Path:
        budget = ("--max-size", str(file_bytes(rival.make())))
        run(edgekit_command(source, out, "auto", *budget, "--no-verify"), work / "edgekit.log")
        return out

    return Candidate(f"edgekit at {rival.name}'s bytes", "edgekit", sys.executable, make)


def genai(source: Path, work: Path, python: str | None, name: str, options: Sequence[str]) -> Candidate:
    """A folder of ONNX Runtime GenAI's builder."""
    out = work / "-".join(["genai-int4", *(option.replace("=", "-") for option in options)])

    def make() -> Path:
        if not (out / "genai_config.json").exists():
            run(genai_command(source, out, str(python), *options), work / "genai.log")
        return out

    return Candidate(f"onnxruntime-genai {name}", "onnxruntime-genai", python, make)


def llama_cpp(source: Path, work: Path, python: str | None, kind: str, number: int) -> Candidate:
    """A GGUF file that llama.cpp quantized from a float16 one."""
    return Candidate(
        f"llama.cpp {kind}", "llama.cpp", python, partial(_quantized_gguf, source, work, python, kind, number)
    )


def _quantized_gguf(source: Path, work: Path, python: str | None, kind: str, number: int) -> Path:
    whole, out = work / "f16.gguf", work / f"{kind}.gguf"
    if not whole.exists():
        write_gguf(source, whole)
    if not out.exists():
        run([str(python), "-c", QUANTIZE, str(whole), str(out), str(number)], work / "llama.log")
    return out


def torchao(source: Path, work: Path, python: str | None, name: str, recipe: str) -> Candidate:
    """A recipe of torchao, which is applied when the model is opened."""
    out = work / f"torchao-{recipe}"

    def make() -> Path:
        out.mkdir(exist_ok=True)
        (out / "recipe.json").write_text(json.dumps({"source": str(source.resolve()), "recipe": recipe}))
        return out

    return Candidate(f"torchao {name}", "torchao", python, make)
