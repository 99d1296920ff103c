"""`/v1/completions` through the `openai` client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from edgekit.runtimes.engine import LoadedModel

PROMPT = "Once upon a time"


def test_text_is_the_models(client: openai.OpenAI, model: LoadedModel) -> None:
    expected = model.generate(PROMPT, raw=True, max_tokens=16)
    reply = client.completions.create(model="tiny", prompt=PROMPT)  # 16 tokens are OpenAI's default
    assert reply.choices[0].text == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.stats.prompt_tokens


def test_several_prompts_and_choices(client: openai.OpenAI, model: LoadedModel) -> None:
    prompts = [PROMPT, "The end"]
    reply = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=8)
    expected = [model.generate(prompt, raw=True, max_tokens=8).text for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(len(model.token_ids(text, add_special_tokens=True)) for text in prompts)


@pytest.mark.parametrize("echo", [False, True])
def test_stream_adds_up(client: openai.OpenAI, echo: bool) -> None:
    asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "echo": echo}
    whole = client.completions.create(**asked).choices[0].text
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole
    assert whole.startswith(PROMPT) == echo
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": [1, 2, 3]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"messages": []}}, "messages"),
    ],
)
def test_refusals_name_the_parameter(client: openai.OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT} | options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
