"""The process that `edgekit profile` measures: it loads one program, replies, and says how long that took."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import edgekit
from edgekit.child import answer
from edgekit.errors import GenerationError
from edgekit.machine import clock_hz, temperature_c
from edgekit.runtime_options import usable_cores
from edgekit.session import GenerateOptions, Stats

from .engine import LoadedModel
from .process_memory import memory_use, peak_rss_bytes

__all__ = ["measure"]

PASSAGE = (
    "The lighthouse stood at the end of a long stone pier, and for most of the year nobody walked out to it. In winter the "
    "waves came over the wall and froze on the railings. The keeper had lived there for eleven years. He kept a notebook in "
    "which he wrote the direction of the wind, the height of the barometer and the names of the ships that came past, and in "
    "the evening he read the entries of the same day in other years. On a Tuesday in November he found a letter under the "
    "door. It was addressed to a man who had kept the light before him, and it had been sent thirty years ago from a town on "
    "the other side of the sea. "
)
SAMPLE_S = 1.0  # of a sustained run: one second has tokens enough, and clocks are read as often as they change
MOST_SAMPLES = 120


def measure(
    *,
    bundle: str,
    load: dict[str, Any],
    prompt_tokens: int,
    new_tokens: int,
    spawned: float,
    drop_files: bool = False,
    first_only: bool = False,
    sustained_s: float = 0.0,
) -> dict[str, Any]:
    """Load and reply.

    Args:
        load: Options of `edgekit.load`.
        spawned: When this process was started, by `time.time`.
        drop_files: Ask the system to forget the bundle's files first.
        first_only: End after the first reply.
        sustained_s: Reply without a pause for so long, instead of once.
    """
    dropped = drop_files and _drop_cached(Path(bundle))
    began = time.perf_counter()
    with edgekit.load(bundle, session_cache_bytes=0, **load) as model:
        loaded = time.perf_counter()
        found: dict[str, Any] = {
            "start_s": time.time() - spawned,
            "load_s": loaded - began,
            "files_dropped": dropped,
            "provider": model.provider.to_json(),
            "threads": load.get("threads") or min(model.program.runtime.threads, usable_cores()),
        }
        prompt = _prompt(model, prompt_tokens)
        ids = _token_ids(model, prompt)
        found |= {
            "prompt_tokens": len(ids),
            "prompt_sha256": hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
        }
        stats, _ = _reply(model, prompt, new_tokens)
        found["first_ttft_s"] = stats.ttft_s
        if first_only:
            return found
        if sustained_s:
            return found | {"samples": _sustained(model, prompt, new_tokens, sustained_s)}
        return found | _warm(model, prompt, new_tokens)


def _warm(model: LoadedModel, prompt: str, new_tokens: int) -> dict[str, Any]:
    stats, times = _reply(model, prompt, new_tokens)
    return {
        "ttft_s": stats.ttft_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "between_tokens_s": times,
        "idle_rss_bytes": memory_use().rss_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _reply(model: LoadedModel, prompt: str, new_tokens: int) -> tuple[Stats, list[float]]:
    """One plain reply of exactly `new_tokens`: its stats, and the seconds from each token to the next."""
    ticks, stats = list[float](), None
    # each forward is told, also those that show nothing; the last `new_tokens` are those of the reply's tokens
    for chunk in model.steps(prompt, raw=True, max_tokens=new_tokens, min_tokens=new_tokens, speculate=False):
        ticks.append(time.perf_counter())
        stats = chunk.stats if chunk is not None else None
    if stats is None or stats.new_tokens != new_tokens:
        raise GenerationError(f"the reply has not the {new_tokens} tokens that were asked for")
    ticks = ticks[-new_tokens:]
    return stats, [after - before for before, after in pairwise(ticks)]


def _sustained(model: LoadedModel, prompt: str, new_tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Replies one after another; the median decode speed, clock and temperature of each stretch of time."""
    stretch = max(SAMPLE_S, seconds / MOST_SAMPLES)
    samples, times, began, sampled = list[dict[str, Any]](), list[float](), time.perf_counter(), 0.0
    while sampled < seconds:
        times += _reply(model, prompt, new_tokens)[1]
        now = time.perf_counter() - began
        if now - sampled >= stretch or now >= seconds:
            speed = 1 / statistics.median(times)
            sample = {
                "time_s": now,
                "decode_tokens_per_s": speed,
                "clock_hz": clock_hz(),
                "temperature_c": temperature_c(),
            }
            samples.append(sample)
            times, sampled = [], now
    return samples


def _prompt(model: LoadedModel, tokens: int) -> str:
    """The longest beginning of the passage, told again and again, that is at most so many tokens."""
    text = PASSAGE
    while len(_token_ids(model, text)) < tokens:
        text += text
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_token_ids(model, text[:middle])) <= tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _token_ids(model: LoadedModel, text: str) -> list[int]:
    return model.encode(text, GenerateOptions(raw=True)).tokens


def _drop_cached(bundle: Path) -> bool:
    """Whether the system was told to forget what it holds of the files; only POSIX systems but macOS can be."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in bundle.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


if __name__ == "__main__":
    answer(measure)
