"""Opening an .aimodel: what it must be, and the function that runs."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import coreai.authoring  # noqa: F401 - before anything else of the package, which fails without
import numpy as np
from coreai import runtime
from numpy.typing import NDArray

from edgekit.child import ChildError, ChildTimeoutError, run_child
from edgekit.errors import BundleError, first_line
from edgekit.graph import Graph

from .coreai_names import MAIN, PREPARED

__all__ = ["USES_SYSTEM", "OpenProgram", "open_program", "wait_for"]

USES_SYSTEM = bool(runtime._use_os_coreai)  # macOS 27's own runtime
_ANY = (None, -1)  # a size that is known at run time only, as documented and as the interpreter has it
COMPILER = "edgekit.runtimes.coreai_interpreter"
COMPILE_TIMEOUT_S = 1800.0  # so long that only a compiler that hangs meets it
_Result = TypeVar("_Result")


def wait_for(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run in a loop of our own, in a thread: Core AI is asynchronous, and its callers may be inside of a loop or not."""
    running = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return running.result()
    except BaseException:  # an interrupt too: what still runs would change the caches under the next call
        wait([running])
        raise


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="edgekit-coreai", daemon=True)
    thread.start()

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    atexit.register(end)
    return loop


@dataclass(frozen=True, slots=True)
class OpenProgram:
    """A program that is ready to run.

    Attributes:
        function: What computes; called with inputs and states by name.
        prepared: Inputs that are the same in every call.
    """

    function: runtime.InferenceFunction
    prepared: Mapping[str, runtime.NDArray]

    async def run(
        self, inputs: Mapping[str, NDArray[Any]], states: Mapping[str, runtime.NDArray]
    ) -> dict[str, NDArray[Any]]:
        """Compute; the states are changed."""
        given = {name: runtime.NDArray(np.ascontiguousarray(value)) for name, value in inputs.items()}
        found = await self.function(given | dict(self.prepared), state=dict(states))
        return {name: value.numpy() for name, value in found.items()}


async def open_program(path: Path, graph: Graph) -> OpenProgram:
    """Open an .aimodel.

    Raises:
        BundleError: It is not one, is damaged, or is not what the manifest describes.
    """
    try:
        program = await (_open_on_system(path) if USES_SYSTEM else _open_in_interpreter(path))
        _check_declared(program, path, graph)
    except ChildTimeoutError as error:
        raise BundleError(
            f"Core AI's compiler was not done with {path.name} after {COMPILE_TIMEOUT_S:g} s",
            hint="run the bundle's program of another format, or this one on a faster machine",
        ) from error
    except ChildError as error:
        raise _not_taken(path, error.message) from error
    except (
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        OSError,
    ) as error:  # of Core AI, which has no class for its own
        raise _not_taken(path, first_line(error)) from error
    return program


def _not_taken(path: Path, reason: str) -> BundleError:
    return BundleError(f"{path.name} is not a program that Core AI takes: {reason}", hint="convert the model again")


async def _open_on_system(path: Path) -> OpenProgram:
    model = await runtime.AIModel.load(path)
    return OpenProgram(model.load_function(MAIN), {})


async def _open_in_interpreter(path: Path) -> OpenProgram:
    with TemporaryDirectory(suffix=".aimodelx") as place:
        task = {"asset": str(path), "place": place}
        done = await asyncio.to_thread(run_child, COMPILER, task, timeout_s=COMPILE_TIMEOUT_S)
        model = await runtime.AIModel.load(place)
        prepared = await model.load_function(PREPARED)({}) if done["prepared"] else {}
        return OpenProgram(model.load_function(MAIN), prepared)


def _check_declared(program: OpenProgram, path: Path, graph: Graph) -> None:
    """Compare what the manifest says of the program with the function."""
    described, layout = program.function.desc, graph.cache
    names = set(described.input_names) - set(program.prepared)
    agrees = names == set(graph.inputs.values()) and set(described.state_names) == set(layout.past)
    agrees = agrees and described.output_names == [graph.outputs["logits"]]
    if agrees:
        states = [described.state_descriptor(name) for name in layout.past]
        shapes = [[layout.layers, 1, layout.kv_heads, any_, layout.head_dim] for any_ in _ANY]
        agrees = all(list(state.shape) in shapes for state in states)
        agrees = agrees and all(state.dtype == layout.dtype for state in states)
        agrees = agrees and described.output_descriptor(graph.outputs["logits"]).shape[-1] == graph.vocab_size
    if not agrees:
        raise BundleError(f"{path.name} is not the program that the manifest describes", hint="convert the model again")
