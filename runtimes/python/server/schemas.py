"""What requests may hold. Everything is checked; what EdgeKit does not do is an error that names the parameter.

Parameters that are accepted and change nothing, knowingly: `user`, `safety_identifier`, `metadata` (`/v1/responses` sends it
back), `prompt_cache_key` and `prompt_cache_retention` (prefixes are cached anyway), `service_tier` (auto or default), `store`
(false), `background` (false), `max_tool_calls` (it bounds OpenAI's own tools), `include_obfuscation` (false), `modalities`
(text), `verbosity` (medium), `strict` of a format (it is followed in any case), and null for any parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from edgekit.structure import JsonSchema, Structure

from .api_error import ApiError
from .json_text import to_json

__all__ = [
    "JsonFormat",
    "ObjectFormat",
    "PlainFormat",
    "Request",
    "StreamOptions",
    "Strict",
    "Tool",
    "ToolChoice",
    "check_schemas",
    "parse",
]

LARGEST_N = 128
MOST_STOPS = 64
MOST_TOOLS = 128
RESERVED_NAMES = ("auto", "none", "required")


MOST_SCHEMA_BYTES = 65_536
MOST_SCHEMA_ENTRIES = 1_000
_COUNTED = ("properties", "patternProperties", "enum", "anyOf", "oneOf", "allOf", "prefixItems")


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
StopText = Annotated[str, Field(min_length=1)]


class Request(Strict):
    """What all three endpoints take. From `top_k` on: EdgeKit's own."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict
    )
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_tokens: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    speculate: bool = True
    context_policy: Literal["error", "drop-oldest-turns", "sliding"] = "error"

    # accepted, without effect
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    metadata: dict[str, str] | None = None

    def sampling(self, temperature: float) -> dict[str, Any]:
        """As GenerateOptions has it.

        Args:
            temperature: Where the request names none.
        """
        names = "top_p seed presence_penalty frequency_penalty top_k min_p typical_p repetition_penalty min_tokens"
        return {name: getattr(self, name) for name in (*names.split(), "speculate", "context_policy")} | {
            "temperature": temperature if self.temperature is None else self.temperature,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_tokens": tuple(self.stop_tokens),
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
        }


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonFormat(Strict):
    """A schema for the answer, as `response_format.json_schema` has it."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # the answer follows the schema in any case

    @property
    def structure(self) -> Structure:
        """As GenerateOptions has it."""
        return JsonSchema(self.json_schema)


class PlainFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # false: what can't be enforced of the parameters is left out, else it is an error


class Tool(Strict):
    """A tool, as `/v1/chat/completions` has it."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Names a function."""

    name: str


class NamedTool(Strict):
    """A tool to call, as `/v1/chat/completions` has it."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def tool_options(tools: list[dict[str, Any]], choice: str | None) -> dict[str, Any]:
    """The options for tools in OpenAI's form.

    Args:
        choice: A word or a name.

    Raises:
        ApiError: The choice is not among the tools, or a tool's name is taken twice or means a choice.
    """
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names) or not set(names).isdisjoint(RESERVED_NAMES):
        message = f"each tool needs a name of its own, other than {', '.join(RESERVED_NAMES)}"
        raise ApiError(400, message, code="invalid_value", param="tools")
    if choice not in (None, "auto", "none", *names) and not (choice == "required" and names):
        message = f"tool_choice is {choice!r}, but the tools are {', '.join(names) or 'none'}"
        raise ApiError(400, message, code="invalid_value", param="tool_choice")
    return {"tools": tuple(tools), "tool_choice": choice or "auto"} if tools else {}


def check_schemas(schemas: Iterable[tuple[str, object]]) -> None:
    """Bound what a request's JSON schemas cost: they are compiled in the thread that computes for everybody.

    Args:
        schemas: Parameters' names, and their schemas.

    Raises:
        ApiError: All together are too large; it names the schema with which they become so.
    """
    size = entries = 0
    for param, schema in schemas:
        size += len(to_json(schema))
        entries += _count_entries(schema)
        if size > MOST_SCHEMA_BYTES or entries > MOST_SCHEMA_ENTRIES:
            message = (
                f"{param}: the schemas of a request may have {MOST_SCHEMA_BYTES:,} bytes of JSON and "
                f"{MOST_SCHEMA_ENTRIES:,} properties, values and alternatives"
            )
            raise ApiError(400, message, code="invalid_value", param=param)


def _count_entries(schema: object) -> int:
    count, rest = 0, [schema]
    while rest:
        place = rest.pop()
        if isinstance(place, dict):
            count += sum(len(place[name]) for name in _COUNTED if isinstance(place.get(name), dict | list))
            rest += place.values()
        elif isinstance(place, list):
            rest += place
    return count


_Body = TypeVar("_Body", bound=BaseModel)


def parse(schema: type[_Body], body: bytes, unsupported: Mapping[str, str]) -> _Body:
    """A request's body.

    Args:
        unsupported: OpenAI's parameters that EdgeKit lacks, and what to do instead.

    Raises:
        ApiError: It is not JSON, or not as the schema wants it.
    """
    try:
        document = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    given = {name: value for name, value in document.items() if value is not None}
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given, unsupported) from error


def _refusal(error: ValidationError, document: dict[str, Any], unsupported: Mapping[str, str]) -> ApiError:
    """What is wrong, in OpenAI's words.

    Where a value may have several forms, pydantic tells why it is none of them: the form that it came nearest to is told.
    """
    details = error.errors(include_url=False, include_context=False)
    known = [detail for detail in details if detail["loc"] and detail["loc"][0] in unsupported]
    detail = max(known or details, key=lambda detail: _nearness(detail, document))
    param, name = _param(detail["loc"], document), str(detail["loc"][-1]) if detail["loc"] else ""
    if known:
        instead = unsupported[name]
        message = f"{name} is not supported" + (f": {instead}" if instead else "")
        return ApiError(400, message, code="unsupported_parameter", param=param)
    if detail["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param}", code="unknown_parameter", param=param)
    if detail["type"] == "missing":
        return ApiError(400, f"missing required parameter: {param}", code="missing_required_parameter", param=param)
    wrong = "invalid_type" if "type" in detail["type"] else "invalid_value"
    return ApiError(400, f"{param}: {detail['msg']}", code=wrong, param=param)


def _nearness(detail: ErrorDetails, document: dict[str, Any]) -> tuple[int, bool, bool]:
    depth = _param(detail["loc"], document).count(".") + _param(detail["loc"], document).count("[")
    kind = detail["type"]
    return depth, kind == "literal_error", not kind.endswith("_type")


def _param(location: tuple[int | str, ...], document: Any) -> str:
    """`messages[0].content`: pydantic's location, without the names of the alternatives that it tried."""
    path, place = "", document
    for step in location:
        if isinstance(place, dict) and (step in place or step == location[-1]):
            path += f".{step}" if path else str(step)
            place = place.get(step)
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            path += f"[{step}]"
            place = place[step]
    return path
