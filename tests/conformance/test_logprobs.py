from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.runtimes.logprobs import token_logprob

SUITE = "logprobs"


def test_case(case: dict[str, Any], suite: dict[str, Any], outcome: Any, logits_of: Any) -> None:
    expect = case["expect"]
    got = outcome(lambda: token_logprob(logits_of(case), case["token"], case["alternatives"]))
    if "error" in expect:
        assert got == expect
        return
    assert got.token == case["token"]
    assert [token for token, _ in got.alternatives] == expect["alternatives"]
    values = [got.logprob, *(logprob for _, logprob in got.alternatives)]
    np.testing.assert_allclose(
        values, [expect["logprob"], *expect["alternative_logprobs"]], rtol=0, atol=suite["tolerance"]
    )
