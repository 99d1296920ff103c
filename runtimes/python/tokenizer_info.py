"""What a grammar must know of a model's tokens: the bytes of each, read by llguidance from tokenizer.json."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError

if TYPE_CHECKING:  # llguidance is loaded when a structure is first used
    from llguidance import LLTokenizer

__all__ = ["TokenizerInfo", "one_line", "pack_tokens"]

_MAX_MESSAGE = 300
_SAMPLE = 1000


class TokenizerInfo:
    """What a grammar must know of a model's tokens. Make one for each model; it may be shared between threads.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        vocab_size: Length of a row of logits; may be more than the tokenizer has tokens, or fewer.
        end_tokens: The tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_tokens = tuple(sorted(end_tokens))
        self._lock = threading.RLock()
        self._matching: LLTokenizer | None = None

    @property
    def matching(self) -> LLTokenizer:
        """The tokenizer as llguidance sees it: takes some tenths of a second when it is first asked for.

        Raises:
            GenerationError: It does not follow from the tokenizer which bytes a token stands for, or nothing ends a
                reply.
        """
        with self._lock:
            if self._matching is None:
                self._matching = self._load()
            return self._matching

    @cached_property
    def visible_tail(self) -> tuple[int, ...]:
        """Tokens of a letter: with them as the tail of the prompt, detokenizing keeps a leading space of the reply."""
        return tuple(self.tokenizer.encode("x", add_special_tokens=False).ids)

    @cached_property
    def misread(self) -> tuple[int, ...]:
        """Added tokens that are detokenized to another text than llguidance takes them for.

        Some normalizers put a space before an added token. Such tokens can't be part of a structure.
        """
        return tuple(
            token for token in self._added() if token < self.vocab_size and not self._is_read(token, self.matching)
        )

    @cached_property
    def never_inside(self) -> frozenset[int]:
        """Tokens that no structure may go on with: misread ones, and end tokens that are not marked as special.

        An end token with a text of its own must not pass for a part of the structure.
        """
        ends = (end for end in self.matching.eos_tokens if not self.matching.is_special_token(end))
        return frozenset((*self.misread, *ends))

    @cached_property
    def kept(self) -> NDArray[np.uint8]:
        """All tokens of the row of logits that are not misread, as bits, uint8 [(tokens + 31) // 32 * 4]."""
        return pack_tokens(set(range(self.vocab_size)).difference(self.misread), self._mask_bytes)

    @cached_property
    def kept_inside(self) -> NDArray[np.uint8]:
        """Those of `kept` that may come before a text is complete."""
        return pack_tokens(set(range(self.vocab_size)) - self.never_inside, self._mask_bytes)

    def token_bytes(self, token: int) -> bytes:
        """What a token writes inside a text; it may be a part of a character.

        Where structures can't be used with the tokenizer, such a part is a replacement character.
        """
        if self._reader is not None:
            written: bytes = self._reader.decode_bytes([token])
            return written
        return self._text_of(token, skip_special_tokens=False).encode()

    @cached_property
    def _reader(self) -> LLTokenizer | None:
        with suppress(GenerationError):
            return self.matching
        return None

    @property
    def _mask_bytes(self) -> int:
        return (int(self.matching.vocab_size) + 31) // 32 * 4

    def tokens_from(self, byte: int) -> NDArray[np.uint8]:
        """The tokens whose text begins with a byte, as bits like `kept`."""
        return self._by_first_byte[byte]

    @cached_property
    def _by_first_byte(self) -> list[NDArray[np.uint8]]:
        known = min(self.vocab_size, self.tokenizer.get_vocab_size(with_added_tokens=True))
        tokens: list[list[int]] = [[] for _ in range(256)]
        for token in range(known):
            text = self.matching.decode_bytes([token])
            if text:
                tokens[text[0]].append(token)
        return [pack_tokens(some, self._mask_bytes) for some in tokens]

    def mark(self, text: str) -> str:
        """Return how a grammar in Lark's notation writes a mark: as one token if the tokenizer has it, else as text."""
        token = self.tokenizer.token_to_id(text)
        if token is not None and token < self.vocab_size and self.matching.is_special_token(token):
            return f"<[{token}]>"
        return json.dumps(text, ensure_ascii=False)

    def hidden_marks(self, marks: Collection[str]) -> dict[int, str]:
        """Return those marks, by token, that detokenizing with `skip_special_tokens` would leave out."""
        special = {token.content: place for place, token in self._added().items() if token.special}
        return {special[mark]: mark for mark in marks if mark in special}

    def _added(self) -> dict[int, Any]:
        added: dict[int, Any] = self.tokenizer.get_added_tokens_decoder()
        return added

    def _load(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        known = self.tokenizer.get_vocab_size(with_added_tokens=True)
        ends = [token for token in self.end_tokens if token < min(known, self.vocab_size)]
        if not ends:
            raise GenerationError(
                "this model has no end token, so that a reply with a structure could not end",
                hint="generate without a structure and tools, or convert a checkpoint that names its end token",
            )
        try:
            matching = LLTokenizer(_readable(self.tokenizer), n_vocab=max(self.vocab_size, known), eos_token=ends)
        except ValueError as error:
            raise _unreadable(one_line(error)) from error
        sample = range(0, known, max(known // _SAMPLE, 1))
        wrong = next((token for token in sample if not self._is_read(token, matching)), None)
        if wrong is not None and wrong not in self._added():
            raise _unreadable(f"the text of token {wrong} is read as {matching.decode_str([wrong])!r}")
        return matching

    def _is_read(self, token: int, matching: LLTokenizer) -> bool:
        """Whether llguidance takes a token for the text that detokenizing makes of it. Parts of characters pass."""
        if matching.is_special_token(token):
            return True
        text = self._text_of(token, skip_special_tokens=True)
        return "\N{REPLACEMENT CHARACTER}" in text or bool(text.encode() == matching.decode_bytes([token]))

    def _text_of(self, token: int, *, skip_special_tokens: bool) -> str:
        tail = list(self.visible_tail)
        text: str = self.tokenizer.decode([*tail, token], skip_special_tokens=skip_special_tokens)
        return text[len(self.tokenizer.decode(tail, skip_special_tokens=skip_special_tokens)) :]


def _readable(tokenizer: Any) -> str:
    """Return tokenizer.json with a decoder that llguidance knows.

    It takes the pieces of Metaspace as they are. Replace, ByteFallback and Fuse do the same inside a text.
    """
    source: str = tokenizer.to_str()
    if tokenizer.decoder is None or b"Metaspace" not in tokenizer.decoder.__getstate__():
        return source
    content = json.loads(source)
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(content)


def pack_tokens(tokens: Collection[int], size: int) -> NDArray[np.uint8]:
    """Bits of some tokens, uint8 [size]."""
    bits = np.zeros(size * 8, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little")


def _unreadable(why: str) -> GenerationError:
    return GenerationError(
        f"structures can't be used with this model's tokenizer: {why}", hint="generate without a structure and tools"
    )


def one_line(message: object) -> str:
    """Return a message of another library as one line that is not too long."""
    text = " ".join(str(message).split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"
