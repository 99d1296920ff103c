"""`/v1/completions` through the `openai` client."""

from __future__ import annotations

from functools import partial
from typing import Any

import openai
import pytest

from edgekit.runtimes.engine import LoadedModel
from edgekit.runtimes.generation import Generation

from .conftest import NEVER_ENDS, Start

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


def test_choices_are_those_of_generate_many(client: openai.OpenAI, model: LoadedModel) -> None:
    options: Any = {"max_tokens": 12, "temperature": 1.2, "seed": 5}
    reply = client.completions.create(model="tiny", prompt=PROMPT, n=3, **options)
    expected = model.generate_many(PROMPT, 3, raw=True, **options)
    assert [choice.text for choice in reply.choices] == [one.text for one in expected]
    assert len({one.text for one in expected}) == 3


def test_prompt_is_scored_once_for_all_choices(
    client: openai.OpenAI, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Any = {"model": "tiny", "prompt": [PROMPT, "Other"], "max_tokens": 1, "echo": True, "logprobs": 0}
    singles = [choice.logprobs for choice in client.completions.create(**asked).choices]
    scored: list[Any] = []
    prefill = Generation.prefill

    def counted(self: Generation) -> Any:
        scored.append(self._options.prompt_logprobs)
        return prefill(self)

    monkeypatch.setattr(Generation, "prefill", counted)
    many = client.completions.create(**asked, n=3).choices
    assert scored == [0, None, None] * 2
    for choice in many:
        single = singles[choice.index // 3]
        assert choice.logprobs is not None
        assert single is not None
        assert (choice.logprobs.token_logprobs or [])[:-1] == (single.token_logprobs or [])[:-1]


@pytest.mark.parametrize("path", ["chat", "completions", "responses"])
def test_whole_response_is_bounded(path: str, start: Start) -> None:
    asked: Any = {"model": "tiny", "extra_body": {"logit_bias": NEVER_ENDS}}
    with start(max_reply_bytes=3000, grace_s=0) as running, running.client() as client:
        create: Any = {
            "chat": partial(
                client.chat.completions.create, messages=[{"role": "user", "content": "Hi"}], max_tokens=50
            ),
            "completions": partial(client.completions.create, prompt=PROMPT, max_tokens=50),
            "responses": partial(client.responses.create, input="Hi", max_output_tokens=50),
        }[path]
        with pytest.raises(openai.BadRequestError) as caught:
            create(**asked)
        assert caught.value.code == "response_too_large"
        try:
            events = list(create(**asked, stream=True))
        except openai.BadRequestError as early:  # on a busy machine all is computed before the stream's head is sent
            if (path, early.code) != ("responses", "response_too_large"):
                raise
            return
    if path == "responses":  # its last event would repeat all
        assert "over 3,000 bytes" in events[-1].response.error.message
    else:
        assert events[-1].choices[0].finish_reason == "length"


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
