"""Lossless speculation: draft tokens by copying, check them in one forward, keep those the sampler picks too.

Drafts cost nothing to make (`PromptLookup`, or a structure that demands them) and something to check: a forward of
several rows takes longer than one of one row. So a draft is as long as pays by two measurements:
`ForwardCosts`, how long forwards of n rows take here, and `Acceptance`, how often a predicted token came true. Both learn
from what happens anyway: forwards are timed as they come, and what lookup predicts is compared with every token, drafted
or not, so that trying costs nothing where it does not pay.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .prompt_lookup import Evidence, Prediction, PromptLookup

__all__ = ["Acceptance", "ForwardCosts", "Speculator", "verify_draft"]

MOST_DRAFTED = 15
FIRST_DRAFT = 3
# a draft must promise this much more speed than none: estimates err, and being wrong should not cost free text anything
LEAST_GAIN = 1.05
# where drafts have cost a reply more than this share of its time, in the balance, only the surest are made
MOST_LOST = 0.01
SURE_GAIN = 1.5
# what several rows cost more than one, in units of one, before anything is measured: SmolLM2-135M at 4 and 8 bits on ONNX
# Runtime, x86-64, 256 to 1,024 tokens in the cache (1.35 for 2 rows, 1.65 for 4, 2.25 for 8, 3.45 for 16)
PRIOR_STEP, PRIOR_ROW = 0.2, 0.15
_PRIOR_WEIGHT = 0.5
_FORGET_BY_DRAFT = 0.9
_FORGET_BY_ROW = 0.997
_MOST_SURPRISE = 1.5
_ONE_ROW_EVERY = 64
# probability that a predicted token comes true, before any was compared: by evidence and by length of the match
PRIOR_ACCEPTANCE: Mapping[Evidence, tuple[float, ...]] = {
    "ambiguous": (0.1, 0.2, 0.3, 0.3, 0.3, 0.3),
    "single": (0.25, 0.4, 0.5, 0.65, 0.8, 0.9),
    "repeated": (0.5, 0.7, 0.8, 0.9, 0.9, 0.95),
    "forced": (0.9, 0.9, 0.9, 0.9, 0.9, 0.9),
}
_MATCH_LENGTHS = (1, 2, 3, 4, 6, 10)
_ACCEPTANCE_WEIGHT = 4.0
_ACCEPTANCE_MEMORY = 0.97


class TokenSampler(Protocol):
    """The part of `Sampler` that verification needs."""

    def next(self, logits: NDArray[np.float32]) -> int:
        """Pick a token and remember it."""
        ...


class TokenConstraint(Protocol):
    """The part of a constraint that speculation needs."""

    @property
    def is_complete(self) -> bool:
        """Nothing more can follow."""
        ...

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits with minus infinity where a token would break the structure."""
        ...

    def accept(self, token: int) -> None:
        """Go on by a token."""
        ...

    def count_valid(self, tokens: Sequence[int]) -> int:
        """How many of the leading tokens the structure admits."""
        ...


def verify_draft(
    logits: NDArray[np.float32], draft: Sequence[int], sampler: TokenSampler, constraint: TokenConstraint | None = None
) -> list[int]:
    """The tokens that plain decoding picks from these rows: those of the draft that it agrees with, and one more.

    Each row is sampled as without a draft, and the first pick that is not the draft's ends the round. For a draft that
    is certain of its tokens this is the rejection rule of Leviathan et al. (arXiv:2211.17192, algorithm 1): the drafted
    token is kept with its probability p(x), else drawn from p without x. It draws one number a token, as plain decoding
    does: the same seed gives the same tokens, as far as rows computed together agree with rows computed one by one.

    Args:
        logits: float32 [1 + drafted, vocab]: after the last token before the draft, then after each of the draft.
        draft: The tokens fed after that last one; none is plain decoding.
        sampler: Picks from each row, and remembers its picks.
        constraint: Masks each row, and is told each pick; nothing is picked after it is complete.

    Returns:
        At least one token; all but the last are the draft's beginning.

    Raises:
        GenerationError: A row forbids every token, or holds NaN.
        ValueError: There is not one row more than drafted tokens.
    """
    if len(logits) != 1 + len(draft):
        raise ValueError(f"{len(logits)} rows of logits for a draft of {len(draft)}")
    picked: list[int] = []
    for row, drafted in zip(logits, (*draft, None), strict=True):
        token = sampler.next(row if constraint is None else constraint.mask(row))
        picked.append(token)
        if constraint is not None:
            constraint.accept(token)
            if constraint.is_complete:
                break
        if token != drafted:
            break
    return picked


class ForwardCosts:
    """What a forward of several rows costs beside one of a single row, learned from the forwards that happen.

    One row and several take different kernels: the cost is a step from one row to several and the same again for each
    row. One factor that both share is learned, as a mean that forgets; so a few forwards of any length tell of all. Belongs
    to a loaded model: all its sessions teach it. Races between threads lose an observation at worst.
    """

    def __init__(self) -> None:
        self._one_row: deque[float] = deque(maxlen=9)
        self._since_one_row = 0
        self._weight = self._total = 0.0

    @property
    def wants_one_row(self) -> bool:
        """Whether no forward of one row happened lately, to compare with."""
        return not self._one_row or self._since_one_row >= _ONE_ROW_EVERY

    @property
    def is_measured(self) -> bool:
        """Whether a forward of several rows happened lately."""
        return self._weight >= 0.5

    def ratio(self, rows: int) -> float:
        """Time of a forward of `rows` rows in units of one row."""
        factor = (_PRIOR_WEIGHT + self._total) / (_PRIOR_WEIGHT + self._weight)
        return 1.0 + factor * _prior_extra(rows) if rows > 1 else 1.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a forward.

        A surprise counts in part: one interruption by another process is not what forwards cost.
        """
        if rows == 1:
            self._one_row.append(seconds)
            self._since_one_row = 0
            self._weight, self._total = _FORGET_BY_ROW * self._weight, _FORGET_BY_ROW * self._total
        elif self._one_row:
            self._since_one_row += 1
            expected, one_row_s = self.ratio(rows), statistics.median(self._one_row)
            cost = min(max(seconds / one_row_s, expected / _MOST_SURPRISE, 1.0), expected * _MOST_SURPRISE)
            self._weight = _FORGET_BY_DRAFT * self._weight + 1
            self._total = _FORGET_BY_DRAFT * self._total + (cost - 1) / _prior_extra(rows)


def _prior_extra(rows: int) -> float:
    return PRIOR_STEP + PRIOR_ROW * (rows - 1)


class Acceptance:
    """How often a prediction comes true, by its evidence and the length of its match; old outcomes fade."""

    def __init__(self) -> None:
        self._total = {evidence: [_ACCEPTANCE_WEIGHT] * len(prior) for evidence, prior in PRIOR_ACCEPTANCE.items()}
        self._hits = {kind: [_ACCEPTANCE_WEIGHT * p for p in prior] for kind, prior in PRIOR_ACCEPTANCE.items()}

    def probability(self, prediction: Prediction) -> float:
        """That the predicted token comes, if those predicted before it did."""
        place = _place(prediction.match_length)
        return self._hits[prediction.evidence][place] / self._total[prediction.evidence][place]

    def observe(self, prediction: Prediction, token: int) -> None:
        """Learn from what came."""
        hits, total = self._hits[prediction.evidence], self._total[prediction.evidence]
        place = _place(prediction.match_length)
        hits[place] = _ACCEPTANCE_MEMORY * hits[place] + (prediction.token == token)
        total[place] = _ACCEPTANCE_MEMORY * total[place] + 1


def _place(match_length: int) -> int:
    return bisect_right(_MATCH_LENGTHS, match_length) - 1


class Speculator:
    """Speculation over one reply: what to draft next, and what came of it.

    Args:
        costs: Of the model, shared by its sessions.
        tokens: The prompt.
        end_tokens: Never drafted: the token after the last one drafted comes free.

    Attributes:
        drafted: Tokens proposed so far.
        accepted: Those of them that became part of the reply.
    """

    def __init__(self, costs: ForwardCosts, tokens: Sequence[int], end_tokens: Iterable[int] = ()) -> None:
        self._costs = costs
        self._written: Sequence[int] = tokens
        self._lookup: PromptLookup | None = None
        self._end_tokens = frozenset(end_tokens)
        self._forced: list[Prediction] = []
        self._acceptance = Acceptance()
        self._limit = FIRST_DRAFT
        self._lost = 0.0  # time of drafted forwards less that of plain decoding, in units of one row
        self._allowed = 1.0
        self.drafted = 0
        self.accepted = 0

    def draft(self, most: int, constraint: TokenConstraint | None = None, forced: Sequence[int] = ()) -> list[int]:
        """The tokens to check next, at most `most`; empty where none is likely enough to pay.

        Args:
            most: What the reply and the context have room for.
            constraint: Cuts the draft to what it admits.
            forced: Tokens of the text that a structure demands next, where it does. They come before lookup; they are
                checked as any draft, as the same text may be cut into tokens otherwise.
        """
        self._forced = [Prediction(token, 1, "forced") for token in forced[:most]]
        if not self._forced and not self._indexed().match_length:
            return []
        likely = self._forced or self._indexed().predictions()
        drafted = self._likely(likely, min(most, MOST_DRAFTED if self._forced else self._limit))
        return drafted[: constraint.count_valid(drafted)] if constraint is not None and drafted else drafted

    def record(self, draft: Sequence[int], picked: Sequence[int], seconds: float | None = None) -> None:
        """Learn from a round.

        Args:
            draft: What `draft` returned; empty for a token by itself.
            picked: What `verify_draft` made of it.
            seconds: What the forward took; None for a prefill.
        """
        if seconds is not None:
            self._costs.observe(1 + len(draft), seconds)
        self._allowed += MOST_LOST * len(picked)
        if draft:
            self._weigh(draft, picked)
        if self._lookup is None:  # the first token is on its way to the reader: index after it
            self._written = [*self._written, *picked]
            return
        for token in picked:
            if self._lookup.match_length:
                self._acceptance.observe(next(self._lookup.predictions()), token)
            self._lookup.extend((token,))

    def _weigh(self, draft: Sequence[int], picked: Sequence[int]) -> None:
        """Learn from what became of a draft."""
        accepted = len(draft) if list(picked) == list(draft) else len(picked) - 1  # equal: complete without one more
        self.drafted += len(draft)
        self.accepted += accepted
        self._lost += self._costs.ratio(1 + len(draft)) - 1 - accepted
        for forced, token in zip(self._forced, picked, strict=False):
            self._acceptance.observe(forced, token)
        if not self._forced:
            longer = max(self._limit, min(2 * len(draft) + 1, MOST_DRAFTED))
            self._limit = longer if accepted == len(draft) else max(accepted, FIRST_DRAFT)

    def _indexed(self) -> PromptLookup:
        if self._lookup is None:
            self._lookup = PromptLookup(self._written)
        return self._lookup

    def _likely(self, predictions: Iterable[Prediction], most: int) -> list[int]:
        """The draft of the highest expected speed: tokens a round over what its forward costs."""
        costs = self._costs
        if costs.wants_one_row:
            return []
        most = most if costs.is_measured else min(most, 1)
        best, length, tokens = LEAST_GAIN if self._lost < self._allowed else SURE_GAIN, 0, list[int]()
        reached = expected = 1.0
        for prediction in islice(predictions, max(most, 0)):
            if prediction.token in self._end_tokens:
                break
            tokens.append(prediction.token)
            reached *= self._acceptance.probability(prediction)
            expected += reached
            speed = expected / costs.ratio(1 + len(tokens))
            if speed > best:
                best, length = speed, len(tokens)
        return tokens[:length]
