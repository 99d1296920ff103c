"""What rules look at, and what they find."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from edgekit.config import RopeConfig
from edgekit.outline import Outline
from edgekit.plan import Plan
from edgekit.target import Npu, Target

__all__ = ["NPU_FORMATS", "Finding", "Severity", "Subject"]

Severity: TypeAlias = Literal["error", "warning"]
NPU_FORMATS = frozenset({"onnx-qdq", "coreml", "coreai"})


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found: one line that says what is wrong, and one that says what to do."""

    rule: str
    severity: Severity
    message: str
    hint: str

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Subject:
    """All that a rule may look at."""

    outline: Outline
    target: Target
    plan: Plan

    @property
    def npu(self) -> Npu | None:
        """The NPU that the program is made for."""
        npu = self.target.npu
        if self.plan.format not in NPU_FORMATS or (self.plan.format == "onnx-qdq" and npu and not npu.provider):
            return None
        return npu

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether the program's cache has a size once and for all; Core AI's caches grow, which its compiler sees to."""
        return self.plan.format != "coreai"

    @property
    def npu_name(self) -> str:
        """For messages."""
        kind = self.npu.kind if self.npu else ""
        return {"hexagon": "the Hexagon NPU", "neural-engine": "the Neural Engine"}.get(kind, f"the NPU ({kind})")

    @property
    def npu_severity(self) -> Severity:
        """An error where nothing else runs the program, a warning where the system runs it on other units by itself."""
        return "error" if self.plan.format == "onnx-qdq" else "warning"

    @property
    def rope(self) -> RopeConfig | None:
        """The rotation that reaches farthest back: of the layers with full attention, if there are such."""
        layers = sorted(self.outline.config.layers, key=lambda layer: layer.window) if self.outline.config else []
        return next((layer.rope for layer in layers if layer.rope), None)
