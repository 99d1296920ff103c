"""Third parties' noise: away by default, on stderr for who asks, and never in the way of an error."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from edgekit import quiet
from edgekit.errors import SourceError
from edgekit.quiet import is_verbose, quieted, verbosity_kept, verbosity_raised


def _make_noise() -> None:
    """All ways in which a library may speak up."""
    print("printed")
    print("complained", file=sys.stderr)
    logging.getLogger("somebody").warning("logged")
    warnings.warn("warned", stacklevel=1)
    os.write(1, b"written to stdout\n")
    os.write(2, b"written to stderr\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)


@pytest.fixture
def verbose() -> Iterator[None]:
    with verbosity_kept():
        verbosity_raised()
        yield


def test_nothing_is_seen_of_noise(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", flush=True)
    with quieted():
        _make_noise()
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


@pytest.mark.skipif(os.name == "nt", reason="which C library Python and others use differs there")
def test_what_the_c_library_holds_back_is_not_seen_later(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    with quieted():
        library.puts(b"from C")
    library.fflush(None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("verbose")
def test_verbose_users_see_noise_on_stderr_and_data_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with quieted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest keeps them for itself
        _make_noise()
    print("data")
    out, err = capfd.readouterr()
    assert out == "data\n"
    for said in ("printed", "complained", "written to stdout", "written to stderr", "from a child"):
        assert said in err


def test_verbosity_ends_with_what_raised_it() -> None:
    handlers = list(logging.getLogger("edgekit").handlers)
    with verbosity_kept():
        verbosity_raised()
        assert is_verbose()
    assert not is_verbose()
    assert logging.getLogger("edgekit").handlers == handlers


def test_errors_come_out_and_the_streams_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with quieted():
            print("noise")
            raise SourceError("wrong")

    with pytest.raises(SourceError, match="wrong"):
        fail()
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_nested_and_threaded_uses_end_with_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with quieted():
            entered.set()
            may_leave.wait(30)

    thread = threading.Thread(target=other)
    with quieted():
        with quieted():
            pass
        os.write(1, b"still inside\n")
        thread.start()
        entered.wait(30)
    os.write(1, b"the other thread is inside\n")
    may_leave.set()
    thread.join()
    os.write(1, b"out\n")
    assert capfd.readouterr() == ("out\n", "")


def test_a_process_without_streams_is_no_error() -> None:
    program = "import os; os.close(1); os.close(2)\nfrom edgekit.quiet import quieted\nwith quieted(): pass"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_streams_that_could_not_be_moved_are_moved_the_next_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as during:
        during.setattr(quiet, "_moved", full)
        with pytest.raises(OSError, match="open files"), quieted():
            pass
    with quieted():
        _make_noise()
    assert capfd.readouterr() == ("", "")
