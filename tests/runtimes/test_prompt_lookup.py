from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtimes.prompt_lookup import PromptLookup

TEXTS = st.lists(st.integers(0, 3), max_size=60)  # few kinds of tokens, so that much repeats
LONG = 20_000


def longest_match(tokens: list[int]) -> int:
    """The longest suffix that also ends earlier, by trying every length."""
    for length in range(len(tokens) - 1, 0, -1):
        if any(tokens[end - length : end] == tokens[-length:] for end in range(length, len(tokens))):
            return length
    return 0


def follows_a_match(tokens: list[int], length: int, drafted: list[int]) -> bool:
    """Whether the draft is what an earlier occurrence of the suffix goes on with, in the text with the draft behind it."""
    whole = [*tokens, *drafted]
    ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
    return any(whole[end : end + len(drafted)] == drafted for end in ends)


@given(TEXTS)
def test_the_longest_suffix_that_occurs_earlier_is_matched(tokens: list[int]) -> None:
    assert PromptLookup(tokens).match_length == longest_match(tokens)


@given(TEXTS, st.integers(1, 12))
def test_a_draft_is_what_followed_the_longest_match(tokens: list[int], most: int) -> None:
    lookup = PromptLookup(tokens)
    drafted = lookup.draft(most)
    if length := longest_match(tokens):
        assert len(drafted) == most
        assert follows_a_match(tokens, length, drafted)
        expected = [(token, length + place) for place, token in enumerate(drafted)]
        assert [(p.token, p.match_length) for p in islice(lookup.predictions(), most)] == expected
    else:
        assert drafted == []


@given(TEXTS)
def test_a_prediction_is_ambiguous_where_different_tokens_followed(tokens: list[int]) -> None:
    if length := longest_match(tokens):
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        different = len({tokens[end] for end in ends}) > 1
        assert (next(PromptLookup(tokens).predictions()).evidence == "ambiguous") == different


def test_evidence_is_told_for_each_token_of_a_draft() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1])  # 1 2 three times, then 3 or 4
    found = [(p.token, p.match_length, p.evidence) for p in islice(lookup.predictions(), 3)]
    assert found == [(2, 1, "repeated"), (4, 2, "ambiguous"), (7, 3, "single")]


@given(TEXTS, TEXTS, st.integers(1, 12))
def test_growing_equals_starting_from_the_whole_text(first: list[int], second: list[int], most: int) -> None:
    grown = PromptLookup(first)
    for token in second:
        grown.draft(most)  # asking changes nothing
        grown.extend([token])
    whole = PromptLookup([*first, *second])
    assert (grown.match_length, grown.draft(most)) == (whole.match_length, whole.draft(most))
    assert list(grown.tokens) == [*first, *second]


def test_the_latest_of_equal_matches_is_copied() -> None:
    assert PromptLookup([7, 1, 7, 2, 7, 3, 7]).draft(1) == [3]
    assert PromptLookup([8, 9, 1, 5, 8, 9, 2, 6, 8, 9]).draft(2) == [2, 6]


def test_a_longer_match_wins_over_a_later_one() -> None:
    assert PromptLookup([1, 2, 3, 40, 2, 3, 50, 1, 2, 3]).draft(1) == [40]


def test_repetition_goes_on_past_the_end_of_the_text() -> None:
    assert PromptLookup([1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup([5, 5]).draft(3) == [5, 5, 5]


def test_nothing_is_drafted_where_nothing_repeats_or_nothing_is_asked_for() -> None:
    assert PromptLookup().draft(4) == []
    assert PromptLookup([1, 2, 3]).draft(4) == []
    assert PromptLookup([1, 1]).draft(0) == []


def test_the_index_grows_with_the_text_and_not_faster() -> None:
    for tokens in ([5] * LONG, [0, 1] * (LONG // 2), [i * i % 97 for i in range(LONG)]):
        lookup = PromptLookup(tokens)
        assert len(lookup._next) <= 2 * LONG  # states of a suffix automaton
        assert sum(map(len, lookup._next)) <= 3 * LONG  # and its transitions
