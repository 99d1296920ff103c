"""Profiles that were recorded: read back, compared, and shown. What a profile measures is tested in tests/cli/test_profile.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import SourceError
from edgekit.machine import Machine
from edgekit.profile_compare import Comparison, compare_profiles, ratio_interval
from edgekit.profile_record import (
    Cold,
    ColdRun,
    LengthProfile,
    Prediction,
    Profile,
    Run,
    Spread,
    Sustained,
    SustainedSample,
    TokenTimes,
    read_profile,
)
from edgekit.profile_report import comparison_text, profile_html, profile_text

NOISE = 0.02  # of a figure from process to process, as a share of it; idle machines have less
SPEEDS = {"ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "between_tokens_s"}
MACHINE = Machine("Linux 6", "x86_64", "a processor", 4, 10**10, "3.11.7", "1.31.1")


def make_profile(seed: int, *, slowdown: float = 1.0, runs: int = 5, noise: float = NOISE, **changes: Any) -> Profile:
    """A profile whose speeds vary by `noise`, all of them slower by a factor."""
    random = np.random.default_rng(seed)

    def vary(value: float) -> float:
        return float(value * np.exp(random.normal(0, noise)))

    def run() -> Run:
        token_s = vary(0.010 * slowdown)
        return Run(
            start_s=vary(0.6),
            load_s=vary(0.2),
            first_ttft_s=vary(0.3 * slowdown),
            ttft_s=vary(0.2 * slowdown),
            prefill_tokens_per_s=vary(1000 / slowdown),
            decode_tokens_per_s=1 / token_s,
            between_tokens_s=tuple(token_s * vary(1.0) for _ in range(15)),
            idle_rss_bytes=round(vary(2e8)),
            peak_rss_bytes=round(vary(3e8)),
        )

    made = tuple(run() for _ in range(runs))
    length = LengthProfile(
        prompt_tokens=256,
        prompt_sha256="a" * 64,
        ttft_s=Spread.of(r.ttft_s for r in made),
        prefill_tokens_per_s=Spread.of(r.prefill_tokens_per_s for r in made),
        decode_tokens_per_s=Spread.of(r.decode_tokens_per_s for r in made),
        between_tokens_s=TokenTimes.of(t for r in made for t in r.between_tokens_s),
        peak_rss_bytes=300_000_000,
        runs=made,
    )
    cold = tuple(ColdRun(vary(0.8), vary(0.4), vary(0.3 * slowdown)) for _ in range(runs))
    start, load, ttft = (Spread.of(getattr(r, name) for r in cold) for name in ("start_s", "load_s", "ttft_s"))
    profile = Profile(
        kind="edgekit-profile",
        schema_version=1,
        bundle="tiny",
        bundle_sha256="b" * 64,
        format="onnx",
        executed="onnxruntime",
        provider="cpu",
        provider_reason="programs of this format run on the CPU",
        threads=2,
        date="2026-11-22T12:00:00+00:00",
        new_tokens=16,
        load_s=Spread.of(r.load_s for r in made),
        ttft_s=length.ttft_s,
        prefill_tokens_per_s=length.prefill_tokens_per_s,
        decode_tokens_per_s=length.decode_tokens_per_s,
        between_tokens_s=length.between_tokens_s,
        peak_rss_bytes=300_000_000,
        idle_rss_bytes=200_000_000,
        weights_bytes=100_000_000,
        bytes_per_token=100_000_000,
        bandwidth_bytes_per_s=20_000_000_000,
        bandwidth_basis="measured in this run",
        roofline_fraction=0.5,
        cold=Cold("disk", start, load, ttft, cold),
        lengths=(length,),
        sustained=Sustained(
            2.0, 0.9, (SustainedSample(1.0, 99.0, 2 * 10**9, 61.5), SustainedSample(2.0, 90.0, None, None))
        ),
        plan=Prediction("raspberry-pi-5", 40.0, 300.0, 290_000_000),
        machine=MACHINE,
    )
    return replace(profile, **changes)


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {figure.name: figure.verdict for figure in comparison.figures}


@pytest.mark.parametrize("slowdown", [1.1, 1.2])
@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_is_found_and_named(slowdown: float, seed: int) -> None:
    """With runs that vary by 2%, five of them tell 10% from chance."""
    comparison = compare_profiles(make_profile(seed), make_profile(seed + 100, slowdown=slowdown))
    found = verdicts(comparison)
    assert {name for name in SPEEDS if found[name] != "slower"} == set()
    decode = next(figure for figure in comparison.figures if figure.name == "decode_tokens_per_s")
    assert decode.low < 1 / slowdown * (1 + NOISE) * 1.02
    assert decode.high < 1
    assert decode.low <= decode.ratio <= decode.high
    assert found["load_s"] == found["peak_rss_bytes"] == "no significant change"


@pytest.mark.parametrize("seed", range(5))
def test_a_speedup_is_the_opposite(seed: int) -> None:
    found = verdicts(compare_profiles(make_profile(seed, slowdown=1.15), make_profile(seed + 100)))
    assert {found[name] for name in SPEEDS} == {"faster"}


def test_noise_alone_is_seldom_taken_for_a_change() -> None:
    """Two sets of five from one distribution lie wholly apart once in 126; 400 of them, more than 12 times once in 10,000."""
    random = np.random.default_rng(3)
    changed = 0
    for _ in range(400):
        first, second = np.exp(random.normal(0, 0.05, (2, 5)))
        low, high = ratio_interval(list(first), list(second))
        changed += not low <= 1 <= high
    assert changed <= 12


def test_the_same_file_shows_no_change() -> None:
    profile = make_profile(1)
    comparison = compare_profiles(profile, profile)
    assert set(verdicts(comparison).values()) == {"no significant change"}
    assert all(figure.ratio == 1 for figure in comparison.figures)
    assert not comparison.differences


def test_a_change_too_small_to_matter_is_none() -> None:
    profile = make_profile(1, noise=1e-6)
    found = verdicts(compare_profiles(profile, make_profile(2, noise=1e-6, slowdown=1.01)))
    assert set(found.values()) == {"no significant change"}


def test_less_and_more_memory_are_told() -> None:
    profile = make_profile(1)
    leaner = tuple(replace(run, peak_rss_bytes=run.peak_rss_bytes // 2) for run in profile.lengths[0].runs)
    other = replace(profile, lengths=(replace(profile.lengths[0], runs=leaner),))
    assert verdicts(compare_profiles(profile, other))["peak_rss_bytes"] == "less"
    assert verdicts(compare_profiles(other, profile))["peak_rss_bytes"] == "more"


def test_few_runs_give_no_verdict() -> None:
    found = verdicts(compare_profiles(make_profile(1, runs=4), make_profile(2, slowdown=2)))
    assert set(found.values()) == {"too few runs"}


def test_what_else_differs_is_said() -> None:
    other = make_profile(1, threads=4, machine=replace(MACHINE, processor="another"))
    text = comparison_text(compare_profiles(make_profile(1), other))
    assert "note: the two differ in threads: 2, then 4" in text
    assert "machine's processor: a processor, then another" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda profile: replace(profile, new_tokens=17),
        lambda profile: replace(profile, lengths=(replace(profile.lengths[0], prompt_sha256="c" * 64),)),
        lambda profile: replace(profile, lengths=profile.lengths * 2),
    ],
    ids=["reply", "prompt", "lengths"],
)
def test_different_prompts_are_refused(change: Callable[[Profile], Profile]) -> None:
    with pytest.raises(SourceError, match="different prompts"):
        compare_profiles(make_profile(1), change(make_profile(1)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_intervals_turn_over_with_the_sides(first: list[float], second: list[float]) -> None:
    low, high = ratio_interval(first, second)
    assert low <= high
    assert low >= min(second) / max(first) * (1 - 1e-9)
    assert high <= max(second) / min(first) * (1 + 1e-9)


def test_json_reads_back_as_it_was(tmp_path: Path) -> None:
    path, profile = tmp_path / "a.json", make_profile(1)
    path.write_text(json.dumps(profile.to_json()), encoding="utf-8")
    assert read_profile(path) == profile
    path.write_text(json.dumps(profile.to_json()), encoding="utf-16")  # as Windows PowerShell redirects output
    assert read_profile(path) == profile
    bare = replace(profile, sustained=None, plan=None)
    path.write_text(json.dumps(bare.to_json()), encoding="utf-8")
    assert read_profile(path) == bare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"kind": "other"}, "is not a profile"),
        (lambda v: v | {"schema_version": 2}, "has schema 2"),
        (lambda v: v | {"unknown": 1}, "'unknown' is not known"),
        (lambda v: v | {"weights_bytes": "many"}, "weights_bytes is 'many', expected a whole number"),
        (lambda v: v | {"roofline_fraction": float("nan")}, "roofline_fraction is nan, expected a number"),
        (lambda v: v | {"lengths": []}, "holds no runs"),
        (lambda v: {key: value for key, value in v.items() if key != "cold"}, "cold is missing"),
        (lambda v: v | {"lengths": [v["lengths"][0] | {"runs": []}]}, "holds no runs"),
        (
            lambda v: v | {"lengths": [v["lengths"][0] | {"runs": [v["lengths"][0]["runs"][0] | {"ttft_s": 0}]}]},
            "not over zero",
        ),
        (lambda v: [v], "is not a profile"),
    ],
    ids=["kind", "schema", "unknown key", "type", "nan", "no lengths", "missing", "no runs", "zero", "list"],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(change(make_profile(1).to_json())), encoding="utf-8")
    with pytest.raises(SourceError, match=message) as caught:
        read_profile(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(SourceError):
        read_profile(path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_profile(tmp_path / "none.json")


class _Page(HTMLParser):
    """Counts what a page brings, and whether each tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_stands_alone_and_escapes_what_it_is_given() -> None:
    hostile = "<script>alert('x')</script>\"&"
    page, profile = _Page(), make_profile(1, bundle=hostile, provider_reason=hostile)
    page.feed(profile_html(profile))
    assert not page.outside
    assert "script" not in page.tags
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 6  # prefill, decode, tokens, sustained speed, clock, temperature
    assert hostile in page.text


def test_charts_of_what_the_system_does_not_tell_are_left_out() -> None:
    samples = (SustainedSample(1.0, 99.0, None, None),)
    page = _Page()
    page.feed(profile_html(make_profile(1, sustained=Sustained(1.0, 1.0, samples), plan=None)))
    assert page.tags.count("svg") == 4
    assert "not told" in page.text


def test_text_has_every_figure_with_its_unit() -> None:
    text = profile_text(make_profile(1, noise=1e-9))
    for part in ("tiny, onnx on onnxruntime, 2 threads", "100.0 (100.0-100.0)", "300 MB peak, 200 MB idle", "50% of the roofline",
                 "for raspberry-pi-5: decode 40.0 tok/s", "90% of the speed at the start", "files from the disk"):  # fmt: skip
        assert part in text, part


def test_ninety_fifth_percentile_is_a_measured_value() -> None:
    times = TokenTimes.of([0.001 * (n + 1) for n in range(100)])
    assert times.p95 == pytest.approx(0.095)
    assert TokenTimes.of([0.5]).p95 == 0.5
