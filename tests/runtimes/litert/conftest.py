"""Tiny models as LiteRT programs. One process converts them all: importing LiteRT's converter takes as long as converting."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import edgekit
from edgekit.errors import ConversionError
from edgekit.graph import Graph
from edgekit.plan import make_plan
from edgekit.registry import CONVERTERS, load_attribute
from edgekit.runtime_options import RuntimeOptions
from edgekit.runtimes.backend_litert import LitertBackend
from edgekit.source import open_source
from edgekit.target import load_target

CONTEXT = 96
HOME = str(Path(edgekit.__file__).parent.parent)
WORKER = "edgekit.converters.litert_worker"
Convert = Callable[..., "Converted"]

_SERVE = """
import json, sys
sys.path.append({home!r})
from {worker} import convert
for line in sys.stdin:
    sys.stdout.write("answer " + json.dumps(convert(**json.loads(line))) + "\\n")
    sys.stdout.flush()
"""


class Converted(NamedTuple):
    """A program on disk, its description, and the model that it was made from."""

    directory: Path
    graph: Graph
    source: Path

    def expected(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary], by transformers in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.source, attn_implementation="eager").eval()
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
        return logits

    def load(self, *, graph: Graph | None = None, context: int = CONTEXT, tried: bool = True) -> LitertBackend:
        """The backend; in this process alone unless told otherwise."""
        options = RuntimeOptions(threads=1)
        return LitertBackend(self.directory, graph or self.graph, context=context, options=options, tried=tried)


class _Converter:
    """Takes the place of `run_child`: the process that it would start, kept for the next conversion."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, module: str, task: Mapping[str, Any], *, python: Path, **options: Any) -> dict[str, Any]:
        assert module == WORKER
        if self._process is None:
            command = [str(python), "-c", _SERVE.format(worker=WORKER, home=HOME)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
        raise AssertionError("LiteRT's converter ended: its reason is above")

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


@pytest.fixture(scope="package")
def convert_litert(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Convert]:
    """`convert_litert(model_type, quant, **config)`: a program of such a model, made once; skips where its tools are not."""
    made: dict[str, Converted] = {}
    converter = _Converter()

    def convert(model_type: str, quant: str, **changes: Any) -> Converted:
        key = f"{model_type} {quant} {sorted(changes.items(), key=str)}"
        if key not in made:
            source, directory = tiny_model(model_type, **changes), tmp_path_factory.mktemp("litert") / "bundle"
            directory.mkdir()
            opened = open_source(source)
            plan = make_plan(opened, load_target("galaxy-s24"), format="litert", quant=quant, context=CONTEXT)
            made[key] = Converted(directory, _export(opened, plan, directory, converter), source)
        return made[key]

    yield convert
    converter.close()


def _export(opened: Any, plan: Any, directory: Path, converter: _Converter) -> Graph:
    with pytest.MonkeyPatch.context() as patch:
        export = load_attribute(CONVERTERS["litert"])
        patch.setattr("edgekit.converters.to_litert.run_child", converter)
        try:
            graph: Graph = export(opened, plan, directory)
        except ConversionError as error:
            if "can't be installed" not in error.message:
                raise
            pytest.skip(error.message)
    return graph
