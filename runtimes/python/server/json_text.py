"""JSON as bytes."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["to_json"]


def to_json(value: Any) -> bytes:
    """Compact UTF-8. A lone surrogate, which a model may write as an escape, stays an escape."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
