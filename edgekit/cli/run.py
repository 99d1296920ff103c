"""edgekit run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgekit.cli.options import generation_options, json_option, print_json

__all__ = ["command"]


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--format", "format_", metavar="F", help="The program to run; by default the bundle's first.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@generation_options
@json_option
def command(bundle: Path, prompt: str, format_: str | None, threads: int | None, as_json: bool, **options: Any) -> None:
    """Answer one PROMPT with the model in BUNDLE. A prompt of - is read from stdin."""
    from edgekit.loading import load

    if prompt == "-":
        prompt = sys.stdin.read()
    with load(bundle, format=format_, threads=threads) as model:
        if not model.has_chat_template and not options["raw"]:
            click.echo("note: this is a base model without a chat template; the prompt is sent raw", err=True)
        if as_json:
            reply = model.generate(prompt, **options)
            stats = asdict(reply.stats)
            print_json(
                {"text": reply.text, "tokens": reply.tokens, "finish_reason": reply.finish_reason, "stats": stats}
            )
            return
        for chunk in model.stream(prompt, **options):
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
        click.echo()
        if chunk.finish_reason == "length":
            click.echo(f"note: ended after {chunk.stats.new_tokens if chunk.stats else 0} tokens", err=True)
