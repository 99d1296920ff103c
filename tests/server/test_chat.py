"""`/v1/chat/completions` and `/v1/models` through the `openai` client, against the model itself."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from edgekit.runtimes.engine import LoadedModel

from .conftest import Start

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"}]


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgekit"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_reply_is_the_models(client: openai.OpenAI, model: LoadedModel) -> None:
    expected = model.generate(MESSAGES, max_tokens=24)
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.stats.prompt_tokens
    assert reply.usage.completion_tokens == expected.stats.new_tokens
    assert reply.usage.total_tokens == expected.stats.prompt_tokens + expected.stats.new_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}, {"n": 3, "temperature": 1.2, "seed": 5}])
def test_stream_adds_up_to_the_reply(client: openai.OpenAI, options: Any) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24} | options
    whole = client.chat.completions.create(**asked)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    ends, roles = dict[int, Any](), list[int]()
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles.append(choice.index)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert roles == list(texts)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_choices_differ_and_count_the_prompt_once(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8)
    many = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, n=4, seed=1, temperature=1.5)
    assert len({choice.message.content for choice in many.choices}) == 4
    assert one.usage is not None
    assert many.usage is not None
    assert many.usage.prompt_tokens == one.usage.prompt_tokens
    assert many.usage.completion_tokens == 32


def test_seed_makes_it_repeatable(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1.5}
    texts = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_ends_the_reply(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text
    stop = text[6:8]
    for given in (stop, ["never seen", stop]):
        reply = client.chat.completions.create(**asked, stop=given).choices[0]
        assert (reply.message.content, reply.finish_reason) == (text[: text.index(stop)], "stop")


def test_parts_and_developer_are_texts_and_system(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello,"}, {"type": "text", "text": "you"}]},
    ]
    plain: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello,\nyou"}]
    texts = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=12).choices[0].message.content
        for messages in (parts, plain)
    ]
    assert texts[0] == texts[1]


def test_reply_may_be_sent_back(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8).choices[0].message
    again: Any = [*MESSAGES, reply.model_dump(), {"role": "user", "content": "Go on."}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=8).choices


def test_both_limits_mean_the_same(client: openai.OpenAI) -> None:
    for options in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        reply = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)  # type: ignore[call-overload]
        assert reply.usage.completion_tokens == 3


def test_harmless_parameters_are_accepted(client: openai.OpenAI) -> None:
    asked: Any = {
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "key",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "modalities": ["text"],
        "extra_body": {"audio": None, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    }
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, **asked).choices


def test_prompt_over_the_context_is_refused(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x" * 5000}], stream=stream
            )
        assert caught.value.param == "messages"
        assert caught.value.code == "context_length_exceeded"


def test_beginning_of_a_conversation_is_not_computed_again(start: Start) -> None:
    first: Any = [{"role": "user", "content": "A long beginning that is worth to be kept. " * 3}]
    with start() as running, running.client() as client:
        reply = client.chat.completions.create(model="tiny", messages=first, max_tokens=8)
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        more: Any = [*first, said, {"role": "user", "content": "Go on."}]
        again = client.chat.completions.create(model="tiny", messages=more, max_tokens=8)
    assert reply.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= reply.usage.prompt_tokens - 1


def test_dropped_turns_are_told(client: openai.OpenAI) -> None:
    turns: Any = [{"role": "user", "content": "x" * 1500}, {"role": "assistant", "content": "y" * 1500}]
    asked: Any = {"model": "tiny", "messages": [*turns, *turns, *MESSAGES], "max_tokens": 4}
    asked["extra_body"] = {"context_policy": "drop-oldest-turns"}
    told = client.chat.completions.create(**asked).model_extra
    assert told is not None
    assert 0 in told["edgekit"]["dropped_messages"]
    *_, last = client.chat.completions.create(**asked, stream=True)
    assert last.model_extra == told
