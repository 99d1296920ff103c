"""Every parameter that OpenAI's client can send is either used, accepted knowingly, or refused by name."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponsesParams

from edgekit.runtimes.server.chat import ChatCompletions
from edgekit.runtimes.server.completions import Completions
from edgekit.runtimes.server.responses import Responses

from .conftest import Running

BODIES: dict[str, dict[str, Any]] = {
    ChatCompletions.path: {"messages": [{"role": "user", "content": "Hi"}]},
    Completions.path: {"prompt": "Hi"},
    Responses.path: {"input": "Hi"},
}
ENDPOINTS: list[tuple[Any, Any]] = [
    (ChatCompletions, ChatParams),
    (Completions, CompletionParams),
    (Responses, ResponsesParams),
]
UNSUPPORTED = [(endpoint.path, name) for endpoint, _ in ENDPOINTS for name in endpoint.unsupported]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT: dict[str, tuple[Any, str, str]] = {
    "temperature": ("hot", "temperature", "invalid_type"),
    "top_p": (0, "top_p", "invalid_value"),
    "n": (129, "n", "invalid_value"),
    "seed": (-1, "seed", "invalid_value"),
    "stop": (["a", ""], "stop[1]", "invalid_value"),
    "max_tokens": (0, "max_tokens", "invalid_value"),
    "max_completion_tokens": (1.5, "max_completion_tokens", "invalid_type"),
    "logit_bias": ({"a": 1}, "logit_bias.a", "invalid_value"),
    "presence_penalty": (3, "presence_penalty", "invalid_value"),
    "frequency_penalty": (True, "frequency_penalty", "invalid_type"),
    "top_logprobs": (3, "top_logprobs", "invalid_value"),  # without logprobs
    "stream": ("yes", "stream", "invalid_type"),
    "stream_options": ({"include_obfuscation": True}, "stream_options.include_obfuscation", "invalid_value"),
    "response_format": ({"type": "xml"}, "response_format", "invalid_value"),
    "tools": ([TOOL, TOOL], "tools", "invalid_value"),
    "tool_choice": ("required", "tool_choice", "invalid_value"),  # without tools
    "store": (True, "store", "invalid_value"),
    "service_tier": ("flex", "service_tier", "invalid_value"),
    "modalities": (["audio"], "modalities[0]", "invalid_value"),
    "context_policy": ("forget", "context_policy", "invalid_value"),
}


def refused(running: Running, path: str, more: dict[str, Any]) -> dict[str, Any]:
    """The error of a request that is otherwise right."""
    with closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
        connection.request("POST", path, json.dumps({"model": "tiny"} | BODIES[path] | more))
        response = connection.getresponse()
        assert response.status == 400
        error: dict[str, Any] = json.loads(response.read())["error"]
        return error


@pytest.mark.parametrize(("endpoint", "params"), ENDPOINTS)
def test_every_parameter_of_the_client_is_known(endpoint: Any, params: Any) -> None:
    fields = set(endpoint.schema.model_fields)
    assert set(params.__annotations__) <= fields | set(endpoint.unsupported)
    assert fields.isdisjoint(endpoint.unsupported)


@pytest.mark.parametrize(("path", "name"), UNSUPPORTED)
def test_unsupported_parameters_are_named(running: Running, path: str, name: str) -> None:
    error = refused(running, path, {name: "value"})
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize("name", CHAT)
def test_wrong_values_are_named(running: Running, name: str) -> None:
    value, param, code = CHAT[name]
    error = refused(running, ChatCompletions.path, {name: value})
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("options", [{"logit_bias": {"999999": 1}}, {"stop_tokens": [999999]}])
def test_tokens_that_the_model_lacks_are_refused(running: Running, options: dict[str, Any]) -> None:
    for stream in (False, True):
        assert (
            "holds the token 999999" in refused(running, ChatCompletions.path, options | {"stream": stream})["message"]
        )


@pytest.mark.parametrize("path", BODIES)
def test_unknown_parameters_are_named(running: Running, path: str) -> None:
    error = refused(running, path, {"temprature": 1})
    assert (error["code"], error["param"]) == ("unknown_parameter", "temprature")
