"""edgekit serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edgekit.cli.options import finite, threads_option
from edgekit.registry import SERVER, SERVER_SETTINGS, load_attribute

__all__ = ["command"]


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one and prints it."
)
@click.option("--api-key", envvar="EDGEKIT_API_KEY", show_envvar=True, help="What clients must send as bearer token.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name by which clients reach this server.")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="A web page that may call it, as scheme://host:port."
)
@click.option(
    "--slots", type=click.IntRange(1, 256), default=4, show_default=True, help="Requests that generate in turns."
)
@click.option(
    "--max-queue", type=click.IntRange(0), default=64, show_default=True, help="More requests that may be open."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    callback=finite,
    help="Seconds for a request.",
)
@click.option("--max-body", type=click.IntRange(1), default=4_000_000, show_default=True, help="Bytes of a request.")
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    callback=finite,
    help="Seconds for running requests at the end.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    callback=finite,
    help="Of requests that name none.",
)
@click.option(
    "--session-cache-bytes",
    type=click.IntRange(0),
    help="Memory of each model for caches, where closed ones are kept; by default one whole context.",
)
@threads_option
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    slots: int,
    max_queue: int,
    timeout: float,
    max_body: int,
    grace: float,
    temperature: float,
    session_cache_bytes: int | None,
    threads: int | None,
) -> None:
    """Serve the models in BUNDLE... to OpenAI's clients.

    Prints the base URL to stdout once it listens. Ends on Ctrl-C or SIGTERM: running requests get some seconds to finish.
    """
    if api_key is not None and not api_key.strip():
        raise click.BadParameter("give a key of at least one character.", param_hint="--api-key")
    settings = load_attribute(SERVER_SETTINGS)(
        api_key=api_key,
        slots=slots,
        max_queue=max_queue,
        timeout_s=timeout,
        max_body_bytes=max_body,
        grace_s=grace,
        hosts=tuple(name.lower() for name in allow_host),
        origins=allow_origin,
        temperature=temperature,
    )

    def on_ready(url: str, models: Sequence[str], loopback: bool) -> None:
        if not loopback and api_key is None:
            click.echo("warning: others on the network can use this server: give it an --api-key", err=True)
        click.echo(f"serving {', '.join(models)}", err=True)
        click.echo(f"{url}/v1")

    load_attribute(SERVER)(
        bundles,
        settings,
        host=host,
        port=port,
        threads=threads,
        session_cache_bytes=session_cache_bytes,
        on_ready=on_ready,
    )
