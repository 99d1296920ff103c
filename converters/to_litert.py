"""LiteRT: a .tflite with three functions of static shape, which share their weights; the runtime keeps the cache.

litert-torch converts. It pins old packages, so it has an environment of its own, where another process converts the decoder
that is built here (`litert_worker`). Weights are the quantizer's own whole numbers: the file's floats are replaced by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgekit.child import ChildError, run_child
from edgekit.errors import ConversionError
from edgekit.graph import CacheLayout, Graph
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source
from edgekit.staging import working_directory

from .disk_space import check_space, writing
from .litert_attention import PAST, PRESENT, GivenCacheAttention, LitertFunction
from .litert_environment import environment_python
from .litert_weights import LitertParts
from .stored_weights import stored_weights
from .torch_decoder import TorchDecoder
from .torch_weights import load_weights
from .vendor_tools import lowering

__all__ = ["export"]

PROGRAM = "litert/model.tflite"
CHUNK = 64
WORKER = "edgekit.converters.litert_worker"
TIMEOUT_S = 7200.0  # so long that only tools that hang meet it: thirty layers take two minutes


def export(
    source: Source,
    plan: Plan,
    directory: Path,
    *,
    texts: Sequence[Sequence[int]] = (),
    on_progress: ProgressFn | None = None,
) -> Graph:
    """Write the program into `directory`/litert.

    Args:
        texts: Token ids to calibrate on, where the plan needs them.

    Raises:
        SourceError: A weight can't be read or is not a finite number.
        ConversionError: The environment can't be made, or LiteRT's tools fail.
    """
    config, chunk, path = source.config, min(CHUNK, plan.context), directory / PROGRAM
    check_space(directory, plan.memory.weights_bytes)
    python = environment_python(on_progress)
    parts, attention = LitertParts(), GivenCacheAttention(config, plan.context)
    stored = stored_weights(source, plan, directory.parent, texts=texts, on_progress=on_progress)
    weights = load_weights(stored, config, parts)
    decoder = TorchDecoder(config, weights, attention, context=plan.context, last_row=False)
    switches = bool(decoder.positions.switch)
    path.parent.mkdir(parents=True)
    with working_directory(directory.parent) as place, lowering("LiteRT", on_progress):
        handed = place / "decoder.pt"  # killed, its place is swept by the next conversion there
        with writing(handed), handed.open("wb") as file:  # by its name, PyTorch does not say what went wrong
            torch.save({"function": LitertFunction(decoder, attention), "integers": parts.integers}, file)
        operators = _lower(
            {"decoder": str(handed), "program": str(path), "chunk": chunk, "rope_length": switches}, python
        )
    numbers = ("tokens", "past_length", "logits_start", *(["rope_length"] if switches else []))
    heads = config.attention
    return Graph(
        format="litert",
        files=(PROGRAM,),
        inputs={name: name for name in numbers},
        outputs={"logits": "logits"},
        cache=CacheLayout(len(config.layers), heads.kv_heads, heads.head_dim, "float32", *PAST, *PRESENT),
        vocab_size=config.vocab_size,
        rope_switch=config.longrope_switch if switches else 0,
        weights=weights.reports,
        chunk=chunk,
        operators=operators,
    )


def _lower(task: Mapping[str, Any], python: Path) -> dict[str, dict[str, int]]:
    """Let the other environment convert; how often each function has each operator."""
    try:
        operators: dict[str, dict[str, int]] = run_child(WORKER, task, python=python, timeout_s=TIMEOUT_S)["operators"]
    except ChildError as error:
        raise ConversionError(f"LiteRT's tools failed: {error.message}", hint=error.hint) from error
    return operators
