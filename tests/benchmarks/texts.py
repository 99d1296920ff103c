"""The texts that quality is measured on, and the full-precision model that writes them. Not a benchmark itself.

`tuned`: continuations of prompts on which recipes were chosen. `held-out`: of prompts that no recipe is ever chosen on; the
figures that count come from these. A user's own file is read in windows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from convert import CommandError
from engines import Logits

from edgekit.divergence import log_probabilities


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the model is asked in its chat format, and what it continues as plain text."""

    chat: tuple[str, ...]
    plain: tuple[str, ...]


PROMPTS = {
    "tuned": Prompts(
        (
            "Why is the sky blue?",
            "Write a short story about a lighthouse keeper who finds a letter.",
            "Explain how a bicycle stays upright.",
            "Give me a recipe for vegetable soup with step-by-step instructions.",
            "What should I see in Lisbon in two days?",
            "Write a Python function that returns the n-th Fibonacci number.",
            "Summarise the causes of the First World War.",
            "How do I ask my manager for a day off? Draft the email.",
            "What is the difference between a virus and a bacterium?",
            "List five tips for sleeping better and say why each works.",
        ),
        (
            "The history of the printing press begins",
            "In this chapter we introduce the notion of a derivative. Let f be",
            "It was raining when the train finally arrived, and",
            "The committee announced on Tuesday that",
            "Photosynthesis is the process by which",
            "def read_config(path):\n",
        ),
    ),
    "held-out": Prompts(
        (
            "How do volcanoes form?",
            "Write a poem about a river that has forgotten its name.",
            "My laptop does not turn on any more. What can I try?",
            "Compare renting a flat with buying one.",
            "Write an SQL query that lists the ten customers with the highest total of orders.",
            "Explain compound interest to a twelve-year-old, with an example.",
            "Who was Marie Curie and what is she known for?",
            "Plan a birthday party for eight children in a small garden.",
            "Translate into plain English: the lessee shall indemnify the lessor against all claims.",
            "What are the rules of chess for a beginner?",
        ),
        (
            "The migration of birds has puzzled people since",
            "Theorem 3. Every finite group of prime order is cyclic. Proof.",
            "She closed the door behind her and listened. From the kitchen",
            "Shares of the company fell on Thursday after",
            "To replace the chain of a motorcycle, first",
            "import numpy as np\n\ndef moving_average(values, width):\n",
        ),
    ),
}
NEW_TOKENS = 192
WINDOW = 256  # tokens of a user's text that are read from an empty cache


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens; those from `start` on are predicted and compared."""

    tokens: list[int]
    start: int


class Reference:
    """The full-precision model on transformers."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def _rendered(self, prompts: Prompts) -> list[str]:
        if not self._tokenizer.chat_template:
            return [*prompts.plain, *prompts.chat]
        chats: list[list[dict[str, str]]] = [[{"role": "user", "content": text}] for text in prompts.chat]
        return [*prompts.plain, *self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)]

    def sample(self, prompts: Prompts, positions: int, seed: int) -> list[Text]:
        """Continue every prompt, over and over, until at least `positions` tokens are sampled at temperature 1."""
        texts: list[Text] = []
        self._torch.manual_seed(seed)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        batch = self._tokenizer(self._rendered(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        pads = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        width = batch["input_ids"].shape[1]
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}
        ends = self._model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        while sum(len(text.tokens) - text.start for text in texts) < positions:
            rows = self._model.generate(**batch, **options, pad_token_id=self._tokenizer.pad_token_id).tolist()
            for row, pad in zip(rows, pads, strict=True):
                end = next((i + 1 for i, token in enumerate(row) if i >= width and token in stops), len(row))
                texts.append(Text(row[pad:end], width - pad))
        return texts

    def read(self, file: Path, positions: int) -> list[Text]:
        """A user's text in windows, evenly spread over it where it has more than `positions` tokens.

        Raises:
            CommandError: The file can't be read as text, or is too short.
        """
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CommandError(f"{file} cannot be read as UTF-8 text: {error}") from error
        tokens = self._tokenizer(content, add_special_tokens=False)["input_ids"]
        if len(tokens) < WINDOW:
            raise CommandError(f"{file} has {len(tokens)} tokens, at least {WINDOW} are needed")
        first = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        windows = [tokens[place : place + WINDOW] for place in range(0, len(tokens) - WINDOW + 1, WINDOW)]
        wanted = min(-(-positions // WINDOW), len(windows))
        chosen = [windows[place] for place in np.linspace(0, len(windows) - 1, wanted).astype(int)]
        return [Text([*first, *window], 1) for window in chosen]

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after every token."""
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([list(tokens)])).logits[0]
        return np.asarray(logits.numpy(), dtype=np.float32)


def sampled_texts(reference: Reference, name: str, cache: Path, positions: int, seed: int) -> list[Text]:
    """The texts sampled from one set of prompts, out of the cache when the same ones were asked for before."""
    file = cache / f"texts-{name}-{positions}-{seed}.json"
    if not file.exists():
        texts = reference.sample(PROMPTS[name], positions, seed)
        file.write_text(json.dumps([[text.tokens, text.start] for text in texts]))
    return [Text(tokens, start) for tokens, start in json.loads(file.read_text())]


def write_log_probabilities(reference: Reference, texts: Sequence[Text], folder: Path) -> Iterator[Path]:
    """Write the reference's log-probabilities of each text to a file, float32: together they can be larger than the memory."""
    for number, text in enumerate(texts):
        path = folder / f"{number}.npy"
        found = log_probabilities(reference.logits(text.tokens[:-1])[text.start - 1 :])
        np.save(path, found.astype(np.float32))
        yield path
