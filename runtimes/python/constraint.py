"""Holding a reply to a structure: which tokens may follow, for each row of logits.

The grammar engine is llguidance. It reads the bytes of every token from tokenizer.json and walks them through the
grammar, so that what is allowed does not depend on how a text is cut into tokens. Masks apply to logits, above any
backend.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.structure import Choice, JsonSchema, Lark, Regex, Structure

from .tokenizer_info import TokenizerInfo, one_line, pack_tokens

if TYPE_CHECKING:  # llguidance is loaded when a structure is first used
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

__all__ = ["JSON_STYLE", "Constraint", "Grammar", "TokenizerInfo", "make_grammar"]

# As json.dumps writes. Free whitespace would let a model fill its whole reply with it.
JSON_STYLE: Final[JsonCompileOptions] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS = np.where(_BITS == 1, np.float32(np.inf), np.float32(-np.inf))  # for each byte of a mask, of its eight tokens


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as llguidance takes it, Lark or JSON; `name` is what errors call it."""

    text: str
    name: str
    hint: str


class Constraint:
    """Follows one reply through a structure. Not safe to share between threads.

    Args:
        structure: What the text has to be, or a grammar made of it.
        tokenizer: Of the model that generates.

    Raises:
        GenerationError: The structure is malformed or not supported, or no text of this model's tokens is one.
    """

    def __init__(self, structure: Structure | Grammar, tokenizer: TokenizerInfo) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._grammar = structure if isinstance(structure, Grammar) else make_grammar(structure)
        matching = tokenizer.matching
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size
        self._ends = frozenset(matching.eos_tokens)
        self._matcher: LLMatcher = LLMatcher(
            matching, self._grammar.text, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if self._matcher.is_error():
            message = one_line(self._matcher.get_error())
            raise GenerationError(f"{self._grammar.name} can't be used: {message}", hint=self._grammar.hint)
        self._bytes = np.zeros_like(tokenizer.kept)
        self._limits = np.empty((len(self._bytes), 8), dtype=np.float32)
        self._masked = np.empty(self._vocab_size, dtype=np.float32)
        self._ended = False
        self._allow()  # a structure without instances is refused before the model computes
        allowed = np.flatnonzero(np.unpackbits(self._bytes, bitorder="little"))
        self._ended = self.may_end and self._ends.issuperset(allowed.tolist())

    @property
    def is_complete(self) -> bool:
        """Whether the text is an instance and nothing can follow."""
        # the matcher also stops where it fails
        return self._ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    @property
    def may_end(self) -> bool:
        """Whether the text so far is an instance."""
        return self._ended or self._matcher.is_accepting()

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits with minus infinity where a token would break the structure.

        End tokens are allowed where the text is an instance. The array is used again by the next call.

        Args:
            logits: float32 [vocab], left unchanged.

        Raises:
            GenerationError: The grammar has become too complex to follow, or no token can continue the text.
            ValueError: The shape is not [vocab].
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits have shape {list(logits.shape)}, expected [{self._vocab_size}]")
        self._allow()
        np.take(_LIMITS, self._bytes, axis=0, out=self._limits, mode="clip")
        return np.minimum(logits, self._limits.reshape(-1)[: self._vocab_size], out=self._masked)

    def accept(self, token: int) -> None:
        """Add a token to the text; an end token ends it.

        Raises:
            ValueError: The token breaks the structure.
        """
        if token in self._ends and self.may_end:
            self._ended = True
        elif self._ended or token >= self._vocab_size or self.count_valid((token,)) != 1:
            raise ValueError(f"token {token} breaks {self._grammar.name}")
        else:
            self._matcher.consume_token(token)

    def count_valid(self, tokens: Sequence[int]) -> int:
        """Return how many of the first tokens could follow one another from here; nothing is accepted."""
        if self._ended:
            return 0
        ids = list(tokens)
        never = self._tokenizer.never_inside
        beyond = (place for place, token in enumerate(ids) if token >= self._vocab_size or token in never)
        return int(self._matcher.validate_tokens(ids[: next(beyond, len(ids))]))

    def forced_tokens(self) -> list[int]:
        """Return the text that must follow, as the tokenizer cuts it; empty where there is a choice."""
        return [] if self.is_complete else list(self._matcher.compute_ff_tokens())

    def close(self) -> None:
        """Free the parser."""
        del self._matcher

    def _allow(self) -> None:
        """Set the bits of the tokens that may follow."""
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._bytes.ctypes.data, self._bytes.nbytes)
        stopped, accepting = matcher.is_stopped(), matcher.is_accepting()
        self._bytes &= self._tokenizer.kept if accepting else self._tokenizer.kept_inside
        forced = b"" if stopped else matcher.compute_ff_bytes()
        if forced:
            self._correct_forced(forced)
        # when nothing can follow, llguidance offers the end, also of a text that is not an instance
        if (stopped and not accepting) or not self._bytes.any():
            raise self._dead_end()

    def _correct_forced(self, forced: bytes) -> None:
        """Check the tokens of a text that must follow.

        llguidance asks the tokenizer for them, and a tokenizer may leave out or change characters: those that no token
        spells, U+2581 where it stands for a space, those that a normalizer composes. Then every token is tried.
        """
        first = self._tokenizer.tokens_from(forced[0])
        self._bytes &= first
        if int(np.bitwise_count(self._bytes).sum()) <= 1:
            allowed = np.flatnonzero(np.unpackbits(self._bytes, bitorder="little")).tolist()
            if not self.count_valid(allowed):
                valid = [token for token in range(self._vocab_size) if self.count_valid((token,))]
                self._bytes[:] = pack_tokens(valid, len(self._bytes))

    def _dead_end(self) -> GenerationError:
        complaint = f"{self._matcher.stop_reason()} {self._matcher.get_error()}"
        if any(limit in complaint for limit in ("TooComplex", "items; max is")):
            return GenerationError(
                f"{self._grammar.name} is too complex to follow", hint="use fewer alternatives and smaller bounds"
            )
        return GenerationError(
            f"{self._grammar.name} can't be used: no token of this model continues the text to an instance",
            hint="check that an instance exists",
        )


def make_grammar(structure: Structure) -> Grammar:
    """Return a structure in llguidance's form. Most of what is wrong with it shows only in a Constraint.

    Raises:
        GenerationError: A schema is not JSON, choices are missing, or a text is not valid Unicode.
    """
    from llguidance import LLMatcher

    try:
        if isinstance(structure, JsonSchema):
            hint = "use what JSON Schema 2020-12 and llguidance have in common: anyOf for oneOf, no `not`, no `if`"
            schema = _json_text(structure.schema)
            return Grammar(LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE), "the JSON schema", hint)
        if isinstance(structure, Regex):
            hint = "the syntax is that of Rust's regex crate, without look-around and word boundaries"
            return Grammar(
                LLMatcher.grammar_from_regex(_checked_regex(structure, hint)), "the regular expression", hint
            )
        if isinstance(structure, Choice):
            return Grammar(LLMatcher.grammar_from_lark(_choice_grammar(structure)), "the choice", "use fewer options")
        if isinstance(structure, Lark):
            hint = "the notation is that of Lark, with llguidance's extensions: rules in lower case, terminals in upper"
            return Grammar(LLMatcher.grammar_from_lark(structure.grammar), "the grammar", hint)
    except UnicodeEncodeError as error:
        raise GenerationError("the structure is not valid Unicode", hint="leave out lone surrogates") from error
    except ValueError as error:
        raise GenerationError(f"the structure can't be used: {one_line(error)}") from error
    raise GenerationError(
        f"the structure is a {type(structure).__name__}", hint="expected a JsonSchema, Regex, Lark or Choice"
    )


def _json_text(schema: object) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {one_line(error)}") from error


def _checked_regex(regex: Regex, hint: str) -> str:
    pattern = regex.pattern
    backslashes = len(pattern) - len(pattern.rstrip("\\"))
    if backslashes % 2:  # llguidance would take it for a part of its own notation
        raise GenerationError("the regular expression can't be used: it ends in half an escape", hint=hint)
    pattern.encode()
    return pattern


def _choice_grammar(choice: Choice) -> str:
    options = (choice.options,) if isinstance(choice.options, str) else tuple(choice.options)
    if not options or not all(options):
        raise GenerationError(
            "the choice has no options" if not options else "an option of the choice is empty",
            hint="give at least one text, each of at least one character",
        )
    texts = [json.dumps(option, ensure_ascii=False) for option in options]
    for text in texts:
        text.encode()
    # one terminal, so that an option may be the beginning of another
    return "start: CHOICE\nCHOICE: " + " | ".join(texts)
