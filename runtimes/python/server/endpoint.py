"""What one of OpenAI's endpoints must bring; serving it is the same for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from .api_error import ApiError
from .json_text import to_json
from .models import Piece, ServedModel, Work
from .schemas import Request
from .usage import Usage

__all__ = ["Answer", "Endpoint", "frame"]


class Answer(Protocol):
    """Builds the response to one request from its pieces, streamed or whole.

    `keeps` says that what the pieces bring is kept up to the end.
    """

    usage: Usage
    keeps: bool

    def begin(self) -> Iterable[bytes]:
        """The first frames of a stream."""
        ...

    def add(self, piece: Piece) -> Iterable[bytes]:
        """Take a piece; its frames."""
        ...

    def end(self) -> Iterable[bytes]:
        """The last frames, after all pieces."""
        ...

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """The last frames of a stream that fails on its way."""
        ...

    def whole(self) -> dict[str, Any]:
        """The response of a request that is not streamed, after all pieces."""
        ...


class Endpoint(Protocol):
    """One of OpenAI's endpoints.

    `unsupported` are OpenAI's parameters that EdgeKit lacks, and what to do instead.
    """

    path: ClassVar[str]
    schema: ClassVar[type[Request]]
    unsupported: ClassVar[Mapping[str, str]]

    @staticmethod
    def work(request: Any, model: ServedModel, temperature: float) -> Work:
        """What the request asks of the model."""
        ...

    @staticmethod
    def answer(request: Any, work: Work) -> Answer:
        """An answer to fill."""
        ...


def frame(data: dict[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + to_json(data) + b"\n\n"
