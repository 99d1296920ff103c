"""The distribution that a sampler must draw from, by the processors of transformers in float64.

The order is that of transformers' generation loop. Presence and frequency penalties, which it lacks, are OpenAI's
formula: logit - frequency_penalty * count - presence_penalty * (count > 0), over the generated tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation import logits_process as processors

Options = Mapping[str, Any]
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Question:
    """What a sampler is given: logits [vocab] and the tokens so far."""

    logits: Sequence[float]
    options: Options
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()
    end_tokens: Sequence[int] = field(default=())


def distribution(question: Question, dtype: torch.dtype = torch.float64) -> tuple[list[int], list[float]]:
    """The kept ids, ascending, and their probabilities. Greedy keeps the first of the greatest."""
    scores = torch.tensor([list(question.logits)], dtype=dtype)
    for step in (*_changes(question), *_filters(question)):
        scores = step(scores)
    if not question.options.get("temperature"):
        return [int(scores[0].argmax())], [1.0]
    kept = torch.nonzero(scores[0] > -math.inf)[:, 0]
    probabilities = scores[0].double().softmax(0)[kept]
    return [int(token) for token in kept], [float(value) for value in probabilities]


def _changes(question: Question) -> list[Step]:
    """What changes the logits themselves: in greedy decoding too."""
    options, steps = question.options, list[Step]()
    if bias := options.get("logit_bias"):
        values = {(int(token),): -math.inf if value is None else float(value) for token, value in bias.items()}
        steps.append(_processor(processors.SequenceBiasLogitsProcessor(values), ()))
    if (penalty := options.get("repetition_penalty", 1)) != 1:
        seen = (*question.prompt, *question.generated)
        steps.append(_processor(processors.RepetitionPenaltyLogitsProcessor(float(penalty)), seen))
    if options.get("presence_penalty") or options.get("frequency_penalty"):
        steps.append(lambda scores: _openai_penalties(scores, options, question.generated))
    forbidden = [*question.end_tokens, *options.get("stop_tokens", ())]
    if options.get("min_tokens") and forbidden:
        length = processors.MinNewTokensLengthLogitsProcessor(len(question.prompt), options["min_tokens"], forbidden)
        steps.append(_processor(length, (*question.prompt, *question.generated)))
    return steps


def _filters(question: Question) -> list[Step]:
    options, found = question.options, list[Any]()
    if not options.get("temperature"):
        return []
    found.append(processors.TemperatureLogitsWarper(float(options["temperature"])))
    if options.get("top_k"):
        found.append(processors.TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1) < 1:
        found.append(processors.TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        found.append(processors.MinPLogitsWarper(options["min_p"]))
    if options.get("typical_p", 1) < 1:
        found.append(processors.TypicalLogitsWarper(options["typical_p"]))
    return [_processor(processor, ()) for processor in found]


def _processor(processor: Any, tokens: Sequence[int]) -> Step:
    ids = torch.tensor([list(tokens)], dtype=torch.long)
    return lambda scores: processor(ids, scores)


def _openai_penalties(scores: torch.Tensor, options: Options, generated: Sequence[int]) -> torch.Tensor:
    changed = scores.clone()
    for token, count in Counter(generated).items():
        changed[0, token] -= options.get("frequency_penalty", 0) * count + options.get("presence_penalty", 0)
    return changed
