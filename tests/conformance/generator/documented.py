"""Prompts written out by hand from the documentation of each family, to check the templates against.

All are of one conversation: the system message "Be brief." (where the family knows one), the question "Hello", the answer
"Hi there!", the question "More?". Those with tools: "Weather in Zürich?", a call of `weather` and its result.
"""

from __future__ import annotations

_CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi there!<|im_end|>\n"
    "<|im_start|>user\nMore?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_ROLE_LINES = (
    "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nHi there!<|endoftext|>\n<|user|>\nMore?\n<|assistant|>\n"
)
_GEMMA_TURNS = (
    "Hello<end_of_turn>\n<start_of_turn>model\nHi there!<end_of_turn>\n"
    "<start_of_turn>user\nMore?<end_of_turn>\n<start_of_turn>model\n"
)

DOCUMENTED: dict[str, str] = {
    "chatml": _CHATML,
    "qwen2.5": _CHATML,
    "qwen3": _CHATML,
    "smollm2": _CHATML,
    "lfm2": "<|startoftext|>" + _CHATML,
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi there! </s><s>[INST] More? [/INST]"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 15 Jan 2026\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral-v1": "<s>[INST] Be brief.\n\nHello [/INST] Hi there!</s>[INST] More? [/INST]",
    "mistral-v3": "<s>[INST] Hello[/INST] Hi there!</s>[INST] Be brief.\n\nMore?[/INST]",
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there!<|end|>\n"
        "<|user|>\nMore?<|end|>\n<|assistant|>\n"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hi there!<|im_end|><|im_start|>user<|im_sep|>More?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "phi4-mini": (
        "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi there!<|end|><|user|>More?<|end|><|assistant|>"
    ),
    "gemma2": "<bos><start_of_turn>user\n" + _GEMMA_TURNS,
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\n" + _GEMMA_TURNS,
    "smollm3": (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 15 January 2026\n"
        "Reasoning Mode: /think\n\n## Custom Instructions\n\nBe brief.\n\n<|im_end|>\n"
    )
    + _CHATML.removeprefix("<|im_start|>system\nBe brief.<|im_end|>\n"),
    "deepseek-r1-distill": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>Hi there!<｜end▁of▁sentence｜>"
        "<｜User｜>More?<｜Assistant｜><think>\n"
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there!</s>\n"
        "<|user|>\nMore?</s>\n<|assistant|>\n"
    ),
    "granite3": (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Hi there!<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>More?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
    "falcon3": _ROLE_LINES,
    "olmo2": "<|endoftext|>" + _ROLE_LINES,
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hi there!<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>More?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "danube3": "<|prompt|>Hello</s><|answer|>Hi there!</s><|prompt|>More?</s><|answer|>",
    "exaone3.5": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi there![|endofturn|]\n[|user|]More?\n[|assistant|]"
    ),
    "vicuna": "<s>Be brief. USER: Hello ASSISTANT: Hi there!</s>USER: More? ASSISTANT:",
}  # fmt: skip

_WEATHER = (
    '{"name": "weather", "description": "Weather « now » <&>", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}'
)
_CLOCK = '{"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}'
_TOOLS = [f'{{"type": "function", "function": {function}}}' for function in (_WEATHER, _CLOCK)]
_HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    f"<tools>\n{_TOOLS[0]}\n{_TOOLS[1]}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
_HERMES_END = (
    '\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n{"degrees": 21}\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n"
)
_HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}'
_QUESTION = "<|im_start|>user\nWeather in Zürich?<|im_end|>\n<|im_start|>assistant\n"

DOCUMENTED_TOOLS: dict[str, str] = {
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        + _HERMES + _QUESTION + _HERMES_CALL + _HERMES_END
    ),
    "qwen3": "<|im_start|>system\n" + _HERMES + _QUESTION + _HERMES_CALL + _HERMES_END,
    "mistral-v3": (
        f"<s>[AVAILABLE_TOOLS] [{_TOOLS[0]}, {_TOOLS[1]}][/AVAILABLE_TOOLS][INST] Weather in Zürich?[/INST]"
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Zürich"}, "id": "abc123xyz"}]</s>'
        '[TOOL_RESULTS] {"content": "{\\"degrees\\": 21}", "call_id": "abc123xyz"}[/TOOL_RESULTS]'
    ),
    "phi4-mini": (
        f"<|system|><|tool|>[{_WEATHER}, {_CLOCK}]<|/tool|><|end|><|user|>Weather in Zürich?<|end|>"
        '<|assistant|><|tool_call|>[{"name": "weather", "arguments": {"city": "Zürich"}}]<|/tool_call|><|end|>'
        '<|tool_response|>{"degrees": 21}<|end|><|assistant|>'
    ),
}  # fmt: skip
