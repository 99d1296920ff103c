"""The texts that calibrated rounding learns from: the model writes them itself, at 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.capability import CAPABILITIES
from edgekit.companion import companion
from edgekit.errors import ConversionError, GenerationError
from edgekit.goldens import render_prompts, sampled_tokens
from edgekit.plan import Plan
from edgekit.progress import Progress, ProgressFn
from edgekit.source import Source

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["THREADS", "calibration_texts", "text_tokens"]

NEW_TOKENS = 128  # of each text
FEW_TOKENS = 32  # where only a cache's ranges are wanted
# Of each operator, on every machine: how sums are split must not change the bytes of what is written. Two is what the
# smallest build machines have; more would wait for each other there.
THREADS = 2
SEED = 60_000  # apart from the goldens': what is learnt from is not what is tested on
# Subjects and kinds of text that an assistant meets, none of them among the goldens.
_QUESTIONS = (
    "What is the difference between a virus and a bacterium?",
    "Give me a recipe for vegetable soup.",
    "Write a Python function that reverses a linked list.",
    "Summarize the causes of the First World War.",
    "How do I prepare for a job interview?",
    "Translate into French: Good morning, how are you?",
    "What should I see in Rome in two days?",
    "Explain photosynthesis to a child.",
    "Write an email that asks for a refund.",
    "Who was Ada Lovelace?",
    "Solve the equation 3x + 5 = 20 step by step.",
    "Write a poem about winter.",
)
_OPENINGS = (
    "The history of the city begins",
    "In this paper we show that",
    "def main():\n",
    "The company announced on Monday that",
    "# Installation\n\n",
    "Dear Sir or Madam,\n",
    "Question: How many legs does a spider have?\nAnswer:",
    "The patient was admitted with",
)


def text_tokens(plan: Plan) -> int:
    """Tokens that each text goes on for, past its prompt: few where only a cache's ranges are wanted."""
    only_ranges = not (plan.calibrated or plan.scaled) and not CAPABILITIES[plan.format].quantized_activations
    return FEW_TOKENS if only_ranges else NEW_TOKENS


def calibration_texts(
    source: Source, plan: Plan, bundle_directory: Path, *, on_progress: ProgressFn | None = None
) -> tuple[tuple[int, ...], ...]:
    """Token ids of chat replies and of plain texts, each with its prompt.

    Raises:
        ConversionError: The context is too short for any prompt, or the 8-bit program can't be written or does not run.
        SourceError: A weight can't be read or is not a finite number.
        BundleError: The 8-bit program does not load.
    """
    texts: list[tuple[int, ...]] = []
    new_tokens = text_tokens(plan)
    with companion(
        source, bundle_directory, quant="int8", context=plan.context, stage="prepare",
        threads=THREADS, on_progress=on_progress,
    ) as model:  # fmt: skip
        prompts = _prompts(model)
        for number, (prompt, add_special_tokens) in enumerate(prompts):
            ids = model.token_ids(prompt, add_special_tokens=add_special_tokens)
            count = min(new_tokens, model.context - len(ids))
            if ids and count > 0:
                texts.append((*ids, *_continued(model, ids, count, SEED + number)))
            if on_progress:
                on_progress(Progress("calibrate", number + 1, len(prompts), "texts"))
    if not texts:
        what = plan.quant if plan.calibrated or plan.scaled else "8-bit keys and values"
        raise ConversionError(
            f"a context of {plan.context} is too short to calibrate {what}",
            hint="use a longer context, or --quant int8 and --cache float16, which need none",
        )
    return tuple(texts)


def _prompts(model: LoadedModel) -> list[tuple[str, bool]]:
    """Texts to go on from, and whether special tokens are to be added."""
    openings = [(text, True) for text in _OPENINGS]
    try:
        return [*render_prompts(model, _QUESTIONS, ()), *openings]
    except GenerationError:  # the template refuses: plain texts do
        return openings


def _continued(model: LoadedModel, prompt: list[int], count: int, seed: int) -> list[int]:
    try:
        return sampled_tokens(model, prompt, count, seed)
    except GenerationError as error:
        raise ConversionError(
            f"the 8-bit program that calibration writes with does not run: {error.message}",
            hint="use --quant int8 or int4",
        ) from error
