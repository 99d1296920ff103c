"""edgekit chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgekit.cli.generation_options import GroupedCommand, generation_options
from edgekit.cli.options import format_option, provider_note, provider_option
from edgekit.errors import GenerationError
from edgekit.session import Message, Session, Stats

__all__ = ["command"]

_HELP = "A line is a message. /new forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends a reply."


@click.command("chat", cls=GroupedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@format_option
@generation_options
@provider_option
def command(bundle: Path, format_: str | None, provider: str | None, threads: int | None, **options: Any) -> None:
    """Talk with the model in BUNDLE. The conversation stays in the cache: each turn computes only what is new."""
    from edgekit.loading import load

    with load(bundle, format=format_, provider=provider, threads=threads) as model:
        provider_note(model)
        if not model.has_chat_template:
            raise GenerationError("this model has no chat template", hint="use `edgekit run` with a plain text")
        click.echo(_HELP, err=True)
        session, messages = model.session(), list[Message]()
        while (line := _ask()) is not None:
            if line == "/quit":
                return
            if line == "/new":
                messages.clear()
            elif line:
                _turn(session, messages, line, options)


def _ask() -> str | None:
    """The next line, or None at the end of the input."""
    click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _turn(session: Session, messages: list[Message], line: str, options: dict[str, Any]) -> None:
    messages.append({"role": "user", "content": line})
    text = ""
    try:
        for chunk in session.stream(messages, **options):
            text += chunk.text
            click.echo(chunk.reasoning, nl=False, err=True)
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
            if chunk.stats:
                _tell_what_was_dropped(chunk.stats)
    except KeyboardInterrupt:
        click.echo(" [cancelled]", err=True)
    except GenerationError as error:  # too long for the context: the conversation goes on without this message
        messages.pop()
        click.echo(f"error: {error.message}\nhint: /new starts again", err=True)
        return
    click.echo()
    messages.append({"role": "assistant", "content": text})


def _tell_what_was_dropped(stats: Stats) -> None:
    if stats.dropped_messages:
        click.echo(f"\nnote: the {len(stats.dropped_messages)} oldest messages no longer fit the context", err=True)
    if stats.dropped_tokens:
        click.echo(f"\nnote: the {stats.dropped_tokens} oldest tokens have left the model's window", err=True)
