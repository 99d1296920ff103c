"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from edgekit.errors import EdgeKitError

from .json_text import to_json

__all__ = ["ApiError", "from_edgekit"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: What is wrong and, where it helps, what to do.
        code: A word for programs, such as "unsupported_parameter".
        param: The parameter that is wrong, such as "messages[0].content".
        headers: More of them, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The error's JSON object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        return Response(to_json(self.body()), self.status, self.headers, "application/json")


def from_edgekit(error: EdgeKitError, *, status: int = 400) -> ApiError:
    """A request that the model can't serve (400), or a reply that failed on its way (500)."""
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    return ApiError(status, message, code="invalid_prompt" if status < 500 else "generation_failed")
