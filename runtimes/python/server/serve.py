"""Loading bundles and listening, until a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from edgekit.bundle import MANIFEST
from edgekit.errors import BundleError, EdgeKitError
from edgekit.loading import load

from .access import is_loopback
from .app import Service
from .connection import connection_class
from .models import ServedModel
from .settings import Settings

__all__ = ["Server", "listen", "load_models", "serve"]

BACKLOG = 128
KEEP_ALIVE_S = 15
LAST_SECONDS = 5  # for what is left to be sent when the grace is over


def serve(
    bundles: Sequence[Path],
    settings: Settings,
    *,
    host: str,
    port: int,
    format: str | None,
    threads: int | None,
    session_cache_bytes: int | None,
    on_ready: Callable[[str, Sequence[str], bool], None],
) -> None:
    """Serve bundles until SIGINT, which raises KeyboardInterrupt, or SIGTERM, which returns.

    Args:
        format: The program of each bundle; None takes its first.
        threads: For each operator; None leaves it to the runtime.
        session_cache_bytes: For each model; see `edgekit.load`.
        on_ready: Told the base URL, the models' names, and whether only this machine reaches it, once the socket listens.

    Raises:
        BundleError: A bundle can't be loaded, or two have one name.
        EdgeKitError: The address can't be listened on.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        models = load_models(bundles, stack, format=format, threads=threads, session_cache_bytes=session_cache_bytes)
        service = Service(models, settings)
        stack.callback(service.close)
        stack.enter_context(_quiet_end())
        on_ready(base_url(listener), list(models), is_loopback(listener.getsockname()[0]))
        Server(service, settings).run(sockets=[listener])


def load_models(
    bundles: Sequence[Path],
    stack: ExitStack,
    *,
    format: str | None,
    threads: int | None,
    session_cache_bytes: int | None,
) -> dict[str, ServedModel]:
    """Load bundles under the names of their directories, without `.edgekit`; `stack` closes them.

    Raises:
        BundleError: A bundle can't be loaded, or two have one name.
    """
    models = dict[str, ServedModel]()
    for bundle in bundles:
        name = bundle.resolve().name.removesuffix(".edgekit")
        if name in models:
            raise BundleError(f"two bundles are called {name}", hint="rename one: clients choose a model by this name")
        model = stack.enter_context(
            load(bundle, format=format, threads=threads, session_cache_bytes=session_cache_bytes)
        )
        models[name] = ServedModel(name, model, int((bundle / MANIFEST).stat().st_mtime))
    return models


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        EdgeKitError: The address is taken, or none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EdgeKitError(
            f"{host} port {port} can't be listened on: {reason}", hint="choose another --port or --host"
        ) from error


def base_url(listener: socket.socket) -> str:
    """What clients take as base URL, without `/v1`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which lets running requests finish when it is told to stop.

    `run(sockets=[...])` returns when it has stopped; `should_exit = True` stops it.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                http=connection_class(settings.stall_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.grace_s) + LAST_SECONDS,
            )
        )
        self._service = service
        self._grace_s = settings.grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, finish what runs, within the grace; a second Ctrl-C does not wait."""
        draining = asyncio.create_task(self._service.drain(self._grace_s))
        await super().shutdown(sockets)
        if self.force_exit:
            draining.cancel()
        else:
            await draining


@contextmanager
def _quiet_end() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more: here SIGTERM is a way to end, not to die."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
