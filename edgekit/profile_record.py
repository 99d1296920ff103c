"""What a profile holds, as its JSON has it: times in seconds, sizes in bytes, speeds in tokens per second."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import SourceError
from edgekit.machine import Machine
from edgekit.tables import Binder

__all__ = [
    "PROFILE_KIND",
    "Cold",
    "ColdRun",
    "LengthProfile",
    "Prediction",
    "Profile",
    "Run",
    "Spread",
    "Sustained",
    "SustainedSample",
    "TokenTimes",
    "read_profile",
]

PROFILE_KIND: Literal["edgekit-profile"] = "edgekit-profile"
SCHEMA_VERSION = 1
LARGEST_FILE_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Seconds between one token and the next, over all runs; 95% of them are at most `p95`."""

    median: float
    min: float
    max: float
    p95: float

    @classmethod
    def of(cls, values: Iterable[float]) -> TokenTimes:
        """Of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], found[-(-95 * len(found) // 100) - 1])


@dataclass(frozen=True, slots=True)
class Run:
    """One process that loaded the bundle, replied once to warm up, and once for the record.

    Attributes:
        start_s: From the start of the process until the model is loaded.
        load_s: Of that, opening the bundle and loading its program.
        first_ttft_s: Time to the first token of the first reply, when nothing is warm.
        ttft_s: The same of the second reply.
        between_tokens_s: Of the second reply: from each token to the next.
        idle_rss_bytes: Resident memory of the process after a reply, with no session open.
        peak_rss_bytes: The most it ever had.
    """

    start_s: float
    load_s: float
    first_ttft_s: float
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    between_tokens_s: tuple[float, ...]
    idle_rss_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """All runs with a prompt of one length; `prompt_sha256` is of its token ids, joined by commas."""

    prompt_tokens: int
    prompt_sha256: str
    ttft_s: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    between_tokens_s: TokenTimes
    peak_rss_bytes: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class ColdRun:
    """One fresh process and its first reply; see `Run`."""

    start_s: float
    load_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Cold:
    """Fresh processes. `files`: whether the bundle came from the disk, or from the system's cache as it cannot be emptied."""

    files: Literal["disk", "cache"]
    start_s: Spread
    load_s: Spread
    ttft_s: Spread
    runs: tuple[ColdRun, ...]


@dataclass(frozen=True, slots=True)
class SustainedSample:
    """Decode speed over a second or more that ended at `time_s`; clock and temperature then, where the system tells them."""

    time_s: float
    decode_tokens_per_s: float
    clock_hz: int | None
    temperature_c: float | None


@dataclass(frozen=True, slots=True)
class Sustained:
    """Replies without a pause. `kept_fraction`: speed of the last fifth of the samples over that of the first fifth."""

    seconds: float
    kept_fraction: float
    samples: tuple[SustainedSample, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the plan said when the bundle was made, for the device it was made for."""

    target: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """How a bundle's program runs on a machine. The figures at the top are of the first prompt length.

    Attributes:
        bundle_sha256: Of its manifest, which has the hashes of all other files.
        provider, provider_reason: What ran the program, and why that.
        load_s: Of processes whose files the system had cached.
        weights_bytes: As stored.
        bytes_per_token: What a decode step reads: weights, and the cache as it is halfway through the reply.
        bandwidth_bytes_per_s: Read bandwidth of this machine's memory with as many threads; see `bandwidth_basis`.
        roofline_fraction: Bytes read per second when decoding, over the bandwidth.
    """

    kind: Literal["edgekit-profile"]
    schema_version: int
    bundle: str
    bundle_sha256: str
    format: str
    executed: str
    provider: str
    provider_reason: str
    threads: int
    date: str
    new_tokens: int
    load_s: Spread
    ttft_s: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    between_tokens_s: TokenTimes
    peak_rss_bytes: int
    idle_rss_bytes: int
    weights_bytes: int
    bytes_per_token: int
    bandwidth_bytes_per_s: int
    bandwidth_basis: str
    roofline_fraction: float
    cold: Cold
    lengths: tuple[LengthProfile, ...]
    sustained: Sustained | None
    plan: Prediction | None
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """For `profile --json`."""
        return asdict(self)


def read_profile(path: Path) -> Profile:
    """Read what `edgekit profile --json` wrote.

    Raises:
        SourceError: It can't be read, is not a profile, or contradicts itself.
    """
    help_ = "write one with `edgekit profile BUNDLE --json > FILE`"
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise SourceError(f"{path} is too large to be a profile", hint=help_)
        values = json.loads(path.read_bytes())  # UTF-8, or UTF-16 as Windows PowerShell's > writes it
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", hint=help_) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON", hint=help_) from error
    if not isinstance(values, dict) or values.get("kind") != PROFILE_KIND:
        raise SourceError(f"{path} is not a profile", hint=help_)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SourceError(f"{path} has schema {version!r}, this EdgeKit reads {SCHEMA_VERSION}", hint="profile again")
    profile = Binder(str(path), SourceError, help=help_).bind(Profile, values)
    problem = _contradiction(profile)
    if problem:
        raise SourceError(f"{path}: {problem}", hint=help_)
    return profile


def _contradiction(profile: Profile) -> str | None:
    runs = [run for length in profile.lengths for run in length.runs]
    if not profile.lengths or not profile.cold.runs or not all(length.runs for length in profile.lengths):
        return "it holds no runs"
    figures = [value for run in runs for value in asdict(run).values()]
    figures += [value for cold in profile.cold.runs for value in asdict(cold).values()]
    if not all(min(value, default=0.0) > 0 if isinstance(value, tuple) else value > 0 for value in figures):
        return "a figure of a run is not over zero"
    return None
