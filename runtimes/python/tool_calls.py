"""Reading tool calls out of a reply while it arrives."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from edgekit.session import ToolCall

from .reasoning import held_length
from .tool_formats import ToolFormat, is_inside_text

__all__ = ["ToolCallParser"]

_BARE_STARTS = ('{"name":', '{"type":"function"')


class ToolCallParser:
    """Splits a streamed reply into text and calls.

    No part of a mark or of a call is shown as text before it is known not to be one. What looks like a call and is
    none (not JSON, not an object, an unknown function) is text. White space between calls, or before the first with
    no text, belongs to the format and is left out.

    Args:
        format: Of the model.
        names: The functions that may be called.
    """

    def __init__(self, format: ToolFormat, names: Collection[str]) -> None:
        self._format = format
        self._names = frozenset(names)
        self._held = ""
        self._step = self._begin if format.is_bare else self._scan
        self._blank = ""  # white space that may turn out to stand between calls
        self._fresh = True  # no text since the start or the last call
        self._shown: list[str] = []
        self._calls: list[ToolCall] = []
        self.has_calls = False

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Add a piece and return the text that can be shown and the calls that are complete."""
        self._held += text
        self._step()
        return self._take()

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return what was held back. A call without its closing mark counts if it is whole."""
        while self._held or self._step == self._inside:
            if self._step == self._inside:
                self._close_at_end()
            elif self._step == self._bare:
                self._end_bare()
            else:
                self._show_held()
        if not self.has_calls and self._fresh:
            self._shown.append(self._blank)
        return self._take()

    def _take(self) -> tuple[str, tuple[ToolCall, ...]]:
        text, calls = "".join(self._shown), tuple(self._calls)
        self._shown.clear()
        self._calls.clear()
        return text, calls

    def _begin(self) -> None:
        """Tell a bare call from text by its first characters."""
        start = "".join(self._held.split())
        if self._format.opening:
            if self._format.opening.startswith(start):
                return
            start = start.removeprefix(self._format.opening)
        if any(start.startswith(known) for known in _BARE_STARTS):
            self._step = self._bare
        elif not any(known.startswith(start) for known in _BARE_STARTS):
            self._step = self._show_held
            self._step()

    def _bare(self) -> None:
        """Hold everything: bare calls last until the end of the reply."""

    def _end_bare(self) -> None:
        text = self._held.lstrip()
        if self._add(text.removeprefix(self._format.opening) if self._format.opening else text):
            self._held = ""
        else:
            self._show_held()

    def _show_held(self) -> None:
        text, self._held = self._held, ""
        self._show(text)

    def _scan(self) -> None:
        opening = self._format.opening
        place = self._held.find(opening)
        if place < 0:
            place = len(self._held) - held_length(self._held, opening)
            self._show(self._held[:place])
            self._held = self._held[place:]
            return
        self._show(self._held[:place])
        self._held = self._held[place + len(opening) :]
        self._step = self._inside
        self._step()

    def _inside(self) -> None:
        """Look for the end of a call, which may also stand in one of its strings."""
        ending = self._format.closing or self._format.opening
        place = self._held.find(ending)
        while place >= 0 and is_inside_text(self._held[:place]):
            place = self._held.find(ending, place + len(ending))
        if place >= 0:
            self._close(place)
            self._step()

    def _close(self, place: int) -> None:
        closing = self._format.closing
        body, self._held = self._held[:place], self._held[place + len(closing) :]
        self._step = self._scan
        if not self._add(body):
            self._show(f"{self._format.opening}{body}{closing}")

    def _close_at_end(self) -> None:
        """End a call at the end of the reply, or, where that is none, at the first mark: more calls may follow it."""
        place = self._held.find(self._format.closing or self._format.opening)
        if self._add(self._held):
            self._held, self._step = "", self._scan
        elif place >= 0:
            self._close(place)
            self._step()
        else:
            self._held, self._step = self._format.opening + self._held, self._show_held

    def _add(self, body: str) -> bool:
        """Read calls; False if they are none."""
        calls = self._format.read(body)
        if calls is None or any(call.name not in self._names for call in calls):
            return False
        self._calls += [ToolCall(f"call_{secrets.token_hex(12)}", call.name, call.arguments) for call in calls]
        self.has_calls = self._fresh = True
        self._blank = ""
        return True

    def _show(self, text: str) -> None:
        if self._fresh and not text.strip():
            self._blank += text
            return
        self._shown.append(self._blank + text)
        self._blank, self._fresh = "", False
