"""Separating what a model thinks from what it answers."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["THINKING_GAP", "ReasoningMarks", "ReasoningSplitter", "held_length", "is_thinking_open", "reasoning_marks"]

THINKING_GAP = "\n\n"  # what the models write between the closing mark and the answer


class ReasoningMarks(NamedTuple):
    """The texts around a model's reasoning."""

    opening: str
    closing: str


_KNOWN = (ReasoningMarks("<think>", "</think>"), ReasoningMarks("[THINK]", "[/THINK]"))


def reasoning_marks(template: str | None) -> ReasoningMarks | None:
    """Return the marks that a chat template knows of, or None: then a reply is all answer."""
    return next((marks for marks in _KNOWN if template and marks.closing in template), None)


def is_thinking_open(marks: ReasoningMarks | None, prompt: str) -> bool:
    """Whether the prompt, as the template wrote it, ends inside of the reasoning."""
    return marks is not None and prompt.rstrip().endswith(marks.opening)


class ReasoningSplitter:
    """Splits a streamed reply into answer and reasoning.

    Reasoning starts where the prompt opened it, or with an opening mark at the very beginning of the reply; marks
    later in the answer are text. Newlines next to the marks belong to neither part. A reply that ends before the
    closing mark is all reasoning.

    Args:
        marks: Around the reasoning.
        opened: The prompt ends with the opening mark.
    """

    def __init__(self, marks: ReasoningMarks, *, opened: bool = False) -> None:
        self._marks = marks
        self._step = self._think if opened else self._begin
        self._held = ""
        self._fresh = True  # nothing of the present part was shown

    def push(self, text: str) -> tuple[str, str]:
        """Add a piece and return what can be shown of (answer, reasoning), both often empty."""
        self._held += text
        return self._step()

    def finish(self) -> tuple[str, str]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._step == self._think:
            return "", "" if self._fresh and not held.strip("\n") else held.rstrip("\n")
        if self._step == self._gap:
            return "", ""
        return held, ""

    def _begin(self) -> tuple[str, str]:
        start = self._held.lstrip()
        opening = self._marks.opening
        if start.startswith(opening):
            self._held = start[len(opening) :]
            self._step = self._think
        elif not opening.startswith(start):
            self._step = self._answer
        else:
            return "", ""
        return self._step()

    def _think(self) -> tuple[str, str]:
        if self._fresh:
            self._held = self._held.lstrip("\n")
        place = self._held.find(self._marks.closing)
        if place >= 0:
            thought = self._held[:place].rstrip("\n")
            self._held = self._held[place + len(self._marks.closing) :]
            self._step, self._gap_left = self._gap, len(THINKING_GAP)
            answer, _ = self._step()
            return answer, thought
        shown = self._held[: len(self._held) - held_length(self._held, self._marks.closing)].rstrip("\n")
        self._held = self._held[len(shown) :]
        self._fresh = self._fresh and not shown
        return "", shown

    def _gap(self) -> tuple[str, str]:
        """Leave out as many newlines as the models write; any more are part of the answer."""
        while self._held and self._gap_left:
            if not self._held.startswith("\n"):
                self._gap_left = 0
                break
            self._held = self._held[1:]
            self._gap_left -= 1
        if self._gap_left:
            return "", ""
        self._step = self._answer
        return self._step()

    def _answer(self) -> tuple[str, str]:
        text, self._held = self._held, ""
        return text, ""


def held_length(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that begins a mark, and is not all of it."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
