"""edgekit serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from edgekit.cli.options import finite, format_option, threads_option
from edgekit.registry import SERVER, SERVER_SETTINGS, load_attribute

__all__ = ["command"]

_F = TypeVar("_F", bound=Callable[..., Any])


def _shown(*names: str, **settings: Any) -> Callable[[_F], _F]:
    """An option whose help shows its default."""
    return click.option(*names, show_default=True, **settings)


def _key(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("give a key of at least one character.")
    return value


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@format_option
@_shown("--host", default="127.0.0.1", help="The address to listen on.")
@_shown("--port", type=click.IntRange(0, 65535), default=8080, help="0 takes a free one; the URL is printed.")
@click.option(
    "--api-key",
    envvar="EDGEKIT_API_KEY",
    show_envvar=True,
    callback=_key,
    help="What clients must send as bearer token.",
)
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name by which clients reach the server.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page that may call it: scheme://host:port.",
)
@_shown("--slots", type=click.IntRange(1, 256), default=4, help="Requests that generate at a time, in turns.")
@_shown("--max-queue", type=click.IntRange(0), default=64, help="Requests that may be open beyond those.")
@_shown(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    callback=finite,
    help="Seconds for a request, waiting included.",
)
@_shown("--max-body", "max_body_bytes", type=click.IntRange(1), default=1_000_000, help="Bytes of a request.")
@_shown(
    "--max-reply",
    "max_reply_bytes",
    type=click.IntRange(1),
    default=64_000_000,
    help="Bytes kept of replies that are not streamed.",
)
@_shown(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=10.0,
    callback=finite,
    help="Seconds for running requests when the server is stopped.",
)
@_shown("--temperature", type=click.FloatRange(0, 2), default=0.0, callback=finite, help="Of requests that name none.")
@click.option(
    "--session-cache-bytes",
    type=click.IntRange(0),
    help="Memory of each model for caches, where closed ones are kept; by default one whole context.",
)
@threads_option
def command(
    bundles: tuple[Path, ...],
    format_: str | None,
    host: str,
    port: int,
    session_cache_bytes: int | None,
    threads: int | None,
    **settings: Any,
) -> None:
    """Serve the models in BUNDLE... to OpenAI's clients.

    Prints the base URL to stdout once it listens. Ends on Ctrl-C or SIGTERM: running requests get some seconds to finish.
    """

    def on_ready(url: str, models: Sequence[str], loopback: bool) -> None:
        if not loopback and settings["api_key"] is None:
            click.echo("warning: others on the network can use this server: give it an --api-key", err=True)
        click.echo(f"serving {', '.join(models)}", err=True)
        click.echo(f"{url}/v1")

    load_attribute(SERVER)(
        bundles,
        load_attribute(SERVER_SETTINGS)(**settings),
        host=host,
        port=port,
        format=format_,
        threads=threads,
        session_cache_bytes=session_cache_bytes,
        on_ready=on_ready,
    )
