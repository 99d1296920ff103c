"""Diagnosis on decoders whose faults are made by hand; real programs' are in tests/e2e/test_seeded_faults.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.diagnosis import CACHE, LATE, MASK, NOT_FINITE, ROTATION, STALE, WEIGHTS, WINDOW, diagnose, kl_alone

VOCABULARY, WINDOW_SIZE = 16, 40
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 200).tolist()
Logits = NDArray[np.float32]


@dataclass
class _Sum:
    """Predicts by a weighted sum over the last tokens. `wrong` is asked of each position: what else its logits have."""

    wrong: Callable[[_Sum, int, int], float]
    history: list[int] = field(default_factory=list)
    rewound: bool = False
    read_at_once: int = 0

    def forward(self, tokens: NDArray[np.int64], *, rows: int, rope_length: int) -> Logits:
        first, self.read_at_once = len(self.history), len(tokens)
        self.history += tokens.tolist()
        found = [self._after(position) for position in range(first, len(self.history))]
        return np.asarray(found[-rows:], np.float32)

    def _after(self, position: int) -> Logits:
        seen = self.history[max(position - WINDOW_SIZE + 1, 0) : position + 1]
        logits = np.zeros(VOCABULARY, np.float32)
        for distance, token in enumerate(reversed(seen)):
            logits[(token * 5 + distance) % VOCABULARY] += 2 / (1 + distance)
        logits[self.history[position] % 3] += self.wrong(self, position, self.history[position])
        return logits

    def rewind(self, length: int) -> None:
        del self.history[length:]
        self.rewound = True

    def close(self) -> None:
        pass


def _model(wrong: Callable[[_Sum, int, int], float]) -> Any:
    backend = SimpleNamespace(decoder=lambda: _Sum(wrong))
    return SimpleNamespace(backend=backend, provider=SimpleNamespace(is_slow=False))


def _followers(decoder: _Sum, position: int, token: int) -> float:
    return 4.0 * (len(decoder.history) > position + 1)


FAULTS: dict[str, tuple[Callable[[_Sum, int, int], float], str]] = {
    "none": (lambda decoder, position, token: 0.0, ""),
    "less than the bound": (lambda decoder, position, token: 0.01, ""),
    "everywhere": (lambda decoder, position, token: 4.0, WEIGHTS),
    "not a number": (lambda decoder, position, token: np.nan, NOT_FINITE),
    "all but the first": (lambda decoder, position, token: 4.0 * (position > 0), ROTATION),
    "behind the window": (
        lambda decoder, position, token: 4.0 * (position >= WINDOW_SIZE),
        WINDOW.format(window=WINDOW_SIZE),
    ),
    "one too early": (
        lambda decoder, position, token: 4.0 * (position >= WINDOW_SIZE - 1),
        WINDOW.format(window=WINDOW_SIZE),
    ),
    "late": (lambda decoder, position, token: 4.0 * (position >= 100), LATE.format(position=64)),
    "followers": (_followers, MASK),
    "one at a time": (lambda decoder, position, token: 4.0 * (position > 0 and decoder.read_at_once == 1), CACHE),
    "after a rewind": (lambda decoder, position, token: 4.0 * decoder.rewound, STALE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_symptoms_tell_faults_apart(name: str) -> None:
    wrong, expected = FAULTS[name]
    windows = (0, WINDOW_SIZE, 4096)
    assert diagnose(_model(wrong), _model(FAULTS["none"][0]), TEXT, bound=0.02, windows=windows) == expected


@pytest.mark.parametrize("name", ["all but the first", "behind the window", "late"])
def test_a_coarse_bound_does_not_blur_where_a_program_departs(name: str) -> None:
    """What a token alone has is rounding; what comes later and is many times that is none, whatever rounding may cost."""
    wrong, expected = FAULTS[name]
    found = diagnose(_model(wrong), _model(FAULTS["none"][0]), TEXT, bound=10.0, windows=(WINDOW_SIZE,))
    assert found == expected


def test_what_a_token_alone_has_is_not_what_follows_it_has() -> None:
    none = _model(FAULTS["none"][0])
    assert kl_alone(_model(FAULTS["all but the first"][0]), none, TEXT) == 0
    assert kl_alone(_model(FAULTS["everywhere"][0]), none, TEXT) > 1
