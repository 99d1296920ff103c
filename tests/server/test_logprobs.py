"""Log-probabilities in OpenAI's three forms, against those of the model."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from edgekit.runtimes.engine import LoadedModel
from edgekit.runtimes.tokenizer_info import TokenizerInfo

ASKED: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6}


def test_chat_tells_those_of_the_model(client: openai.OpenAI, model: LoadedModel) -> None:
    expected = model.generate(ASKED["messages"], max_tokens=6, logprobs=3).logprobs
    reply = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3).choices[0]
    assert reply.logprobs is not None
    found = reply.logprobs.content or []
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    assert [[top.logprob for top in entry.top_logprobs] for entry in found] == [
        pytest.approx([logprob for _, logprob in entry.alternatives], abs=1e-4) for entry in expected
    ]
    known = model.tokenizer.get_vocab_size()  # random weights also pick rows of the logits that are no token
    written = [bytes(entry.bytes or ()) for entry, own in zip(found, expected, strict=True) if own.token < known]
    assert b"".join(written).decode(errors="replace") == reply.message.content
    streamed = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for piece in pieces if piece for entry in piece.content or ()] == found


def test_responses_tell_the_same(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2).choices[0]
    include: Any = ["message.output_text.logprobs"]
    asked: Any = {"model": "tiny", "input": "Hi", "max_output_tokens": 6, "top_logprobs": 2, "include": include}
    reply = client.responses.create(**asked)
    assert chat.logprobs is not None
    found = reply.output[0].content[0].logprobs
    assert [entry.logprob for entry in found or ()] == [entry.logprob for entry in chat.logprobs.content or ()]
    deltas = [event for event in client.responses.create(**asked, stream=True) if "text.delta" in event.type]
    assert sum(len(delta.logprobs) for delta in deltas) == 6


def test_models_without_an_end_have_them_too(
    client: openai.OpenAI, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 3}
    expected = client.chat.completions.create(**ASKED, **options).choices[0].logprobs
    info = TokenizerInfo(model.tokenizer, model.vocab_size, [])
    monkeypatch.setitem(model.__dict__, "tokenizer_info", info)
    found = client.chat.completions.create(**ASKED, **options).choices[0].logprobs
    assert found is not None
    assert expected is not None
    for entry, own in zip(found.content or (), expected.content or (), strict=True):
        assert (entry.token in {own.token, ""}, entry.logprob) == (True, own.logprob)  # some rows are no token
    assert "".join(entry.token for entry in found.content or ())


def test_completions_echo_those_of_the_prompt(client: openai.OpenAI, model: LoadedModel) -> None:
    prompt = "A cat sat"
    expected = model.generate(prompt, raw=True, max_tokens=2, logprobs=1, prompt_logprobs=1)
    asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 1}
    reply = client.completions.create(**asked).choices[0]
    tokens = len(model.token_ids(prompt, add_special_tokens=True))
    found = reply.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    values = [entry.logprob for entry in (*expected.prompt_logprobs, *expected.logprobs)]
    assert found.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == tokens + 2
    assert "".join(found.tokens[:tokens]).endswith(prompt)
    assert all(math.isfinite(value) for value in found.token_logprobs[1:])
    streamed = client.completions.create(**asked, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts if part for token in part.tokens or ()] == found.tokens
