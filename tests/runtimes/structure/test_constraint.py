from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models

from edgekit.errors import GenerationError
from edgekit.runtimes.constraint import Constraint, TokenizerInfo
from edgekit.structure import Choice, JsonSchema, Lark, Regex, Structure

SHORT = {"type": "string", "maxLength": 6}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "integer in a range": {"type": "integer", "minimum": -17, "maximum": 203},
    "open range": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12},
    "number": {"type": "number", "minimum": -0.5, "maximum": 12.25},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "text": {"type": "string"},
    "text of a length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"},
    "pattern inside": {"type": "string", "pattern": "ab+c", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "enum": {"enum": ["red", "grün", 3, None, True, {"a": [1]}]},
    "unicode": {"enum": ["naïve ☕", "日本語", 'a"b\\c', "😀", "line\nbreak"]},
    "const": {"const": {"kind": "x", "n": [1, 2.5]}},
    "object": {
        "type": "object",
        "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "optional fields": {
        "type": "object",
        "properties": {"a": SHORT, "b": {"type": "boolean"}, "c": {"type": "null"}, "ü": {"type": "integer"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "free fields": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 4,
    },
    "fields by pattern": {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": SHORT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "nested": {
        "type": "object",
        "properties": {
            "address": {
                "type": "object",
                "properties": {"street": SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["street", "zip"],
                "additionalProperties": False,
            },
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        },
        "required": ["address", "tags"],
        "additionalProperties": False,
    },
    "array with bounds": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, SHORT], "items": False, "minItems": 2},
    "any of": {"anyOf": [{"type": "integer"}, SHORT, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "one of": {"oneOf": [{"type": "null"}, {"type": "boolean"}, {"type": "integer", "maximum": 9, "minimum": 0}]},
    "one of with a tag": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": value},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind, value in (("number", {"type": "integer"}), ("text", SHORT))
        ]
    },
    "all of": {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    "types": {"type": ["string", "integer", "null"], "maxLength": 3},
    "references": {
        "$defs": {"point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "recursive": TREE,
    "annotations": {"title": "T", "description": "d", "default": 1, "examples": [2], "type": "integer", "maximum": 9},
}
REGEXES = (
    r"[0-9]{4}-[0-9]{2}", "(?:ab|cd)+e?", "[à-öא-ת]{2,4}", " a b ", r"a/b\\c\"d", "line\nbreak", "(?i)yes|no",
    r"\$[0-9]+(\.[0-9]{2})?", "^anchored$", "", "😀{2}", r"[a-z ]{3,9}", "é+x", r"#[0-9A-F]{6}", ".{5}", r"\{\"a\": [01]\}",
)  # fmt: skip
SUM = """
start: term ("+" term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-9]{1,3}/
"""


def is_sum(text: str) -> bool:
    """A recursive-descent reader of the grammar above."""

    def read_sum(place: int) -> int:
        place = read_term(place)
        while text[place : place + 1] == "+":
            place = read_term(place + 1)
        return place

    def read_term(place: int) -> int:
        if text[place : place + 1] == "(":
            place = read_sum(place + 1)
            return place + 1 if text[place : place + 1] == ")" else len(text) + 1
        number = re.compile(r"[0-9]{1,3}").match(text, place)
        return number.end() if number else len(text) + 1

    return read_sum(0) == len(text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_of_random_logits_is_valid(name: str, info: TokenizerInfo, write: Callable[..., Any]) -> None:
    schema, complete = SCHEMAS[name], 0
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for seed in range(8):
        written = write(Constraint(JsonSchema(schema), info), info, seed)
        if written.complete:
            complete += 1
            validator.validate(json.loads(written.text))
    assert complete >= 5


@pytest.mark.parametrize("pattern", REGEXES)
def test_texts_of_a_regex_match_it(pattern: str, info: TokenizerInfo, write: Callable[..., Any]) -> None:
    for seed in range(6):
        written = write(Constraint(Regex(pattern), info), info, seed)
        assert written.complete
        assert re.fullmatch(pattern, written.text), written.text


@pytest.mark.parametrize(
    "options", [("a", "ab", "abc"), ('"', "\\", "\n", "\t\r", "\x00", "😀", "</s>", "<think>", " x", "a/b", "é", "{}")]
)
def test_a_choice_is_one_of_its_options(
    options: tuple[str, ...], info: TokenizerInfo, write: Callable[..., Any]
) -> None:
    texts = {write(Constraint(Choice(options), info), info, seed).text for seed in range(60)}
    assert texts <= set(options)
    assert len(texts) > len(options) / 2


def test_texts_of_a_grammar_are_derived_from_it(info: TokenizerInfo, write: Callable[..., Any]) -> None:
    written = [write(Constraint(Lark(SUM), info), info, seed) for seed in range(20)]
    assert sum(text.complete for text in written) > 10
    assert all(is_sum(text.text) for text in written if text.complete)


@given(st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, SHORT, {"enum": ["ä", 1]}, {"type": "null"}]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda all_: {"anyOf": all_}),
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 3}),
        st.dictionaries(st.sampled_from(["a", "b b", 'c"']), inner, max_size=3).map(
            lambda fields: {"type": "object", "properties": fields, "required": sorted(fields)[:1],
                            "additionalProperties": False}
        ),
    ),
    max_leaves=6,
), st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_schema_is_kept(schema: dict[str, Any], seed: int) -> None:
    info, constraint = _BYTES, Constraint(JsonSchema(schema), _BYTES)
    random, text = np.random.default_rng(seed), bytearray()
    while not constraint.is_complete and len(text) < 3000:
        token = int(constraint.mask(random.normal(size=info.vocab_size).astype(np.float32)).argmax())
        constraint.accept(token)
        if token not in info.end_tokens:
            text += info.matching.decode_bytes([token])
    if constraint.may_end:
        Draft202012Validator(schema).validate(json.loads(text))


def make_bytes_info() -> TokenizerInfo:
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE({text: place for place, text in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return TokenizerInfo(tokenizer, 300, [256])


_BYTES = make_bytes_info()


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        (JsonSchema({"type": "strin"}), "the JSON schema can't be used: Invalid type: strin"),
        (JsonSchema({"type": 5}), "type must be a string"),
        (JsonSchema({"not": {}}), 'Unimplemented keys: ."not"'),
        (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (JsonSchema({"if": {}, "then": {}}), "Unimplemented keys"),
        (JsonSchema({"$ref": "#/nowhere"}), "Pointer '/nowhere' does not exist"),
        (JsonSchema({"$ref": "https://example.com/s"}), "example.com"),
        (JsonSchema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable"),
        (JsonSchema({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), "oneOf"),
        (JsonSchema({"type": "string", "format": "klingon"}), "Unknown format: klingon"),
        (JsonSchema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (JsonSchema({"enum": []}), "Unsatisfiable"),
        (JsonSchema({"const": object()}), "not JSON"),
        (JsonSchema({"const": float("nan")}), "not JSON"),
        (Regex("[ab"), "unclosed character class"),
        (Regex("(?=a)b"), "look-around"),
        (Regex("a\\"), "half an escape"),
        (Regex("(" * 5000 + ")" * 5000), "the regular expression can't be used"),
        (Regex(r"[^\s\S]"), "no token of this model continues"),
        (Regex("\ud800"), "not valid Unicode"),
        (Lark("start: missing"), 'unknown name: "missing"'),
        (Lark('start: "'), "lexer error"),
        (Lark("stop: /a/"), "start"),
        (Lark(""), "the grammar can't be used"),
        (Choice(()), "the choice has no options"),
        (Choice(("a", "")), "an option of the choice is empty"),
        (Choice(("\udfff",)), "not valid Unicode"),
        ("a text", "the structure is a str"),
    ],
)
def test_a_malformed_structure_is_one_line_before_any_logits(
    structure: Any, problem: str, byte_level: TokenizerInfo
) -> None:
    with pytest.raises(GenerationError, match=re.escape(problem) if "[" in problem else problem) as caught:
        Constraint(structure, byte_level)
    assert "\n" not in caught.value.message
    assert caught.value.hint or "not JSON" in problem


@given(st.sampled_from([Regex, Lark, lambda text: JsonSchema({"pattern": text})]), st.text(
    st.one_of(st.sampled_from('()[]{}|*+?\\^$.-:"/%@<>!&~ \n_aA0'), st.characters(exclude_categories=["Cs"])), max_size=24
))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_text_makes_another_error(structure: Callable[[str], Structure], text: str) -> None:
    with contextlib.suppress(GenerationError):
        Constraint(structure(text), _BYTES).close()


def allowed(constraint: Constraint, info: TokenizerInfo) -> set[int]:
    return set(np.flatnonzero(np.isfinite(constraint.mask(np.zeros(info.vocab_size, np.float32)))).tolist())


def test_end_tokens_are_allowed_where_the_text_may_end_and_all_of_them(info: TokenizerInfo) -> None:
    constraint, ends = Constraint(Regex("ab*"), info), set(info.end_tokens)
    assert not allowed(constraint, info) & ends
    constraint.accept(info.matching.tokenize_str("a")[0])
    assert ends < allowed(constraint, info)
    assert constraint.may_end
    assert not constraint.is_complete
    for end in ends:
        fresh = Constraint(Regex("a?"), info)
        fresh.accept(end)
        assert fresh.is_complete


def test_a_structure_without_continuation_is_complete_without_an_end_token(info: TokenizerInfo) -> None:
    constraint = Constraint(Choice(("a",)), info)
    assert not constraint.is_complete
    constraint.accept(next(iter(allowed(constraint, info))))
    assert constraint.is_complete
    assert allowed(constraint, info) == set(info.end_tokens)
    assert Constraint(Regex(""), info).is_complete


def test_padding_and_special_tokens_never_match_text(info: TokenizerInfo) -> None:
    tokenizer = info.tokenizer
    special = {place for place, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    beyond = set(range(tokenizer.get_vocab_size(), info.vocab_size))
    for structure in (Regex("(?s:.*)"), JsonSchema({}), Lark("start: /(.|\\n)*/")):
        found = allowed(Constraint(structure, info), info)
        assert not found & (special - set(info.end_tokens))
        assert not found & beyond


def test_an_end_token_that_has_a_text_does_not_pass_for_it(byte_level: TokenizerInfo) -> None:
    tokenizer = byte_level.tokenizer
    letter = tokenizer.token_to_id("a")
    info = TokenizerInfo(tokenizer, byte_level.vocab_size, [letter])
    constraint = Constraint(Regex("[ab]{2}"), info)
    assert letter not in allowed(constraint, info)
    assert constraint.count_valid([letter]) == 0
    with pytest.raises(ValueError, match="breaks"):
        constraint.accept(letter)


def test_fewer_logits_than_tokens_forbid_the_rest(byte_level: TokenizerInfo) -> None:
    info = TokenizerInfo(byte_level.tokenizer, 100, [byte_level.tokenizer.token_to_id("A"), 10**6])
    assert max(allowed(Constraint(Regex(".*"), info), info)) < 100


def test_the_mask_keeps_the_allowed_logits(byte_level: TokenizerInfo) -> None:
    logits = np.random.default_rng(0).normal(size=byte_level.vocab_size).astype(np.float32)
    before, constraint = logits.copy(), Constraint(Regex("[a-f]+"), byte_level)
    masked, kept = constraint.mask(logits), sorted(allowed(constraint, byte_level))
    assert (logits == before).all()
    masked = constraint.mask(logits)
    assert (masked[kept] == logits[kept]).all()
    assert np.isneginf(np.delete(masked, kept)).all()
    with pytest.raises(ValueError, match="expected"):
        constraint.mask(logits[:-1])


def test_drafts_count_up_to_the_first_that_breaks_the_structure(info: TokenizerInfo) -> None:
    constraint = Constraint(JsonSchema({"type": "array", "items": {"type": "integer"}}), info)
    good = info.tokenizer.encode("x[1, 2").ids[len(info.visible_tail) :]
    bad = info.tokenizer.encode("xabc").ids[len(info.visible_tail) :]
    before = allowed(constraint, info)
    assert constraint.count_valid(good) == len(good)
    assert constraint.count_valid([*good, *bad]) == len(good)
    assert constraint.count_valid([*good, info.vocab_size - 1]) == len(good)
    assert constraint.count_valid([]) == 0
    assert allowed(constraint, info) == before


def test_a_token_that_breaks_the_structure_is_not_accepted(byte_level: TokenizerInfo) -> None:
    constraint = Constraint(Regex("a+"), byte_level)
    for token in (byte_level.tokenizer.token_to_id("b"), byte_level.end_tokens[0], byte_level.vocab_size - 1):
        with pytest.raises(ValueError, match="breaks the regular expression"):
            constraint.accept(token)
    constraint.accept(byte_level.tokenizer.token_to_id("a"))
    assert constraint.may_end


@pytest.mark.parametrize("option", ["ü", "aüb", "ab\x13a"])
def test_a_character_that_no_token_spells_is_an_error_and_never_left_out(option: str) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|end|>": 3}, [("a", "b")]))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.decoder = decoders.ByteLevel()
    info = TokenizerInfo(tokenizer, 4, [3])
    with pytest.raises(GenerationError, match="no token of this model"):  # noqa: PT012
        constraint = Constraint(Choice((option,)), info)
        while True:
            constraint.accept(int(constraint.mask(np.zeros(4, np.float32)).argmax()))


def test_a_tokenizer_that_is_not_understood_and_a_model_without_an_end_are_errors(byte_level: TokenizerInfo) -> None:
    tokenizer = Tokenizer.from_str(byte_level.tokenizer.to_str())
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(GenerationError, match="structures can't be used with this model's tokenizer"):
        Constraint(Regex("a"), TokenizerInfo(tokenizer, byte_level.vocab_size, byte_level.end_tokens))
    with pytest.raises(GenerationError, match="no end token"):
        Constraint(Regex("a"), TokenizerInfo(byte_level.tokenizer, byte_level.vocab_size, []))


def test_the_tokenizer_is_read_once_and_only_when_needed(byte_level: TokenizerInfo) -> None:
    assert byte_level.matching is byte_level.matching
    code = (
        "import sys, edgekit.runtimes.engine, edgekit.runtimes.output; from edgekit.runtimes.constraint import *;"
        "assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
