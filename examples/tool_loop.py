"""An agent with two tools, through OpenAI's client. The model's chat template must take tools, as Qwen's does.

edgekit serve qwen3.edgekit &
python examples/tool_loop.py "Is it warmer in Paris or in Tokyo, in Fahrenheit?"
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

CELSIUS = {"Paris": 18, "Tokyo": 27, "Zürich": 15}
MAX_STEPS = 6


def tool(name: str, about: str, argument: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A function of one argument, in OpenAI's form."""
    closed = {"type": "object", "required": [argument], "additionalProperties": False}
    parameters = closed | {"properties": {argument: schema}}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


FUNCTIONS: dict[str, Callable[..., Any]] = {  # the first stands for a real service
    "weather": lambda city: {"city": city, "celsius": CELSIUS[city]},
    "to_fahrenheit": lambda celsius: {"fahrenheit": celsius * 9 / 5 + 32},
}
DEGREES = {"type": "integer", "minimum": -90, "maximum": 60}
TOOLS = [
    tool("weather", "The weather in a city", "city", {"type": "string", "enum": list(CELSIUS)}),
    tool("to_fahrenheit", "Degrees Celsius in Fahrenheit", "celsius", DEGREES),
]


def main() -> None:
    """Let the model call tools until it answers without one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="of the server (%(default)s)")
    given = parser.parse_args()
    client: Any = OpenAI(base_url=given.url, api_key="none")
    messages: list[Any] = [{"role": "user", "content": given.question}]
    asked = {"model": client.models.list().data[0].id, "tools": TOOLS, "max_completion_tokens": 256}
    for choice in ("required", *["auto"] * MAX_STEPS, "none"):
        message = client.chat.completions.create(messages=messages, tool_choice=choice, **asked).choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            arguments = call.function.arguments
            result = json.dumps(FUNCTIONS[call.function.name](**json.loads(arguments)))
            print(f"{call.function.name}({arguments}) -> {result}", flush=True)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            print(message.content)
            break


if __name__ == "__main__":
    main()
