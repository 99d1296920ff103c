"""Shared by the tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgekit.errors import GenerationError
from edgekit.runtimes.chat_template import ChatTemplate


@pytest.fixture(scope="session")
def refusal() -> Callable[..., GenerationError]:
    """`refusal(template, messages)`: the error of a template that can't be rendered; one line, with a hint."""

    def refused(source: str, messages: list[dict[str, Any]] | None = None) -> GenerationError:
        with pytest.raises(GenerationError) as caught:
            ChatTemplate(source).render(messages or [{"role": "user", "content": "Hello"}])
        assert caught.value.hint
        assert "\n" not in caught.value.message
        assert " at 0x" not in caught.value.message
        return caught.value

    return refused
