"""How far from full precision a program may be, by what it is made of."""

from __future__ import annotations

from edgekit.capability import CAPABILITIES
from edgekit.diagnosis import ALONE_TIMES
from edgekit.divergence import Figures
from edgekit.graph import Graph
from edgekit.quant import CacheFormat
from edgekit.verify import Comparison

__all__ = ["failure", "is_suspicious", "kl_bound", "rounding_bound", "top1_bound"]

# Mean KL against full precision that a scheme may cost, in nats. 4 bits hurt small models more.
BOUND_FLOATS = 0.005  # what halves cost, and sums in another order, with room for models that are never sure
BOUND_8_BITS = 0.02
BOUND_8_BIT_ROWS = 0.1  # weights and activations have one scale a row and a token, where others have one for each block
BOUND_8_BIT_NPU = 0.1  # its activations are whole numbers too, keys and values of 8 bits
BOUND_4_BITS_SMALL, BOUND_4_BITS = 0.6, 0.2
# Palettes of 6 bits: `sample` has 0.08, off its grid 0.12 (256 positions). A third of it for larger models is assumed.
BOUND_6_BITS_SMALL, BOUND_6_BITS = 0.15, 0.05
# The coarser bounds of 8 bits leave room for a wrong mask (0.085 on a tiny model whose rounding costs 0.002). What rounding
# costs, it costs a token alone too: more than this, and than ALONE_TIMES that, is no rounding. Of 35 sound programs of tiny
# models for NPUs the most had 7 times (and under 0.007); `sample` has 1.9 times, and with ExecuTorch 0.4.
SUSPICIOUS = 0.04
SMALL_PARAMETERS = 1_000_000_000
# A model whose best token is another one at every second position writes other texts. A reference that is never sure has many
# near ties: there the bound is how often its own samples agree with it.
TOP1_BOUND = 0.5
# Decoding one token at a time computes what reading several at once does: by so much may its KL exceed that of the same
# positions. Rounding is another, which 8-bit activations make visible.
DECODE_EXCESS = 0.1
# A few positions past half of the context may have more than a mean's share.
LATE_SLACK = 2.0


def kl_bound(graph: Graph, parameters: int) -> float:
    """The mean KL that a program must not exceed: by the fewest bits that any of its weights was rounded to."""
    rounded = [report.bits for report in graph.weights if report.block_size and report.relative_error]
    capability = CAPABILITIES[graph.format]
    fewest, is_small = min(rounded, default=32), parameters < SMALL_PARAMETERS
    if fewest <= 4:
        return BOUND_4_BITS_SMALL if is_small else BOUND_4_BITS
    if fewest <= 6:
        return BOUND_6_BITS_SMALL if is_small else BOUND_6_BITS
    if capability.quantized_activations:
        return BOUND_8_BIT_NPU
    if all(report.bits >= 16 for report in graph.weights) and graph.cache.dtype != CacheFormat.INT8:
        return BOUND_FLOATS
    return BOUND_8_BIT_ROWS if capability.int8_activations == "always" else BOUND_8_BITS


def is_suspicious(kl_mean: float, bound: float) -> bool:
    """Whether a program that keeps the bound of its scheme is to keep `rounding_bound` too."""
    return SUSPICIOUS < kl_mean <= bound <= max(BOUND_8_BIT_ROWS, BOUND_8_BIT_NPU)


def rounding_bound(bound: float, alone: float) -> float:
    """The bound of a program whose predictions after a token alone have this mean KL."""
    return min(bound, max(SUSPICIOUS, ALONE_TIMES * alone))


def top1_bound(figures: Figures) -> float:
    """The top-1 agreement under which a program is useless."""
    return min(TOP1_BOUND, figures.reference_confidence)


def failure(comparison: Comparison, bound: float) -> str | None:
    """Which bound a program is over; None where it keeps all."""
    figures, decode, late = comparison.figures, comparison.decode, comparison.late
    if not figures.kl_mean <= bound:
        return f"mean KL {figures.kl_mean:.3g} is over the bound of {bound}"
    if not figures.top1_agreement >= top1_bound(figures):
        return f"top-1 agreement {figures.top1_agreement:.1%} is under the bound of {top1_bound(figures):.1%}"
    if decode and not decode.kl_mean - (decode.kl_at_once or 0.0) <= min(bound, DECODE_EXCESS):
        return (
            f"decoding one token at a time has a mean KL of {decode.kl_mean:.3g}, the same {decode.positions} positions "
            f"computed at once {decode.kl_at_once:.3g}"
        )
    if late and not late.kl_mean <= LATE_SLACK * bound:
        return f"from token {late.first_position:,} on the mean KL {late.kl_mean:.3g} is over {LATE_SLACK * bound:.3g}"
    return None
