"""Rotary frequencies against transformers' own, for every kind of scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.config import RopeConfig
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.converters.architectures.rope_fields import rope_from
from edgekit.converters.rope import inverse_frequencies, rope_tables

# Both compute in float32; powers and logarithms may differ in the last bits.
FREQUENCY_TOLERANCE = 1e-6
# An angle of up to 100 rad has a float32 step of 8e-6.
TABLE_TOLERANCE = 2e-5
HEAD_DIM, CONTEXT = 64, 4096

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 1024,
    "short_factor": [1.0 + 0.02 * index for index in range(HEAD_DIM // 2)],
    "long_factor": [1.3 + 0.9 * index for index in range(HEAD_DIM // 2)],
}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-wide-blend": LLAMA3 | {"high_freq_factor": 64.0, "factor": 32.0},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.3},
    "yarn-one-mscale": YARN | {"mscale": 0.707},
    "yarn-no-truncation": YARN | {"truncate": False},
    "yarn-attention-factor": YARN | {"attention_factor": 1.7},
    "yarn-betas": YARN | {"beta_fast": 64.0, "beta_slow": 2.0},
    "yarn-zero-betas": YARN | {"beta_fast": 0, "beta_slow": None},
    "yarn-shrinking": YARN | {"factor": 0.5},
    "yarn-tiny-original": YARN | {"original_max_position_embeddings": 4},
    "longrope": LONGROPE,
    "longrope-factor": LONGROPE | {"factor": 16.0},
    "longrope-attention-factor": LONGROPE | {"attention_factor": 1.25},
}


def described(scaling: dict[str, Any], **config: Any) -> RopeConfig:
    fields = ConfigFields({"max_position_embeddings": CONTEXT, "rope_parameters": scaling, **config}, "config.json")
    return rope_from(fields, HEAD_DIM)


def in_transformers(scaling: dict[str, Any], sequence: int | None = None) -> tuple[Any, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=CONTEXT, rope_parameters=dict(scaling)
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None, seq_len=sequence)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_equal_transformers(case: str) -> None:
    rope = described(CASES[case])
    expected, factor = in_transformers(CASES[case])
    found = inverse_frequencies(rope, rope.short_factors)
    np.testing.assert_allclose(found, expected, rtol=FREQUENCY_TOLERANCE)
    assert rope.attention_factor == pytest.approx(factor, rel=FREQUENCY_TOLERANCE)


def test_longrope_takes_the_long_factors_past_the_original_context() -> None:
    rope = described(LONGROPE)
    expected, _ = in_transformers(LONGROPE, sequence=1025)
    np.testing.assert_allclose(inverse_frequencies(rope, rope.long_factors), expected, rtol=FREQUENCY_TOLERANCE)


@pytest.mark.parametrize(("partial", "dim"), [(1.0, 64), (0.5, 32), (0.25, 16)])
@pytest.mark.parametrize("theta", [10000.0, 5e6])
def test_default_frequencies_equal_llamas(theta: float, partial: float, dim: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=CONTEXT, rope_parameters=scaling
    )
    rope = described(scaling, partial_rotary_factor=partial)
    assert rope.dim == dim
    expected = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(inverse_frequencies(rope), expected.inv_freq.numpy(), rtol=FREQUENCY_TOLERANCE)
    cosine, sine = expected(torch.zeros(1), torch.arange(100)[None])
    found = rope_tables(rope, 100)
    np.testing.assert_allclose(found[0], cosine[0, :, : dim // 2], atol=TABLE_TOLERANCE)
    np.testing.assert_allclose(found[1], sine[0, :, : dim // 2], atol=TABLE_TOLERANCE)


def test_tables_of_longrope_hold_short_rows_then_long_ones_scaled() -> None:
    rope = described(LONGROPE | {"attention_factor": 1.5})
    cosine, sine = rope_tables(rope, 50)
    assert cosine.shape == sine.shape == (100, HEAD_DIM // 2)
    position = np.float32(7)
    for row, divisors in ((7, rope.short_factors), (57, rope.long_factors)):
        angles = position * inverse_frequencies(rope, divisors)
        np.testing.assert_array_equal(cosine[row], np.cos(angles) * np.float32(1.5))
        np.testing.assert_array_equal(sine[row], np.sin(angles) * np.float32(1.5))


def test_given_divisors_divide_each_frequency() -> None:
    divisors = tuple(1.0 + index for index in range(HEAD_DIM // 2))
    rope = described({"rope_type": "factors", "factors": list(divisors), "rope_theta": 10000.0})
    plain = inverse_frequencies(described({"rope_theta": 10000.0}))
    found = inverse_frequencies(rope, rope.short_factors)
    np.testing.assert_allclose(found, plain / np.array(divisors, np.float32), rtol=FREQUENCY_TOLERANCE)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 500000.0, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}},
        {"rope_theta": 10000.0, "rope_scaling": {**LONGROPE, "type": "su", "rope_type": None}},
    ],
)
def test_settings_as_older_transformers_wrote_them_mean_the_same(old: dict[str, Any]) -> None:
    new = LLAMA3 if old["rope_theta"] > 10000 else LONGROPE
    fields = ConfigFields({"max_position_embeddings": CONTEXT, **old}, "config.json")
    assert rope_from(fields, HEAD_DIM) == described(new)
