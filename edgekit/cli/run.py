"""edgekit run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgekit.cli.generation_options import GroupedCommand, generation_options, logprobs_option
from edgekit.cli.options import format_option, json_option, print_json, provider_note, provider_option
from edgekit.cli.rehearsal import rehearse_command, rehearse_option
from edgekit.session import Reply

__all__ = ["command"]


@click.command("run", cls=GroupedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@format_option
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@generation_options
@logprobs_option
@provider_option
@rehearse_option
@json_option
def command(
    bundle: Path,
    prompt: str,
    format_: str | None,
    provider: str | None,
    rehearse: str | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> int | None:
    """Answer one PROMPT with the model in BUNDLE. A prompt of - is read from stdin."""
    from edgekit.loading import load

    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json.")
    if rehearse:
        return rehearse_command(bundle, rehearse, as_json=as_json, format=format_, provider=provider, threads=threads)
    if prompt == "-":
        prompt = sys.stdin.read()
    with load(bundle, format=format_, provider=provider, threads=threads, session_cache_bytes=0) as model:
        if not model.has_chat_template and not options["raw"]:
            click.echo("note: this is a base model without a chat template; the prompt is sent raw", err=True)
        provider_note(model)
        if as_json:
            print_json(_as_json(model.generate(prompt, **options)) | {"provider": model.provider.to_json()})
            return None
        for chunk in model.stream(prompt, **options):
            click.echo(chunk.reasoning, nl=False, err=True)
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
        click.echo()
        if chunk.stats and chunk.finish_reason == "length":
            click.echo(f"note: ended after {chunk.stats.new_tokens} tokens", err=True)
    return None


def _as_json(reply: Reply) -> dict[str, Any]:
    """What every reply has, and what this one has besides."""
    more = {"reasoning": reply.reasoning, "logprobs": [asdict(logprob) for logprob in reply.logprobs]}
    return {
        "text": reply.text,
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        **{name: value for name, value in more.items() if value},
        "stats": asdict(reply.stats),
    }
