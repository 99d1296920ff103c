"""Write runtimes/conformance/*.json: python tests/conformance/generator/make_cases.py [--check]

Every expected value comes from a reference that shares no code with EdgeKit; each module's docstring names its own.
--check writes nothing and fails if a stored file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import context_cases
import logprob_cases
import manifest_cases
import option_cases
import prompt_cases
import sampler_cases
import text_cases
import tool_cases

CONFORMANCE = Path(__file__).resolve().parents[3] / "runtimes" / "conformance"
WIDTH = 120
FILES: dict[str, Callable[[], Any]] = {
    "sampler.json": sampler_cases.suite,
    "logprobs.json": logprob_cases.suite,
    "options.json": option_cases.suite,
    "text.json": text_cases.suite,
    "prompts.json": prompt_cases.suite,
    "context.json": context_cases.suite,
    "manifest.json": manifest_cases.suite,
    "tool_calls.json": tool_cases.tool_call_suite,
    "reasoning.json": tool_cases.reasoning_suite,
    "tokenizers/byte-level.json": text_cases.byte_level_tokenizer,
    "tokenizers/sentencepiece.json": text_cases.sentencepiece_tokenizer,
}


def main(arguments: list[str]) -> int:
    """Write or check every file; 1 if a stored file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a stored file is not up to date")
    check = parser.parse_args(arguments).check
    stale = [name for name, make in FILES.items() if not _is_current(name, dumped(make()) + "\n", check)]
    for name in stale:
        print(f"{name} is not what make_cases.py writes", file=sys.stderr)
    return 1 if stale else 0


def _is_current(name: str, text: str, check: bool) -> bool:
    path = CONFORMANCE / name
    if not check:
        path.write_text(text, encoding="utf-8", newline="\n")
    return path.is_file() and path.read_text(encoding="utf-8") == text


def dumped(value: Any, indent: int = 0) -> str:
    """JSON in lines that a person can read and compare: what fits a line is on one, and so is a list of plain values."""
    line = json.dumps(value, ensure_ascii=False)
    is_plain_list = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
    if not isinstance(value, dict | list) or is_plain_list or len(line) + indent <= WIDTH:
        return line
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {dumped(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(inner + dumped(item, indent + 1) for item in value) + "\n" + " " * indent + "]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
