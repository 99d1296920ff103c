"""Which execution provider runs a program: what the plan prefers and this machine has, tried out in another process first.

A vendor's library can be missing, refuse the graph, crash, or compute nonsense. Each of these is found out by a child process
that loads the program and checks its first tokens against the bundle's goldens; then the CPU runs the program, and the
choice says why. What was found out is kept until a version, the machine or the program changes; what was wrong, for a day:
a driver may be installed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgekit
from edgekit.bundle import Bundle, Program
from edgekit.child import ChildError, run_child
from edgekit.errors import BundleError, MissingExtraError, UnsupportedError
from edgekit.machine import describe_machine
from edgekit.registry import PROVIDERS_OF_FORMATS
from edgekit.user_cache import cache_directory

from .backend import Runtime
from .kept_trials import keep_trial, read_trial, trial_file
from .providers import PROVIDERS, executor_name, is_installed, package_versions

__all__ = ["CPU_ONLY", "ProviderChoice", "choose_provider", "fall_back", "list_providers"]

PROBE = "edgekit.runtimes.provider_probe"
DEVICES = "edgekit.runtimes.provider_devices"
PROBLEM_KEPT_S = 86_400.0
PROBE_TIMEOUT_S = 300.0  # an NPU's compiler takes minutes for a large graph, once


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """What runs a program, and why.

    Attributes:
        passed_over: What would have come first, each with what was wrong with it.
        runtime: What computes where that is another runtime than ONNX Runtime.
    """

    name: str
    device: str
    reason: str
    passed_over: tuple[str, ...] = ()
    runtime: Runtime | None = None

    @property
    def executed(self) -> str:
        """As quality cards name it."""
        return self.runtime.name if self.runtime else executor_name(self.name, self.device)

    @property
    def is_slow(self) -> bool:
        """True where verification compares fewer positions; see `Runtime`."""
        return self.runtime is not None and self.runtime.is_slow

    @property
    def note(self) -> str:
        """What users must know of what computes; empty where there is nothing."""
        return self.runtime.note if self.runtime else ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        values = asdict(self)
        del values["runtime"]
        return values | {"executed": self.executed, "passed_over": list(self.passed_over)}


CPU_ONLY = ProviderChoice("cpu", "cpu", "programs of this format run on the CPU")


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a trial of a provider found."""

    device: str
    problem: str = ""


def choose_provider(
    bundle: Bundle, program: Program, *, asked: str | None = None, verifying: bool = False
) -> ProviderChoice:
    """Choose what runs a program.

    Args:
        asked: A provider that must run it; None takes what the plan prefers, then what is installed, then the CPU.
        verifying: Take what the plan prefers or the CPU, nothing else; an NPU's emulator too, or a vendor's library on this
            machine's CPU; and leave out the trial: the verification is one.

    Raises:
        UnsupportedError: Programs of this format do not run on the provider that was asked for.
        BundleError: The provider that was asked for does not run this one.
        MissingExtraError: Its package is not installed.
    """
    format = program.graph.format
    possible = PROVIDERS_OF_FORMATS.get(format, ("cpu",))
    if asked is not None:
        if asked not in possible:
            raise UnsupportedError(f"{format} programs do not run on {asked!r}", hint=f"on: {', '.join(possible)}")
        return _choose_asked(bundle, program, asked, verifying)
    if possible == ("cpu",):
        return CPU_ONLY
    preferred = str(bundle.plan_of(program).get("provider") or "")
    order = sorted((name for name in possible if name != "cpu"), key=lambda name: name != preferred)
    passed_over: list[str] = []
    for name in order:
        if verifying and name != preferred:  # what another vendor's library computes says nothing of this one's
            continue
        if not is_installed(name):
            if name == preferred:
                passed_over.append(f"{name}: {PROVIDERS[name].distribution} is not installed")
            continue
        trial = _verify_devices(name) if verifying else _try_kept(bundle, program, name)
        if not trial.problem:
            reason = "the plan prefers it" if name == preferred else "this machine has it"
            return ProviderChoice(name, trial.device, reason, tuple(passed_over))
        passed_over.append(f"{name}: {trial.problem}")
    return ProviderChoice("cpu", "cpu", "; ".join(passed_over) or "no other provider is installed", tuple(passed_over))


def list_providers() -> list[dict[str, Any]]:
    """For each provider: the versions of its packages, the kinds of its devices here, and what is wrong with it."""
    found = []
    for name in PROVIDERS:
        entry: dict[str, Any] = {"name": name, "versions": package_versions(name), "devices": [], "problem": None}
        if not is_installed(name):
            entry["problem"] = "not installed"
        else:
            try:
                entry["devices"] = _devices_here(name)
            except ChildError as error:
                entry["problem"] = error.message
        found.append(entry)
    return found


def fall_back(choice: ProviderChoice, problem: str) -> ProviderChoice:
    """The CPU, since what was chosen did not load after all."""
    passed_over = (*choice.passed_over, f"{choice.name}: {problem}")
    return ProviderChoice("cpu", "cpu", "; ".join(passed_over), passed_over)


def _choose_asked(bundle: Bundle, program: Program, asked: str, verifying: bool) -> ProviderChoice:
    if asked == "cpu":
        return ProviderChoice("cpu", "cpu", "asked for")
    if not is_installed(asked):
        raise MissingExtraError(PROVIDERS[asked].distribution, asked)
    trial = _verify_devices(asked) if verifying else _try_kept(bundle, program, asked, any_device=True)
    if trial.problem:
        raise BundleError(
            f"{asked} does not run this program: {trial.problem}", hint="leave out --provider, or use cpu"
        )
    return ProviderChoice(asked, trial.device, "asked for")


def _verify_devices(name: str) -> _Trial:
    try:
        devices = _devices_here(name)
    except ChildError as error:
        return _Trial("", error.message)
    kinds = [kind for kind in (*PROVIDERS[name].devices, "cpu") if kind in devices]
    return _Trial(kinds[0]) if kinds else _Trial("", "it has no device here")


def _devices_here(name: str) -> list[str]:
    """The kinds of a provider's devices; another process loads the vendor's library.

    Raises:
        ChildError: It crashes, or is not loaded.
    """
    devices: list[str] = run_child(DEVICES, {"provider": name}, timeout_s=PROBE_TIMEOUT_S)["devices"]
    return devices


def _try_kept(bundle: Bundle, program: Program, name: str, *, any_device: bool = False) -> _Trial:
    """What is known of a provider and this program here, or is found out now. Who asks for one by name tries it again."""
    folder = cache_directory()
    path = trial_file(folder / "providers", _depends_on(bundle, program, name, any_device)) if folder else None
    kept = _known_trial(path)
    if kept is not None and not (any_device and kept.problem):
        return kept
    task = {
        "bundle": str(bundle.directory),
        "format": program.graph.format,
        "provider": name,
        "any_device": any_device,
    }
    try:
        trial = _Trial(**run_child(PROBE, task, timeout_s=PROBE_TIMEOUT_S))
    except ChildError as error:
        trial = _Trial("", error.message)
    keep_trial(path, asdict(trial))
    return trial


def _depends_on(bundle: Bundle, program: Program, name: str, any_device: bool) -> dict[str, Any]:
    """Everything that a trial depends on."""
    files: Mapping[str, Mapping[str, Any]] = bundle.manifest.files
    return {
        "edgekit": edgekit.__version__,
        "versions": package_versions(name),
        "machine": asdict(describe_machine()),
        "provider": name,
        "any_device": any_device,
        "files": {file: files[file].get("sha256") for file in (*program.graph.files, "goldens.json") if file in files},
    }


def _known_trial(path: Path | None) -> _Trial | None:
    """What was found out before; what was wrong is found out again after a while, and so is what is damaged."""
    values = read_trial(path)
    try:
        if path is None or values is None:
            return None
        trial = _Trial(str(values["device"]), str(values["problem"]))
        return None if trial.problem and time.time() - path.stat().st_mtime > PROBLEM_KEPT_S else trial
    except (OSError, KeyError):
        return None
