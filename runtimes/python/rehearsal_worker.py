"""The process of a rehearsal: it takes all the memory that a program takes with its whole context in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle import open_bundle
from edgekit.child import answer

from .engine import LoadedModel, load_model
from .sequence import PREFILL_CHUNK

__all__ = ["occupy", "rehearse"]


def rehearse(*, bundle: str, format: str | None, provider: str | None, threads: int | None) -> dict[str, Any]:
    """Load a program, reply, and fill its context."""
    opened = open_bundle(Path(bundle))
    with load_model(opened, opened.program(format), provider=provider, threads=threads) as model:
        model.generate("hello", raw=True, max_tokens=min(8, max(model.context // 2, 1)))
        occupy(model)
        return {"context": model.context}


def occupy(model: LoadedModel) -> None:
    """Bring a sequence to the end of the context: zeros for what came before, the last tokens computed as a prompt's are."""
    layout, last = model.program.graph.cache, min(PREFILL_CHUNK, model.context - 1)
    decoder = model.backend.decoder()
    before = model.context - last - 1
    zeros = np.broadcast_to(np.zeros((), layout.dtype), (layout.kv_heads, before, layout.head_dim))
    decoder.write_cache([zeros] * (2 * layout.layers))
    decoder.forward(np.zeros(last, np.int64), rows=1, rope_length=model.context)
    decoder.forward(np.zeros(1, np.int64), rows=1, rope_length=model.context)


if __name__ == "__main__":
    answer(rehearse)
