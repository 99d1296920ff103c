from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtimes.reasoning import ReasoningMarks, ReasoningSplitter, is_thinking_open, reasoning_marks

THINK = ReasoningMarks("<think>", "</think>")
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "think>", "</", "a", " ", "\n", "\n\n", "<thin", "好"]), max_size=12
)


def split(text: str, *, opened: bool = False, sizes: int = 10**6) -> tuple[str, str]:
    splitter, answer, thought = ReasoningSplitter(THINK, opened=opened), "", ""
    parts = [splitter.push(text[place : place + sizes]) for place in range(0, len(text), sizes)] + [splitter.finish()]
    for part in parts:
        answer, thought = answer + part[0], thought + part[1]
    return answer, thought


@pytest.mark.parametrize(
    ("text", "opened", "answer", "thought"),
    [
        ("Hello", False, "Hello", ""),
        ("<think>\nI add.\n</think>\n\n4", False, "4", "I add."),
        ("\n<think>a</think>b", False, "b", "a"),
        ("<think>\n\n</think>\n\n4", False, "4", ""),
        ("I add.\n</think>\n\n4", True, "4", "I add."),
        ("\nI\n\nadd.\n</think>4", True, "4", "I\n\nadd."),
        ("I never stop\n", True, "", "I never stop"),
        ("I </thin", True, "", "I </thin"),
        ("<think>one</think>\n\n\n\nx", False, "\n\nx", "one"),
        ("See <think>x</think>", False, "See <think>x</think>", ""),
        ("<think>a</think>b<think>c</think>", False, "b<think>c</think>", "a"),
        ("  <thin", False, "  <thin", ""),
        ("", True, "", ""),
        ("\n\n", True, "", ""),
        ("", False, "", ""),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, opened: bool, answer: str, thought: str) -> None:
    for sizes in (1, 2, 3, 7, 10**6):
        assert split(text, opened=opened, sizes=sizes) == (answer, thought)


@given(PIECES, st.booleans())
def test_pieces_do_not_matter_and_nothing_but_marks_and_newlines_is_lost(pieces: list[str], opened: bool) -> None:
    text = "".join(pieces)
    answer, thought = split(text, opened=opened)
    assert all(split(text, opened=opened, sizes=size) == (answer, thought) for size in (1, 2, 5))

    def letters(value: str) -> str:
        return "".join(value.replace("<think>", "", 1).replace("</think>", "", 1).split())

    inside = ("<think>" if thought and not opened else "") + thought
    whole = inside + ("</think>" if "</think>" in text and (thought or opened or inside) else "") + answer
    if not (opened or text.lstrip().startswith("<think>")):
        assert (answer, thought) == (text, "")
    else:
        assert letters(whole).startswith(letters(text)[: len(letters(thought))])


def test_shown_text_is_never_part_of_a_mark() -> None:
    splitter = ReasoningSplitter(THINK)
    assert splitter.push("<thi") == ("", "")
    assert splitter.push("nk>a") == ("", "a")
    assert splitter.push("b</") == ("", "b")
    assert splitter.push("think") == ("", "")
    assert splitter.push(">c") == ("c", "")
    assert splitter.push("</think>") == ("</think>", "")


def test_the_template_says_which_marks_and_whether_they_are_open() -> None:
    assert reasoning_marks("{{ x.split('</think>') }}") == THINK
    assert reasoning_marks("[THINK] [/THINK]") == ReasoningMarks("[THINK]", "[/THINK]")
    assert reasoning_marks("{{ messages }}") is None
    assert reasoning_marks(None) is None
    assert is_thinking_open(THINK, "<|assistant|>\n<think>\n")
    assert not is_thinking_open(THINK, "<|assistant|>\n<think>\n\n</think>\n\n")
    assert not is_thinking_open(THINK, "What does <think> mean?<|assistant|>")
    assert not is_thinking_open(None, "<think>")
