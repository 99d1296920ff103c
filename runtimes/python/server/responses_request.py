"""What `/v1/responses` takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from edgekit.session import ContextPolicy, Message
from edgekit.structure import JsonSchema, Structure

from .api_error import ApiError
from .messages import parse_arguments
from .schemas import (
    MOST_TOOLS,
    Count,
    Function,
    FunctionName,
    JsonFormat,
    ObjectFormat,
    PlainFormat,
    Request,
    StreamOptions,
    Strict,
    check_schemas,
    tool_options,
)

__all__ = ["ResponsesRequest", "to_messages"]


class InputText(Strict):
    """A text. What the model wrote comes back with its annotations and log-probabilities."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message, of a person or of the model."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: None = None


class InputCall(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Strict):
    """What a function answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningText(Strict):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """Reasoning that comes back: templates show it or leave it out, as the model was trained."""

    type: Literal["reasoning"]
    id: str | None = None
    content: list[ReasoningText] | None = None
    summary: list[Any] = Field(default_factory=list, max_length=0)
    encrypted_content: None = None
    status: str | None = None


def _kind(item: Any) -> Any:
    """A message may leave its type out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class SchemaFormat(JsonFormat):
    """What a JSON schema admits."""

    type: Literal["json_schema"]


class TextSettings(Strict):
    """The form of the answer."""

    format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] = PlainFormat(type="text")
    verbosity: Literal["medium"] | None = None


class FunctionTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class NamedFunction(FunctionName):
    """A function to call."""

    type: Literal["function"]


class ResponsesRequest(Request):
    """The body."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextSettings = TextSettings()
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    stream_options: StreamOptions | None = None
    background: Literal[False] = False
    max_tool_calls: Count | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens come with log-probabilities."""
        return bool(self.include) or self.top_logprobs is not None

    def options(self, temperature: float) -> dict[str, Any]:
        """As GenerateOptions has it."""
        check_schemas(self._schemas())
        choice = self.tool_choice if isinstance(self.tool_choice, str) else self.tool_choice.name
        return (
            self.sampling(temperature)
            | {"context_policy": self._policy()}
            | tool_options([_chat_tool(tool) for tool in self.tools], choice)
            | {
                "max_tokens": self.max_output_tokens,
                "logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
                "structure": self._structure(),
            }
        )

    def _schemas(self) -> Iterator[tuple[str, object]]:
        if isinstance(self.text.format, SchemaFormat):
            yield "text.format.schema", self.text.format.json_schema
        for place, tool in enumerate(self.tools):
            yield f"tools[{place}].parameters", tool.parameters

    def _policy(self) -> ContextPolicy:
        """EdgeKit's own parameter says more than OpenAI's; where both are given, they must agree."""
        if "context_policy" not in self.model_fields_set:
            return "drop-oldest-turns" if self.truncation == "auto" else "error"
        if "truncation" in self.model_fields_set and (self.truncation == "auto") != (self.context_policy != "error"):
            message = (
                f"truncation is {self.truncation!r}, but context_policy is {self.context_policy!r}: give one of them"
            )
            raise ApiError(400, message, code="invalid_value", param="truncation")
        return self.context_policy

    def _structure(self) -> Structure | None:
        match self.text.format:
            case ObjectFormat():
                return JsonSchema({"type": "object"})
            case SchemaFormat() as schema:
                return schema.structure
        return None

    def format_json(self) -> dict[str, Any]:
        """The format, for the response to repeat."""
        return self.text.format.model_dump(by_alias=True, exclude_none=True)

    def tool_choice_json(self) -> str | dict[str, Any]:
        """The tool choice, for the response to repeat."""
        return self.tool_choice if isinstance(self.tool_choice, str) else self.tool_choice.model_dump()


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def to_messages(request: ResponsesRequest) -> list[Message]:
    """The conversation in the form of chat templates: a turn of the model is one message, with its reasoning and its calls.

    Raises:
        ApiError: Arguments are not a JSON object, or a call has no output or an output no call.
    """
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    names = dict[str, str]()
    for place, item in enumerate(request.input):
        match item:
            case InputMessage(role="assistant"):
                turn = _turn_of_model(messages, fresh="content")
                turn["content"] = _text(item.content)
            case InputMessage():
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _text(item.content)})
            case InputReasoning():
                thought = "\n".join(part.text for part in item.content or ())
                _turn_of_model(messages, fresh="reasoning_content")["reasoning_content"] = thought
            case InputCall():
                names[item.call_id] = item.name
                arguments = parse_arguments(item.arguments, f"input[{place}].arguments")
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}
                _turn_of_model(messages).setdefault("tool_calls", []).append(call)
            case InputCallOutput():
                if item.call_id not in names:
                    where = f"input[{place}].call_id"
                    raise ApiError(400, f"{where}: there is no such call before", code="invalid_value", param=where)
                content = _text(item.output)
                name = names[item.call_id]
                messages.append({"role": "tool", "tool_call_id": item.call_id, "name": name, "content": content})
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("content", None if "tool_calls" in message else "")
    return list(messages)


def _turn_of_model(messages: list[dict[str, Any]], fresh: str | None = None) -> dict[str, Any]:
    """The message of the model at the end, or a new one; `fresh` must not be in it yet, and nothing may come after calls."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (fresh is not None and (fresh in last or "tool_calls" in last)):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
