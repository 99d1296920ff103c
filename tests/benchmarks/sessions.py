"""A second turn, and memory over a long time: parts of `generate.py`, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from workloads import FREE_TEXT, LETTER, NOTES, QUESTIONS

HISTORY_TOKENS = 1_000
TOKENS = 10_000
SESSIONS = 1_000
REPLY_TOKENS = 500
WARM_UP = 0.5  # share of the work after which caches that are kept have filled their budget


def measure_turns(bundle: str, threads: int, rounds: int) -> dict[str, Any]:
    """Time to first token of the second turn over that of the first, which has a history of 1,000 tokens."""
    return _alone(_turns, bundle, threads, rounds)


def measure_memory(bundle: str, threads: int) -> dict[str, Any]:
    """Resident bytes after a warm-up and at the end: of generating, and of opening and closing sessions."""
    return _alone(_memory, bundle, threads)


def _alone(function: Any, *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        found: dict[str, Any] = child.submit(function, *arguments).result()
        return found


def _turns(bundle: str, threads: int, rounds: int) -> dict[str, Any]:
    import edgekit

    ratios, firsts, tokens = [], [], 0
    with edgekit.load(bundle, threads=threads, session_cache_bytes=0) as model:
        for turn in range(-1, rounds):
            messages = [{"role": "user", "content": _history(model)}]
            session = model.session()
            first = session.generate(messages, max_tokens=32)
            messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[0]}]
            second = session.generate(messages, max_tokens=8)
            session.close()
            if turn >= 0:
                ratios.append(second.stats.ttft_s / first.stats.ttft_s)
                firsts.append(first.stats.ttft_s)
                tokens = first.stats.prompt_tokens
    return {"ratios": ratios, "first_s": sorted(firsts)[len(firsts) // 2], "first_tokens": tokens}


def _history(model: Any) -> str:
    text = "Which of these texts is the most important one?\n"
    while len(model.tokenizer.encode(text).ids) < HISTORY_TOKENS:
        text += f"\n{LETTER}\n\n{NOTES}\n"
    return text


def _memory(bundle: str, threads: int) -> dict[str, Any]:
    import edgekit

    with edgekit.load(bundle, threads=threads) as model:
        ends = dict.fromkeys(model.end_tokens, float("-inf"))
        prompts = list(FREE_TEXT.values())

        def write(index: int) -> None:
            prompt = f"{index}. {prompts[index % len(prompts)]}"
            model.generate(prompt, max_tokens=REPLY_TOKENS, logit_bias=ends, temperature=0.8)

        def open_and_close(index: int) -> None:
            session = model.session()
            session.generate(f"{index}. Say yes.", max_tokens=2)
            session.close()

        return {
            f"{TOKENS:,} generated tokens": _before_and_after(write, TOKENS // REPLY_TOKENS),
            f"{SESSIONS:,} sessions": _before_and_after(open_and_close, SESSIONS),
        }


def _before_and_after(work: Any, count: int) -> tuple[int, int]:
    before = 0
    for index in range(count):
        work(index)
        if index == int(WARM_UP * count):
            before = _resident_bytes()
    return before, _resident_bytes()


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
