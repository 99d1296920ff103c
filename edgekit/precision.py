"""What a plan leaves in high precision, and why: for the manifest and for `edgekit inspect`."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.capability import CAPABILITIES
from edgekit.plan import Plan
from edgekit.weight_plan import WeightPlan

__all__ = ["kept_in_floats"]


def kept_in_floats(plan: Plan) -> Mapping[str, str]:
    """Classes of weights and kinds of values that a quantized program keeps in floats, each with the reason."""
    if not plan.scheme.quantized:
        return {}
    kept = dict[str, str]()
    for name, weight in plan.weights.items():
        if not weight.form_is_blocks:
            kept.setdefault(name.rpartition(".")[2], _reason(weight, plan))
    capability = CAPABILITIES[plan.format]
    if capability.quantized_activations:
        return kept
    if not plan.accuracy_level:
        why = (
            "this format multiplies floats" if capability.int8_activations == "never" else "no fast int8 products there"
        )
        kept["activations"] = why
    if plan.cache.element_bytes > 1:
        kept["keys and values"] = (
            f"{plan.cache.value}, the best that fits" if len(capability.caches) > 1 else plan.cache.value
        )
    return kept


def _reason(weight: WeightPlan, plan: Plan) -> str:
    if len(weight.shape) == 1:
        return "a vector: few bytes, and all that follows depends on each"
    if any(form.is_float for form in plan.scheme.forms):
        return f"{plan.quant} has it so"
    return f"rows of {weight.shape[1]} are no whole blocks"
