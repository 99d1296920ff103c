"""Scales of an 8-bit key-value cache: one for each channel, from the largest keys and values that texts of the model's show.

Channels of keys grow alike for all tokens (KIVI, arXiv:2402.02750; KVQuant, arXiv:2401.18079), so scales for each of them fit
texts that were never seen. What exceeds its channel's range is clipped to it. Two channels that are rotated together get the
same range, their largest length: so the ranges hold at every position, not only at those that the texts reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.calibration import THREADS
from edgekit.companion import companion
from edgekit.config import ModelConfig
from edgekit.errors import ConversionError
from edgekit.plan import Plan
from edgekit.progress import ProgressFn
from edgekit.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekit.runtimes.engine import LoadedModel

__all__ = ["find_cache_scales"]

LARGEST = 127  # of an 8-bit integer
CHUNK_TOKENS = 128
# What lies unused (a head's padding, a channel that no text lit up) takes any scale; zero would divide by zero.
_LEAST_RANGE = 1e-6


def find_cache_scales(
    source: Source,
    plan: Plan,
    texts: Sequence[Sequence[int]],
    bundle_directory: Path,
    *,
    on_progress: ProgressFn | None = None,
) -> list[NDArray[np.float32]]:
    """float32 [1, kv_heads, 1, head_dim] for key and value of each layer in turn.

    Args:
        texts: Token ids.
        bundle_directory: Beside it a program with 8-bit weights and a float32 cache is written, and removed again.

    Raises:
        ConversionError: That program can't be written, or computes values that are not finite numbers.
        SourceError: A weight can't be read or is not a finite number.
        BundleError: The program does not load.
    """
    with companion(
        source, bundle_directory, quant="int8", context=plan.context, stage="prepare",
        threads=THREADS, on_progress=on_progress,
    ) as model:  # fmt: skip
        ranges = _largest(model, source.config, texts)
    return [(found / found.dtype.type(LARGEST))[None, :, None, :] for found in ranges]


def _largest(model: LoadedModel, config: ModelConfig, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """The largest magnitude of each channel, float32 [kv_heads, head_dim], for key and value of each layer in turn."""
    import numpy as np

    dims = [dim for layer in config.layers for dim in (layer.rope.dim if layer.rope else 0, 0)]
    ranges = [np.full((1, 1), _LEAST_RANGE, np.float32)] * len(dims)
    for text in texts:
        decoder = model.backend.decoder()
        tokens = np.asarray(text, np.int64)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            decoder.forward(tokens[start : start + CHUNK_TOKENS], rows=1, rope_length=len(tokens))
        ranges = [
            np.maximum(known, _magnitudes(array, dim).max(axis=1))
            for known, array, dim in zip(ranges, decoder.read_cache(), dims, strict=True)
        ]
        decoder.close()
    if not all(np.isfinite(found).all() for found in ranges):
        raise ConversionError(
            "keys or values are not finite numbers, which an 8-bit cache can't hold", hint="use --cache float32"
        )
    return ranges


def _magnitudes(array: NDArray[np.generic], rotated: int) -> NDArray[np.float32]:
    """Absolute values of [kv_heads, tokens, head_dim]; of the first `rotated` channels the lengths of the pairs (i, i + half)."""
    import numpy as np

    found: NDArray[np.float32] = np.abs(array.astype(np.float32))
    half = rotated // 2
    lengths = np.hypot(found[..., :half], found[..., half:rotated])
    found[..., :rotated] = np.concatenate([lengths, lengths], axis=-1)
    return found
