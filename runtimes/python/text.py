"""Turning tokens into text while they arrive, and ending at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tokenizers import Tokenizer

__all__ = ["TextStream"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD = 16
_MAX_UTF8_TAIL = 3


class TextStream:
    """An incremental detokenizer that never shows half a character or a part of a stop string.

    The text of a token depends on its neighbours: SentencePiece decoders drop the space of the first token, and the
    bytes of one character can be spread over several tokens. So each step decodes a window: the tokens that were
    shown last, as context, and those not shown yet. The new text is what the window's text has beyond that of the
    context. A window is a few tokens long whatever the length of the reply.

    All pushes and `finish` together are `tokenizer.decode(tokens, skip_special_tokens=True)`, up to the first stop
    string. This is exact for byte-level BPE, also for bytes that are not UTF-8, and for WordPiece, Metaspace and
    SentencePiece with byte fallback, with one exception: if a run of fallback bytes holds whole characters and then
    stray bytes, `decode` turns the whole run into U+FFFD, but here the characters, already shown, stay. A decoder
    that rewrites text more than a few tokens back is not supported.

    Args:
        tokenizer: Its decoder is used; special tokens are not shown.
        stop: Strings that end the text. The one that is complete first counts; of those that end together, the
            longest.
        prompt_tail: The tokens before the first new one, all of the prompt or the end of it. With them the text is
            the continuation of the prompt, so that the first word keeps its leading space.
        marks: Texts of special tokens that are shown all the same, by token.

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_tail: Sequence[int] = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._window = _Window(tokenizer, prompt_tail)
        self._marks = marks or {}
        self._stops = _StopScanner([stop] if isinstance(stop, str) else stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred. From then on there is no more text."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now, often empty.

        Text is held back while it ends in an incomplete character or could be the beginning of a stop string.
        """
        if self.stopped:
            return ""
        if token in self._marks:
            return self._stops.scan(self._window.flush() + self._marks[token])
        return self._stops.scan(self._window.push(token))

    def finish(self) -> str:
        """Return the text still held back, U+FFFD in place of incomplete characters.

        The held text can complete a stop string, so that `stopped` may change.
        """
        if self.stopped:
            return ""
        return self._stops.scan(self._window.flush()) + self._stops.flush()


class _Window:
    """Tokens to text. Shown tokens are kept as context until newer ones are shown."""

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = _shortest_context(self._decode, prompt_tail)
        self._context_text = self._decode(self._context)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._context + self._held)
        if text.endswith(_REPLACEMENT):
            return self._take(self._place_of_cut(text)) if len(self._held) >= _MAX_HELD else ""
        if text != self._context_text:
            return self._take(len(self._held))
        if len(self._held) >= _MAX_HELD:
            self._held.clear()
        # no text yet: a special token, or a space that a decoder strips unless more follows
        return ""

    def flush(self) -> str:
        return self._take(len(self._held)) if self._held else ""

    def _take(self, count: int) -> str:
        """Make the first held tokens the context and return their text."""
        taken = self._held[:count]
        text = self._decode(self._context + taken)
        # a stray byte makes the byte-fallback decoder take back the characters just before it
        new = text[len(self._context_text) :] if text.startswith(self._context_text) else self._decode(taken)
        self._context, self._held = taken, self._held[count:]
        self._context_text = self._decode(taken)
        return new

    def _place_of_cut(self, text: str) -> int:
        """Return how many held tokens to show of a long run that never ends in a whole character.

        Any character still incomplete starts in the last tokens; a cut before them must not change the text.
        """
        for count in range(len(self._held) - _MAX_UTF8_TAIL, 0, -1):
            if text.startswith(self._decode(self._context + self._held[:count])):
                return count
        return len(self._held)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class _StopScanner:
    """Passes text on, but for an end that could become a stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string is empty")
        self._pending = ""
        self.stopped = False

    def scan(self, text: str) -> str:
        self._pending += text
        matches = [(self._pending.find(stop), stop) for stop in self._stops if stop in self._pending]
        if matches:
            _, start = min((start + len(stop), start) for start, stop in matches)
            self.stopped = True
            return self._release(start)
        return self._release(len(self._pending) - self._length_of_possible_stop())

    def flush(self) -> str:
        return "" if self.stopped else self._release(len(self._pending))

    def _release(self, count: int) -> str:
        text, self._pending = self._pending[:count], self._pending[count:]
        return text

    def _length_of_possible_stop(self) -> int:
        """Return the length of the longest end of the pending text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def _shortest_context(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[int]:
    """Return the fewest last tokens that have a text of whole characters; all given if there are none."""
    for count in range(1, len(tokens) + 1):
        text = decode(list(tokens[-count:]))
        if text and _REPLACEMENT not in text:
            return list(tokens[-count:])
    return list(tokens)
