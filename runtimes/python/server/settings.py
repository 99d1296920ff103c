"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and doors of a server. Times are in seconds, sizes in bytes.

    Attributes:
        api_key: What clients must send; None lets everybody in who reaches the socket.
        slots: Requests that generate at a time, in turns.
        max_queue: Requests that may be open beyond those: waiting, being received, or being read slowly.
        timeout_s: Longest life of a request, from its whole body to its last token.
        max_body_bytes: Of one request.
        body_timeout_s: To receive a body.
        max_reply_bytes: Of what is kept of a request's replies up to their end, about: text, and log-probabilities above all.
            Streams keep nothing but those of `/v1/responses`, whose last event repeats all.
        buffer_bytes: Of a reply that its client has not read yet; a fuller one waits for its client.
        stall_s: A connection that takes nothing for this long is closed; so is one that sends half a request head.
        grace_s: For running requests when the server is told to stop.
        hosts: Names that the Host header may have, besides addresses and localhost.
        origins: Web pages that may call the server from a browser, such as "http://localhost:3000".
        temperature: Of requests that name none.
    """

    api_key: str | None = field(default=None, repr=False)
    slots: int = 4
    max_queue: int = 64
    timeout_s: float = 600.0
    max_body_bytes: int = 1_000_000
    body_timeout_s: float = 30.0
    max_reply_bytes: int = 64_000_000
    buffer_bytes: int = 1_000_000
    stall_s: float = 30.0
    grace_s: float = 10.0
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    temperature: float = 0.0

    @property
    def places(self) -> int:
        """Requests that may be open at a time."""
        return self.slots + self.max_queue
