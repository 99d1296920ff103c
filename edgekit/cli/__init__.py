"""The command line: one module per command, imported only when it is called, and one boundary where errors become text."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Sequence

import click

from edgekit.errors import EdgeKitError
from edgekit.quiet import is_verbose, verbosity_kept, verbosity_raised

__all__ = ["main"]

INTERRUPTED = 130
# Command -> the line that --help shows. A command's module is only imported to run it: --help stays quick.
COMMANDS = {
    "convert": "Convert a model to a verified bundle for one device.",
    "plan": "Say whether a model fits a device and how fast it will be, before anything is fetched or converted.",
    "run": "Answer one prompt.",
    "chat": "Talk with a model.",
    "serve": "Serve models to OpenAI's clients.",
    "verify": "Run a bundle's programs and compare them with the full-precision reference.",
    "profile": "Measure speed and memory of a bundle's program, or compare two measurements.",
    "inspect": "Show what a bundle or a checkpoint holds.",
    "targets": "List the devices, or explain one.",
    "doctor": "Show what this machine is and what is installed, or measure it.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = copy.copy(importlib.import_module(f"edgekit.cli.{cmd_name}").command)
        command.params = [*command.params, _verbose_option()]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}, expected one of {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


def _raise_verbosity(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        verbosity_raised()


def _verbose_option() -> click.Option:
    """Of every command, and of the group."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_raise_verbosity,
        help="Show what the libraries at work print and warn of, and tracebacks.",
    )


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, params=[_verbose_option()])
@click.version_option(package_name="edgekit-toolkit", prog_name="edgekit")
def _edgekit() -> None:
    """Deploy language models to phones, Raspberry Pi boards and Copilot+ PCs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 1 an EdgeKit error, 2 wrong usage, 130 interrupted."""
    streams = ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace"))
    for stream, errors in streams:
        if hasattr(stream, "reconfigure"):  # a Windows console's own encoding can't show every model's text
            stream.reconfigure(encoding="utf-8", errors=errors)
    with verbosity_kept():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        code = _edgekit.main(arguments, prog_name="edgekit", standalone_mode=False, obj=arguments)
    except EdgeKitError as error:
        if is_verbose():
            import traceback

            traceback.print_exception(error)
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except OSError as error:  # a file that can't be read or written, where nothing nearer knew what it was for
        click.echo(f"error: {error.strerror or error}: {error.filename or 'a file'}", err=True)
        click.echo("hint: check the path, its permissions and the free space", err=True)
        return 1
    return code if isinstance(code, int) else 0
