"""Two profiles side by side: what changed by how much, and whether that is more than chance.

For each figure the ratio of the medians over processes, with a percentile bootstrap interval (Efron 1979; the processes of both
profiles are drawn again, with replacement). With five processes each, the interval leaves out 1 only where all of one
side are above all of the other: medians of so few values jump, and an interval of means would be too narrow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgekit.errors import SourceError
from edgekit.profile_record import Profile, Run

__all__ = ["Comparison", "Figure", "compare_profiles"]

CONFIDENCE = 0.995
LEAST_RUNS = 5
RESAMPLES = 10_000
SEED = 20261122
MATERIAL = 0.02  # a change of less than 2% is none: memory hardly varies, and any difference would be significant
Verdict = Literal["faster", "slower", "less", "more", "no significant change", "too few runs"]
_FIGURES: dict[str, tuple[Callable[[Run], float], Literal["s", "per_s", "bytes"]]] = {
    "ttft_s": (lambda run: run.ttft_s, "s"),
    "prefill_tokens_per_s": (lambda run: run.prefill_tokens_per_s, "per_s"),
    "decode_tokens_per_s": (lambda run: run.decode_tokens_per_s, "per_s"),
    "between_tokens_s": (lambda run: statistics.median(run.between_tokens_s), "s"),
    "idle_rss_bytes": (lambda run: run.idle_rss_bytes, "bytes"),
    "peak_rss_bytes": (lambda run: run.peak_rss_bytes, "bytes"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of both profiles: medians, the second over the first with its interval, and what that says."""

    name: str
    prompt_tokens: int | None
    first: float
    second: float
    ratio: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures, and in what else the two differ, so that a change is not taken for another's."""

    confidence: float
    figures: tuple[Figure, ...]
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `profile --compare --json`."""
        return asdict(self)


def compare_profiles(first: Profile, second: Profile) -> Comparison:
    """Compare the second with the first.

    Raises:
        SourceError: They are of different prompts or replies.
    """
    asked = [([length.prompt_sha256 for length in profile.lengths], profile.new_tokens) for profile in (first, second)]
    if asked[0] != asked[1]:
        lengths = [
            f"{', '.join(str(length.prompt_tokens) for length in profile.lengths)} tokens and {profile.new_tokens} new"
            for profile in (first, second)
        ]
        raise SourceError(
            f"the profiles are of different prompts: {lengths[0]}; {lengths[1]}",
            hint="profile both with the same --prompt-tokens and --new-tokens, and models with the same tokenizer",
        )
    return Comparison(CONFIDENCE, tuple(_figures(first, second)), tuple(_differences(first, second)))


def _figures(first: Profile, second: Profile) -> Iterator[Figure]:
    for name in ("load_s", "ttft_s"):
        values = [[getattr(run, name) for run in profile.cold.runs] for profile in (first, second)]
        yield _figure(f"cold {name}", None, "s", *values)
    all_runs = [[run for length in profile.lengths for run in length.runs] for profile in (first, second)]
    yield _figure("load_s", None, "s", *([run.load_s for run in runs] for runs in all_runs))
    for ours, theirs in zip(first.lengths, second.lengths, strict=True):
        for name, (read, unit) in _FIGURES.items():
            samples = ([read(run) for run in length.runs] for length in (ours, theirs))
            yield _figure(name, ours.prompt_tokens, unit, *samples)


def _figure(
    name: str, prompt_tokens: int | None, unit: Literal["s", "per_s", "bytes"], first: list[float], second: list[float]
) -> Figure:
    ours, theirs = statistics.median(first), statistics.median(second)
    low, high = ratio_interval(first, second)
    few = min(len(first), len(second)) < LEAST_RUNS
    verdict: Verdict = "too few runs" if few else _verdict(theirs / ours, low, high, unit)
    return Figure(name, prompt_tokens, ours, theirs, theirs / ours, low, high, verdict)


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The interval of median(second) / median(first). The same samples give the same interval."""
    import numpy as np

    random = np.random.default_rng(SEED)

    def medians(values: Sequence[float]) -> Any:
        drawn = random.integers(len(values), size=(RESAMPLES, len(values)))
        return np.median(np.asarray(values, np.float64)[drawn], axis=1)

    below = medians(first)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians(second) / below, (tail, 1 - tail))
    return float(low), float(high)


def _verdict(ratio: float, low: float, high: float, unit: Literal["s", "per_s", "bytes"]) -> Verdict:
    if low <= 1 <= high or abs(ratio - 1) < MATERIAL:
        return "no significant change"
    if unit == "bytes":
        return "more" if ratio > 1 else "less"
    return "faster" if (ratio > 1) == (unit == "per_s") else "slower"


def _differences(first: Profile, second: Profile) -> Iterator[str]:
    for name in ("bundle", "bundle_sha256", "format", "executed", "threads"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            yield f"{name}: {ours}, then {theirs}"
    machines = asdict(first.machine), asdict(second.machine)
    for name, ours in machines[0].items():
        if ours != machines[1][name]:
            yield f"machine's {name}: {ours}, then {machines[1][name]}"
