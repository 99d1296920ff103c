"""What third parties print and warn of is kept from the user, unless the logger `edgekit` is at DEBUG, as `-v` sets it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO

__all__ = ["is_verbose", "quieted", "verbosity_kept", "verbosity_raised"]

_LOGGER = logging.getLogger("edgekit")
_STDOUT, _STDERR = 1, 2


def is_verbose() -> bool:
    """True where the user wants to see what third parties say."""
    return _LOGGER.isEnabledFor(logging.DEBUG)


@contextmanager
def verbosity_kept() -> Iterator[None]:
    """At its end logging is as it was: of the command line, which may be called as a function."""
    level, handlers = _LOGGER.level, list(_LOGGER.handlers)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
        for handler in set(_LOGGER.handlers) - set(handlers):
            _LOGGER.removeHandler(handler)


def verbosity_raised() -> None:
    """Let everything through, and show EdgeKit's own log on stderr."""
    _LOGGER.setLevel(logging.DEBUG)
    _LOGGER.addHandler(logging.StreamHandler())


@contextmanager
def quieted() -> Iterator[None]:
    """Keep warnings, prints and what libraries write to the process's own stdout and stderr from the user.

    An error inside comes out as ever. Where the user is verbose all of it is shown, on stderr: stdout is for data. The streams
    are the whole process's, other threads' too, so this is for imports, loading and conversion, not around every forward. May
    be entered again, and by several threads.
    """
    _MUTE.enter()
    try:
        yield
    finally:
        _MUTE.leave()


class _Mute:
    """The first who enters moves the streams, the last who leaves moves them back."""

    def __init__(self) -> None:
        self._lock, self._users, self._moved = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._moved = _moved()
            self._users += 1  # after what may fail

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._moved.close()


_MUTE = _Mute()


def _moved() -> ExitStack:
    """The streams of Python and of the process, moved until the stack is closed."""
    with ExitStack() as stack:
        if is_verbose():
            stack.enter_context(redirect_stdout(sys.stderr))
            stack.enter_context(_redirected(_STDOUT, _STDERR))
            return stack.pop_all()
        nothing = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nothing)
        for number in (_STDOUT, _STDERR):
            stack.enter_context(_redirected(number, nothing))
        stack.enter_context(redirect_stdout(StringIO()))  # not the process's own where tests or notebooks replaced it
        stack.enter_context(redirect_stderr(StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return stack.pop_all()


@contextmanager
def _redirected(number: int, to: int) -> Iterator[None]:
    """Send what is written to one file descriptor to another."""
    try:
        os.fstat(to)
        kept = os.dup(number)
    except OSError:  # a windowed app has neither
        yield
        return
    _flush()
    os.dup2(to, number)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, number)
        os.close(kept)


def _flush() -> None:
    """Write out what Python and the C library hold back."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, or closed
            stream.flush()
    import ctypes

    with suppress(AttributeError, OSError):
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
