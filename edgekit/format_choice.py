"""Which format a plan is for, and what none of its programs can express."""

from __future__ import annotations

from typing import get_args

from edgekit.capability import CAPABILITIES
from edgekit.efficiency import EFFICIENCY
from edgekit.errors import UnsupportedError
from edgekit.outline import Outline
from edgekit.plan_frame import Frame
from edgekit.quant import RECIPES, QuantScheme
from edgekit.registry import CONVERTERS
from edgekit.target import Format, Target

__all__ = ["check_format", "check_growth", "check_size", "choose_format"]


def check_format(name: str) -> None:
    """Refuse a format that is not converted to."""
    if name not in CONVERTERS:
        state = "is not converted to yet" if name in get_args(Format) else "is not known"
        raise UnsupportedError(f"format {name!r} {state}", hint=f"known: {', '.join(CONVERTERS)}")


def choose_format(
    outline: Outline, target: Target, scheme: QuantScheme | None, asked: str | None, notes: list[str]
) -> str:
    """The asked format, or the first of the target's that is converted to and can have this model and scheme.

    Raises:
        UnsupportedError: The asked one is not known, the target does not take it, or it can't have them; or none can.
    """
    if asked:
        check_format(asked)
        if asked not in target.formats:
            raise UnsupportedError(
                f"{target.id} does not take {asked} programs",
                hint=f"it takes {', '.join(target.formats)}; a profile of your own may list more (targets/README.md)",
            )
        obstacle = _obstacle(asked, outline, scheme)
        if obstacle:
            raise UnsupportedError(f"{asked} {obstacle}", hint=_instead(asked, target))
        return asked
    obstacles = {name: _obstacle(name, outline, scheme) for name in target.formats}
    chosen = next((name for name, obstacle in obstacles.items() if not obstacle), None)
    if chosen is None:
        raise UnsupportedError(f"{target.id} takes {', '.join(target.formats)}", hint=f"known: {', '.join(CONVERTERS)}")
    first = target.formats[0]
    if chosen != first:
        notes.append(f"{target.id} prefers {first}, which {obstacles[first]}: {chosen} instead")
    return chosen


def check_growth(frame: Frame, context: int) -> None:
    """Refuse queries that grow with their position where the format's programs can't let them.

    Raises:
        UnsupportedError: They do so within this context.
    """
    attention = frame.outline.config.attention if frame.outline.config else None
    if frame.capability.query_growth or attention is None or not attention.query_growth:
        return
    if context > attention.query_growth_context:
        raise UnsupportedError(
            f"{frame.format} programs can't let queries grow with their position, as this model's do past token "
            f"{attention.query_growth_context:,}",
            hint=f"use --context {attention.query_growth_context}, or --format onnx",
        )


def check_size(frame: Frame, scheme: QuantScheme, weights_bytes: int) -> None:
    """Refuse weights that are more than one program of the format can hold.

    Raises:
        UnsupportedError: They are.
    """
    most = frame.capability.most_quantized_bytes
    if most and scheme.quantized and weights_bytes > most:
        raise UnsupportedError(
            f"{frame.format} programs hold up to {most / 1e6:,.0f} MB of {scheme.name} weights, "
            f"this model has {weights_bytes / 1e6:,.0f} MB",
            hint="use --format onnx",
        )


def _instead(format: str, target: Target) -> str:
    schemes = CAPABILITIES[format].schemes or [
        name for name, scheme in RECIPES.items() if not CAPABILITIES[format].obstacle(scheme)
    ]
    others = [name for name in target.formats if name != format and name in CONVERTERS]
    return f"use --quant {', '.join(schemes)}" + (f", or --format {others[0]}" if others else "")


def _obstacle(format: str, outline: Outline, scheme: QuantScheme | None) -> str:
    """Why a format can't have this model with this scheme (None: one is still to be chosen); empty where it can."""
    if format not in CONVERTERS:
        return "is not converted to yet"
    capability, anatomy = CAPABILITIES[format], outline.anatomy
    # Not the names alone: a recipe file may be called int8.toml and ask for something else. Row-scaled ones are of a plan.
    if (
        scheme and capability.schemes and not scheme.row_scaled
        and scheme not in [RECIPES[name] for name in capability.schemes]
    ):  # fmt: skip
        which = "the recipe file " * (scheme.name in capability.schemes) + scheme.name
        return f"is not written with {which} but {', '.join(capability.schemes)}"
    other = {layer.kind for layer in anatomy.caches} - {"full", "sliding"}
    if EFFICIENCY[format].unit == "npu" and (
        other or any(weight.kind == "experts" for weight in anatomy.weights.values())
    ):
        return "has neither experts nor recurrent or latent layers"
    obstacle = capability.obstacle(scheme) if scheme else ""
    return f"{obstacle}, as {scheme.name} asks for" if scheme and obstacle else ""
