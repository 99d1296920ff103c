"""The MIL evaluator on packages that coremltools wrote, read from the disk; and on packages that are broken."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import BundleError, GenerationError
from edgekit.quiet import quieted
from edgekit.runtimes.mil_evaluator import MilFunction, load_functions, new_states
from edgekit.runtimes.mil_package import Package

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools has no package for this machine")

MODEL, BLOBS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
numbers = np.random.default_rng(7)
WEIGHT = numbers.standard_normal((16, 8)).astype(np.float16)
NIBBLES = numbers.integers(-8, 8, (32, 16)).astype(np.int8)
SCALES = np.abs(numbers.standard_normal((32, 2))).astype(np.float16)
TABLE, INDICES = (
    numbers.standard_normal((1, 1, 8, 1)).astype(np.float16),
    numbers.integers(0, 8, (32, 16)).astype(np.uint8),
)


def write_package(directory: Path, program: Any) -> Path:
    """A program as coremltools saves it, with no pass that would change its operators."""
    with quieted():
        import coremltools

        options = {"skip_model_load": True, "pass_pipeline": coremltools.PassPipeline.EMPTY}
        model = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS18, **options)
        model.save(str(directory))
    return directory


def cell_program() -> Any:
    """Writes linear(x) into a row of its state and returns silu of two products of the whole state."""
    with quieted():
        import coremltools
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

    inputs = [
        Builder.TensorSpec((1, 8), types.fp16),
        Builder.TensorSpec((1,), types.int32),
        Builder.StateTensorSpec((4, 16), types.fp16),
    ]

    @Builder.program(input_specs=inputs, opset_version=coremltools.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any, row: Any, memory: Any) -> Any:
        update = Builder.linear(x=x, weight=WEIGHT)
        begin = Builder.concat(values=[row, np.array([0], np.int32)], axis=0)
        end = Builder.concat(values=[Builder.add(x=row, y=np.array([1], np.int32)), np.array([16], np.int32)], axis=0)
        state = Builder.slice_update(x=Builder.read_state(input=memory), update=update, begin=begin, end=end)
        state = Builder.coreml_update_state(state=memory, value=state)
        nibbles = Builder.constexpr_blockwise_shift_scale(data=NIBBLES.astype(types.np_int4_dtype), scale=SCALES)
        palette = Builder.constexpr_lut_to_dense(indices=INDICES.astype(types.np_uint3_dtype), lut=TABLE)
        both = [Builder.linear(x=state, weight=nibbles), Builder.linear(x=state, weight=palette)]
        return Builder.silu(x=Builder.concat(values=both, axis=-1), name="out")

    return program


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("mil") / "cell.mlpackage", cell_program())


def half(values: NDArray[Any]) -> Any:
    """A torch tensor whose values float16 has."""
    import torch

    return torch.from_numpy(np.asarray(values, np.float32)).half().float()


def expected(state: NDArray[Any]) -> NDArray[Any]:
    """The cell's output for a state, by torch, rounded to float16 after every operator."""
    import torch

    nibbles = half(NIBBLES * np.repeat(SCALES.astype(np.float32), 8, axis=1))
    products = [half((half(state) @ weight.T).numpy()) for weight in (nibbles, half(TABLE[0, 0, INDICES, 0]))]
    return np.asarray(half(torch.nn.functional.silu(torch.cat(products, -1)).numpy()))


# Two results may round to neighbours in float16 where their sums in float32 had another order.
NEIGHBOURS = 2.0**-9


def test_program_computes_what_torch_does_and_keeps_its_state(package: Path) -> None:
    (function,) = load_functions(Package(package)).values()
    states, memory = new_states(function.signature.states), np.zeros((4, 16), np.float32)
    for row in (2, 0, 2):
        x = numbers.standard_normal((1, 8)).astype(np.float16)
        memory[row] = half((half(x) @ half(WEIGHT).T).numpy())[0]
        found = function({"x": x, "row": np.array([row], np.int32)}, states)["out"]
        np.testing.assert_allclose(found, expected(memory), rtol=NEIGHBOURS, atol=NEIGHBOURS)
        np.testing.assert_allclose(states["memory"], memory, rtol=NEIGHBOURS, atol=NEIGHBOURS)


def test_weights_are_decoded_once_for_all_functions(package: Path, tmp_path: Path) -> None:
    copy = edited(
        package, tmp_path, lambda model: model.mlProgram.functions["again"].CopyFrom(model.mlProgram.functions["main"])
    )
    first, second = load_functions(Package(copy)).values()
    weights = [
        {id(each) for each in function._constants.values() if np.size(each) > 100} for function in (first, second)
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 3


def edited(package: Path, directory: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a package whose model was changed."""
    copy = Path(shutil.copytree(package, directory / "changed.mlpackage"))
    opened = Package(copy)
    change(opened.model)
    (copy / MODEL).write_bytes(opened.model.SerializeToString())
    return copy


def operations(model: Any) -> Any:
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def first(model: Any, kind: str) -> Any:
    return next(each for each in operations(model) if each.type == kind)


def test_unknown_operators_are_listed_in_one_error(package: Path, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        first(model, "silu").type = "quantum_leap"
        first(model, "add").type = "conv"

    with pytest.raises(BundleError, match="does not know the operators: conv, quantum_leap"):
        load_functions(Package(edited(package, tmp_path, change)))


def set_value(operation: Any, offset: int | None = None, file: str | None = None) -> None:
    """Change where the first constant of an operation lies."""
    values = [each.arguments[0].value for each in operation.inputs.values() if each.arguments[0].HasField("value")]
    blob = next(
        value.blobFileValue for value in (*values, *operation.attributes.values()) if value.HasField("blobFileValue")
    )
    if offset is not None:
        blob.offset = offset
    if file is not None:
        blob.fileName = file


def enlarge(operation: Any) -> None:
    operation.outputs[0].type.tensorType.dimensions[0].constant.size = 1 << 60


def name_in_place(operation: Any) -> None:
    operation.inputs["in_place"].CopyFrom(operation.inputs["x"])


BLOCKS = "constexpr_blockwise_shift_scale"
BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "blob beyond the file": (lambda model: set_value(first(model, BLOCKS), offset=1 << 40), "can't be read"),
    "blob at no multiple of 64": (lambda model: set_value(first(model, BLOCKS), offset=65), "can't be read"),
    "blob where there is none": (lambda model: set_value(first(model, BLOCKS), offset=0), "can't be read"),
    "blob of another type": (lambda model: set_value(first(model, "constexpr_lut_to_dense"), offset=64), "can't be read"),
    "blobs outside": (lambda model: set_value(first(model, BLOCKS), file="@model_path/../../../../etc/passwd"), "outside"),
    "blobs elsewhere": (lambda model: set_value(first(model, BLOCKS), file="/etc/passwd"), "reads weights from"),
    "value of nothing": (lambda model: operations(model).remove(first(model, "read_state")), "nothing before it computes"),
    "value computed twice": (lambda model: operations(model).append(first(model, "silu")), "computed twice"),
    "no parameter": (lambda model: first(model, "silu").inputs.clear(), "missing a required argument"),
    "wrong parameter": (lambda model: first(model, "silu").inputs["y"].CopyFrom(first(model, "silu").inputs["x"]), "unexpected"),
    "our own parameter": (lambda model: name_in_place(first(model, "slice_update")), "unexpected argument 'in_place'"),
    "no opset": (lambda model: setattr(model.mlProgram.functions["main"], "opset", "CoreML1"), "none for opset"),
    "huge tensor": (lambda model: enlarge(first(model, "silu")), "elements"),
    "another model": (lambda model: model.ClearField("mlProgram"), "not an ML program"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_model_is_one_clean_error(package: Path, tmp_path: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    with pytest.raises(BundleError, match=message) as caught:
        load_functions(Package(edited(package, tmp_path, change)))
    assert caught.value.hint
    assert "\n" not in caught.value.message


MANIFESTS = {
    "missing": None,
    "not JSON": "{",
    "a list": "[]",
    "no root": json.dumps({"itemInfoEntries": {}, "rootModelIdentifier": "a"}),
    "a path outside": json.dumps({"itemInfoEntries": {"a": {"path": "../../x"}}, "rootModelIdentifier": "a"}),
    "an absolute path": json.dumps({"itemInfoEntries": {"a": {"path": "/etc/passwd"}}, "rootModelIdentifier": "a"}),
    "no such model": json.dumps({"itemInfoEntries": {"a": {"path": "x"}}, "rootModelIdentifier": "a"}),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_broken_manifest_is_a_clean_error(package: Path, tmp_path: Path, fault: str) -> None:
    copy, text = Path(shutil.copytree(package, tmp_path / "changed.mlpackage")), MANIFESTS[fault]
    (copy / "Manifest.json").unlink()
    if text is not None:
        (copy / "Manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError):
        Package(copy)


def test_input_of_another_shape_and_row_beyond_the_state_are_refused(package: Path) -> None:
    (function,) = load_functions(Package(package)).values()
    states, x = new_states(function.signature.states), np.zeros((1, 8), np.float16)
    with pytest.raises(GenerationError, match="takes x as"):
        function({"x": x[:, :7], "row": np.array([0], np.int32)}, states)
    with pytest.raises(GenerationError, match=r"slice_update\) can't be computed"):
        function({"x": x, "row": np.array([4], np.int32)}, states)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), name=st.sampled_from([MODEL, BLOBS, "Manifest.json"]))
@example(seed=46701, name=BLOBS)
def test_damaged_bytes_never_surprise(package: Path, tmp_path: Path, seed: int, name: str) -> None:
    chance, copy = random.Random(seed), tmp_path / f"{seed}.mlpackage"
    shutil.copytree(package, copy, dirs_exist_ok=True)
    data = bytearray((package / name).read_bytes())
    for _ in range(chance.randint(0, 3)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    del data[len(data) - chance.choice((0, 0, 1, 70, len(data) // 2)) :]
    (copy / name).write_bytes(data)
    with suppress(BundleError, GenerationError):  # nothing else: no crash, no other exception, no warning
        for function in load_functions(Package(copy)).values():
            call(function)
    shutil.rmtree(copy)


def call(function: MilFunction) -> None:
    inputs = {name: np.zeros(kind.shape, np.int32) for name, kind in function.signature.inputs.items()}
    function(inputs, new_states(function.signature.states))
