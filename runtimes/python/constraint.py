"""Holding a reply to a structure: which tokens may follow, for each row of logits.

The grammar engine is llguidance. It reads the bytes of every token from tokenizer.json and walks them through the
grammar, so that what is allowed does not depend on how a text is cut into tokens. Masks apply to logits, above any
backend.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GenerationError
from edgekit.structure import Choice, JsonSchema, Lark, Regex, Structure

if TYPE_CHECKING:  # llguidance is loaded when a structure is first used
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

__all__ = ["JSON_STYLE", "Constraint", "Grammar", "TokenizerInfo", "make_grammar"]

# As json.dumps writes. Free whitespace would let a model fill its whole reply with it.
JSON_STYLE: Final[JsonCompileOptions] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_MAX_MESSAGE = 300
_SAMPLE = 1000


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's own JSON form; `name` is what errors call it."""

    text: str
    name: str
    hint: str


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
    def first_bytes(self) -> NDArray[np.uint8]:
        """The first byte of every token's text, uint8 [vocab]; 0 where there is none."""
        known = min(self.vocab_size, self.tokenizer.get_vocab_size(with_added_tokens=True))
        texts = (self.matching.decode_bytes([token]) for token in range(known))
        firsts = np.zeros(self.vocab_size, dtype=np.uint8)
        firsts[:known] = [text[0] if text else 0 for text in texts]
        return firsts

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
            raise _unreadable(_one_line(error)) from error
        sample = range(0, known, max(known // _SAMPLE, 1))
        wrong = next((token for token in sample if not self._is_read(token, matching)), None)
        if wrong is not None and wrong not in self._added():
            raise _unreadable(f"the text of token {wrong} is read as {matching.decode_str([wrong])!r}")
        return matching

    def _is_read(self, token: int, matching: LLTokenizer) -> bool:
        """Whether llguidance takes a token for the text that detokenizing makes of it. Parts of characters pass."""
        if matching.is_special_token(token):
            return True
        tail = list(self.visible_tail)
        text = self.tokenizer.decode([*tail, token])[len(self.tokenizer.decode(tail)) :]
        return "\N{REPLACEMENT CHARACTER}" in text or bool(text.encode() == matching.decode_bytes([token]))


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
        # an end token that is not marked as special has a text, which must not pass for a part of the structure
        self._text_ends = [token for token in matching.eos_tokens if not matching.is_special_token(token)]
        self._matcher: LLMatcher = LLMatcher(
            matching, self._grammar.text, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if self._matcher.is_error():
            message = _one_line(self._matcher.get_error())
            raise GenerationError(f"{self._grammar.name} can't be used: {message}", hint=self._grammar.hint)
        self._misread = list(tokenizer.misread)
        self._words: NDArray[np.int32] = np.zeros((matching.vocab_size + 31) // 32, dtype=np.int32)
        self._masked = np.empty(self._vocab_size, dtype=np.float32)
        self._ended = False
        allowed = self._allowed()  # a structure without instances is refused before the model computes
        self._ended = self.may_end and self._ends.issuperset(np.flatnonzero(allowed).tolist())

    @property
    def is_complete(self) -> bool:
        """Whether the text is an instance and nothing can follow."""
        return self._ended or self._matcher.is_stopped()

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
        allowed = self._allowed()
        self._masked.fill(-np.inf)
        np.copyto(self._masked, logits, where=allowed)
        return self._masked

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
        never = (*self._text_ends, *self._misread)
        count = next(
            (place for place, token in enumerate(ids) if token >= self._vocab_size or token in never), len(ids)
        )
        return int(self._matcher.validate_tokens(ids[:count]))

    def close(self) -> None:
        """Free the parser."""
        del self._matcher

    def _allowed(self) -> NDArray[np.bool_]:
        """Return for each token whether it may follow, bool [vocab]."""
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), count=self._vocab_size, bitorder="little")
        allowed: NDArray[np.bool_] = bits.view(np.bool_)
        allowed[self._misread] = False
        stopped = matcher.is_stopped()
        forced = b"" if stopped else matcher.compute_ff_bytes()
        if forced:
            self._correct_forced(allowed, forced)
        if self._text_ends and not (stopped or matcher.is_accepting()):
            allowed[self._text_ends] = False
        # when nothing can follow, llguidance offers the end, also of a text that is not an instance
        if (stopped and not matcher.is_accepting()) or not allowed.any():
            raise self._dead_end()
        return allowed

    def _correct_forced(self, allowed: NDArray[np.bool_], forced: bytes) -> None:
        """Check the tokens of a text that must follow.

        llguidance asks the tokenizer for them, and a tokenizer may leave out or change characters: those that no token
        spells, U+2581 where it stands for a space, those that a normalizer composes. Then every token is tried.
        """
        allowed &= self._tokenizer.first_bytes == forced[0]
        if np.count_nonzero(allowed) <= 1 and not self.count_valid((int(allowed.argmax()),)):
            for token in range(self._vocab_size):
                allowed[token] = self.count_valid((token,)) == 1

    def _dead_end(self) -> GenerationError:
        reason = self._matcher.stop_reason()
        if reason in {"ParserTooComplex", "LexerTooComplex"}:
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
        raise GenerationError(f"the structure can't be used: {_one_line(error)}") from error
    raise GenerationError(
        f"the structure is a {type(structure).__name__}", hint="expected a JsonSchema, Regex, Lark or Choice"
    )


def _json_text(schema: object) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {_one_line(error)}") from error


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


def _unreadable(why: str) -> GenerationError:
    return GenerationError(
        f"structures can't be used with this model's tokenizer: {why}", hint="generate without a structure and tools"
    )


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"
