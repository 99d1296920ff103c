"""The choice of a provider: by the plan and the machine, and on the CPU after all where one is missing or at fault.

Faults happen in real child processes: a stand-in package crashes, hangs, refuses or computes nonsense there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import user_cache
from edgekit.bundle import Bundle, open_bundle
from edgekit.errors import BundleError, MissingExtraError, UnsupportedError
from edgekit.gate import verify_bundle
from edgekit.runtimes import provider_choice, providers
from edgekit.runtimes.engine import load_model
from edgekit.runtimes.provider_choice import choose_provider, list_providers

FAKE = Path(__file__).parent / "fake_openvino.py"
CRASHES = "import ctypes\nctypes.string_at(0)\n"
NO_LIBRARY = "def get_library_path():\n    return __file__\n"
# In the child: OpenVINO's plugin is hidden, and its CPU device is what {devices} say, so that an NPU's part can be played.
SITE = """
from dataclasses import replace
from edgekit.runtimes import providers
providers.PROVIDERS["openvino"] = replace(providers.PROVIDERS["openvino"], module="", devices={devices})
"""
Machine = Callable[..., None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test knows what another one found out, nor what this machine's user did."""
    monkeypatch.setattr(provider_choice, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(qnn=code, openvino=fault)`: a machine with these packages, and no others; "" is an `openvino` without fault."""

    def install(*, qnn: str | None = None, openvino: str | None = None, npu: bool = False) -> None:
        folder, present = tmp_path / "packages", set[str]()
        folder.mkdir()
        if qnn is not None:
            (folder / "onnxruntime_qnn.py").write_text(qnn, encoding="utf-8")
            present.add("onnxruntime_qnn")
        if openvino is not None:
            shutil.copy(FAKE, folder / "openvino.py")
            present.add("openvino")
            monkeypatch.setenv("EDGEKIT_TEST_FAULT", openvino)
        devices = ("npu", "cpu") if npu else ("npu",)
        (folder / "sitecustomize.py").write_text(SITE.format(devices=devices), encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(providers, "_is_importable", present.__contains__)

    return install


@pytest.fixture(scope="module")
def npu_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model's program for an NPU, verified by whatever is installed; its plan prefers qnn."""
    out = tmp_path_factory.mktemp("npu") / "tiny.edgekit"
    target = "copilot-snapdragon-x-elite"
    edgekit.convert(tiny_model("llama"), target=target, format="onnx-qdq", quant="int8", out=out)
    return open_bundle(out)


def choose(bundle: Bundle, **options: Any) -> provider_choice.ProviderChoice:
    return choose_provider(bundle, bundle.program("onnx-qdq"), **options)


def test_program_of_one_provider_has_no_choice(tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    bundle = edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant="int8", out=out, verify=False)
    choice = choose_provider(bundle, bundle.program())
    assert (choice.name, choice.executed, choice.passed_over) == ("cpu", "onnxruntime", ())
    with pytest.raises(UnsupportedError, match="onnx programs do not run on 'qnn'"):
        choose_provider(bundle, bundle.program(), asked="qnn")


def test_what_is_not_installed_is_passed_over(npu_bundle: Bundle, machine: Machine) -> None:
    machine()
    assert npu_bundle.manifest.plan["provider"] == "qnn"
    choice = choose(npu_bundle)
    assert choice.name == "cpu"
    assert choice.reason == "qnn: onnxruntime-qnn is not installed"
    with pytest.raises(MissingExtraError) as caught:
        choose(npu_bundle, asked="qnn")
    assert caught.value.hint == 'pip install "edgekit-toolkit[qnn]"'


def test_plan_that_prefers_is_that_of_the_program(npu_bundle: Bundle, machine: Machine) -> None:
    """A bundle's second program was planned apart from its first."""
    machine()
    plan = {"provider": "", "notes": [], "other_programs": {"onnx-qdq": npu_bundle.manifest.plan}}
    bundle = replace(npu_bundle, manifest=replace(npu_bundle.manifest, plan=plan))
    for verifying in (False, True):
        assert choose(bundle, verifying=verifying) == choose(npu_bundle, verifying=verifying)
    assert choose(bundle, verifying=True).passed_over == ("qnn: onnxruntime-qnn is not installed",)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals: a crash there is a code")
def test_crash_at_load_does_not_take_this_process_down(npu_bundle: Bundle, machine: Machine) -> None:
    machine(qnn=CRASHES)
    with edgekit.load(npu_bundle.directory) as model:
        assert model.provider.name == "cpu"
        (problem,) = model.provider.passed_over
        assert problem.startswith("qnn: it crashed with SIGSEGV")
        assert model.generate("hello", max_tokens=2).tokens
    with pytest.raises(BundleError, match="qnn does not run this program: it crashed"):
        edgekit.load(npu_bundle.directory, provider="qnn")
    (problem,) = choose(npu_bundle, verifying=True).passed_over
    assert problem.startswith("qnn: it crashed with SIGSEGV")


def test_library_that_is_none_is_passed_over(npu_bundle: Bundle, machine: Machine) -> None:
    machine(qnn=NO_LIBRARY)
    (problem,) = choose(npu_bundle).passed_over
    assert problem.startswith("qnn: the library of onnxruntime-qnn is not loaded: ")


def test_trial_that_hangs_is_given_up(npu_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(openvino="hang", npu=True)
    monkeypatch.setattr(provider_choice, "PROBE_TIMEOUT_S", 3.0)
    assert "openvino: it did not end within 3 s" in choose(npu_bundle).passed_over


@pytest.mark.parametrize(
    ("fault", "said"),
    [("refuse", "operation Conjure is not supported"), ("wrong", "its results are wrong: token")],
)
def test_provider_at_fault_is_passed_over_and_an_error_when_asked_for(
    npu_bundle: Bundle, machine: Machine, fault: str, said: str
) -> None:
    machine(openvino=fault, npu=True)
    choice = choose(npu_bundle)
    assert choice.name == "cpu"
    assert any(problem.startswith("openvino: ") and said in problem for problem in choice.passed_over)
    assert said in choice.reason
    with pytest.raises(BundleError, match="openvino does not run this program") as caught:
        choose(npu_bundle, asked="openvino")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_provider_that_works_is_taken_and_says_why(npu_bundle: Bundle, machine: Machine) -> None:
    machine(openvino="", npu=True)
    choice = choose(npu_bundle)
    assert (choice.name, choice.reason, choice.executed) == ("openvino", "this machine has it", "openvino-cpu")
    assert choice.passed_over == ("qnn: onnxruntime-qnn is not installed",)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_intels_library_computes_what_onnx_runtime_does(npu_bundle: Bundle) -> None:
    """The real one, on its CPU device; graphs whose dimensions are not fixed are refused, as the NPU would."""
    (row,) = verify_bundle(npu_bundle.directory, provider="openvino")
    assert (row["status"], row["executed"]) == ("ok", "openvino-cpu"), row


def test_device_that_only_verifies_is_not_chosen_unasked(npu_bundle: Bundle, machine: Machine) -> None:
    machine(openvino="")
    choice = choose(npu_bundle)
    assert choice.name == "cpu"
    assert "openvino: it has no npu here" in choice.passed_over
    assert choose(npu_bundle, asked="openvino").executed == "openvino-cpu"
    verifying = choose(
        npu_bundle, verifying=True
    )  # a program for qnn: another vendor's kernels would say nothing of it
    assert (verifying.name, verifying.passed_over) == ("cpu", ("qnn: onnxruntime-qnn is not installed",))


def test_what_was_found_out_is_kept(npu_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(qnn=CRASHES)
    first = choose(npu_bundle)
    monkeypatch.setattr(provider_choice, "run_child", _no_child)
    assert choose(npu_bundle) == first
    with pytest.raises(AssertionError, match="a child"):  # who asks for it by name tries it again
        choose(npu_bundle, asked="qnn")
    monkeypatch.setattr(provider_choice, "package_versions", lambda name: {"onnxruntime-qnn": "99"})
    with pytest.raises(AssertionError, match="a child"):  # another version may do better
        choose(npu_bundle)


def test_problem_is_looked_at_again_after_a_day(
    npu_bundle: Bundle, machine: Machine, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver may be there now, which no version that is known here tells."""
    machine(qnn=NO_LIBRARY)
    choose(npu_bundle)
    (kept,) = (own_cache / "providers").iterdir()
    monkeypatch.setattr(provider_choice, "run_child", _no_child)
    before = kept.stat().st_mtime - provider_choice.PROBLEM_KEPT_S
    os.utime(kept, (before + 600, before + 600))
    choose(npu_bundle)
    os.utime(kept, (before - 1, before - 1))
    with pytest.raises(AssertionError, match="a child"):
        choose(npu_bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"device": "npu"}'])
def test_damaged_memory_is_not_believed(npu_bundle: Bundle, machine: Machine, own_cache: Path, content: str) -> None:
    machine(qnn=NO_LIBRARY)
    first = choose(npu_bundle)
    (kept,) = (own_cache / "providers").iterdir()
    kept.write_text(content, encoding="utf-8")
    assert choose(npu_bundle) == first


def test_nothing_need_be_kept(npu_bundle: Bundle, machine: Machine, own_cache: Path) -> None:
    machine(qnn=NO_LIBRARY)
    own_cache.write_text("a file where the folder should be", encoding="utf-8")
    assert choose(npu_bundle).name == "cpu"


def test_user_without_a_home_keeps_nothing(
    npu_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that run as a number."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.undo()  # the real `cache_directory`
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache.cache_directory() is None
    machine(qnn=NO_LIBRARY)
    assert choose(npu_bundle).name == "cpu"


def test_provider_that_fails_after_its_trial_gives_way(
    npu_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may go away between the trial and the load."""
    machine(openvino="", npu=True)
    monkeypatch.setattr(provider_choice, "_try_kept", lambda *_, **__: provider_choice._Trial("npu"))
    found = providers.find_devices
    monkeypatch.setattr(providers, "find_devices", lambda name: _no_device() if name == "openvino" else found(name))
    with load_model(npu_bundle, npu_bundle.program("onnx-qdq")) as model:
        assert model.provider.name == "cpu"
        assert model.provider.passed_over[-1] == "openvino: the driver is gone"


def test_every_provider_is_listed_with_what_it_has(machine: Machine) -> None:
    machine(qnn=NO_LIBRARY, openvino="")
    listed = {entry["name"]: entry for entry in list_providers()}
    assert listed["cpu"]["devices"] == listed["openvino"]["devices"] == ["cpu"]
    assert listed["qnn"]["problem"].startswith("the library of onnxruntime-qnn is not loaded")
    assert "onnxruntime" in listed["qnn"]["versions"]


def _no_child(*_: object, **__: object) -> None:
    raise AssertionError("a child was started")


def _no_device() -> dict[str, Any]:
    raise BundleError("the driver is gone")
