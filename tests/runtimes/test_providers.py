"""Sessions on each execution provider that is installed, on a small static graph of quantized values."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import BundleError, UnsupportedError
from edgekit.runtimes import providers
from edgekit.runtimes.providers import PROVIDERS, executor_name, find_devices, open_session

ROWS, INPUTS, OUTPUTS = 8, 64, 32
X_SCALE, Y_SCALE, MIDDLE = 8 / 65535, 16 / 65535, 32768  # inputs within 4, outputs within 8
# Half a step of each int8 weight, times inputs of unit size: 64 of them add up to about 0.02; 16-bit activations add 1e-3.
TOLERANCE = 0.04


def installed(provider: str) -> bool:
    module = {"openvino": "openvino"}.get(provider, PROVIDERS[provider].module)
    return not module or importlib.util.find_spec(module) is not None


def write_quantized_product(path: Path, rows: int | str = ROWS) -> NDArray[np.float32]:
    """`y = x @ w` with 16-bit activations and int8 weights of a scale each column; the exact `w`."""
    weights = np.random.default_rng(0).normal(0, 0.1, (INPUTS, OUTPUTS)).astype(np.float32)
    scales = np.abs(weights).max(0) / 127
    constants = {
        "x_scale": np.float32(X_SCALE),
        "y_scale": np.float32(Y_SCALE),
        "middle": np.uint16(MIDDLE),
        "w": np.round(weights / scales).astype(np.int8),
        "w_scale": scales,
        "w_zero": np.zeros(OUTPUTS, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "middle"], ["x_stored"]),
        helper.make_node("DequantizeLinear", ["x_stored", "x_scale", "middle"], ["x_read"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_read"], axis=1),
        helper.make_node("MatMul", ["x_read", "w_read"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "y_scale", "middle"], ["y_stored"]),
        helper.make_node("DequantizeLinear", ["y_stored", "y_scale", "middle"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows, OUTPUTS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return weights


@pytest.mark.parametrize("provider", PROVIDERS)
def test_session_computes_what_the_graph_says(provider: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not installed(provider):
        pytest.skip(f"{provider} is not installed")
    weights = write_quantized_product(tmp_path / "product.onnx")
    x = np.random.default_rng(1).normal(0, 1, (1, ROWS, INPUTS)).astype(np.float32)
    session = open_session(tmp_path / "product.onnx", provider, device="cpu", only=True)
    assert [(value.name, list(value.shape), value.type) for value in session.get_inputs()] == [
        ("x", [1, ROWS, INPUTS], "tensor(float)")
    ]
    assert [value.name for value in session.get_outputs()] == ["y"]
    found: NDArray[Any] = session.run(["y"], {"x": x})[0]
    assert np.abs(found - x @ weights).max() < TOLERANCE
    assert not capfd.readouterr().out  # stdout is for data


@pytest.mark.parametrize("provider", PROVIDERS)
def test_threads_that_share_a_session_get_their_own_results(provider: str, tmp_path: Path) -> None:
    """As the sequences of a server do."""
    if not installed(provider):
        pytest.skip(f"{provider} is not installed")
    write_quantized_product(tmp_path / "product.onnx")
    session = open_session(tmp_path / "product.onnx", provider, device="cpu")
    inputs = np.random.default_rng(2).normal(0, 1, (64, 1, ROWS, INPUTS)).astype(np.float32)
    expected = [session.run(None, {"x": x})[0] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: session.run(None, {"x": x})[0], inputs))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_graph_that_is_none_is_one_error(provider: str, tmp_path: Path) -> None:
    if not installed(provider):
        pytest.skip(f"{provider} is not installed")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"broken\.onnx is not taken by") as caught:
        open_session(tmp_path / "broken.onnx", provider, device="cpu")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "cpu"])
def test_graph_for_an_npu_has_fixed_shapes(provider: str, tmp_path: Path) -> None:
    if not installed(provider):
        pytest.skip(f"{provider} is not installed")
    write_quantized_product(tmp_path / "product.onnx", rows="rows")
    with pytest.raises(BundleError):
        open_session(tmp_path / "product.onnx", provider, device="cpu", only=True)


def test_unknown_provider_is_named() -> None:
    with pytest.raises(UnsupportedError, match="'cuda' is not known"):
        find_devices("cuda")


def test_device_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cpu has no npu here"):
        open_session(tmp_path / "any.onnx", "cpu", device="npu")


def test_executors_have_the_names_of_the_design() -> None:
    pairs = (("cpu", "cpu"), ("qnn", "cpu"), ("qnn", "npu"), ("openvino", "cpu"), ("openvino", "npu"))
    named = [executor_name(*pair) for pair in pairs]
    assert named == ["onnxruntime", "qnn-htp-emulator", "qnn-htp", "openvino-cpu", "openvino-npu"]


def test_threads_that_load_at_once_leave_stdout_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """The second one must not take what the first one has put in its place for the stdout to go back to."""
    inside, may_end = threading.Event(), threading.Event()

    def load_first() -> None:
        with providers._stdout_kept():
            inside.set()
            may_end.wait(10)
            os.write(1, b"of a library\n")

    def load_second() -> None:
        inside.wait(10)
        threading.Timer(0.2, may_end.set).start()  # while the second one waits, or is inside as well
        with providers._stdout_kept():
            may_end.wait(10)
            first.join(1)

    first, second = threading.Thread(target=load_first), threading.Thread(target=load_second)
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join(20)
    os.write(1, b"data\n")
    sys.stdout.flush()
    assert capfd.readouterr() == ("data\n", "of a library\n")
