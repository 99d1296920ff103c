"""The options of GenerateOptions on the command line, in groups."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgekit.cli.options import finite, threads_option
from edgekit.session import MAX_ALTERNATIVES, POLICIES
from edgekit.structure import Choice, JsonSchema, Lark, Regex, Structure

__all__ = ["GroupedCommand", "generation_options", "logprobs_option"]

_F = TypeVar("_F", bound=Callable[..., Any])
_READABLE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Option(click.Option):
    """An option with a place in --help."""

    def __init__(self, *arguments: Any, group: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help has a section for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; options of no group come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for name in sorted(groups, key=lambda name: name == "Options"):
            with formatter.section(name):
                formatter.write_dl(groups[name])


def _not_empty(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value):
        raise click.BadParameter("give a text of at least one character.")
    return value


def _text_of(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} can't be read as UTF-8 text.", param_hint=option) from error


def _schema_of(path: Path) -> JsonSchema:
    try:
        schema = json.loads(_text_of(path, "--json-schema"))
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is not JSON: {error}.", param_hint="--json-schema") from error
    if not isinstance(schema, dict):
        raise click.BadParameter(f"{path} is not a JSON object.", param_hint="--json-schema")
    return JsonSchema(schema)


def _structure(
    json_schema: Path | None, regex: str | None, choice: tuple[str, ...], grammar: Path | None
) -> Structure | None:
    if sum(map(bool, (json_schema, regex is not None, choice, grammar))) > 1:
        raise click.UsageError("give only one of --json-schema, --regex, --choice and --grammar.")
    if json_schema:
        return _schema_of(json_schema)
    if regex is not None:
        return Regex(regex)
    if choice:
        return Choice(choice)
    return Lark(_text_of(grammar, "--grammar")) if grammar else None


_option = functools.partial(click.option, cls=_Option)
_length = functools.partial(_option, group="Length")
_sampling = functools.partial(_option, group="Sampling")
_shape = functools.partial(_option, group="Structure")


def _share(name: str, default: float, help_text: str, *, above_zero: bool = True) -> Callable[[_F], _F]:
    """An option from 0 to 1."""
    kind = click.FloatRange(0, 1, min_open=above_zero)
    return _sampling(name, type=kind, default=default, callback=finite, help=help_text)


def _penalty(name: str, help_text: str) -> Callable[[_F], _F]:
    return _sampling(name, type=float, default=0.0, callback=finite, metavar="NUMBER", help=help_text)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    _length("--max-tokens", type=click.IntRange(1), help="End after this many tokens."),
    _length("--min-tokens", type=click.IntRange(0), default=0, help="Do not end before this many tokens."),
    _length("--stop", multiple=True, callback=_not_empty, metavar="TEXT", help="End at this text; may be repeated."),
    _length(
        "--context-policy",
        type=click.Choice(POLICIES),
        default=POLICIES[0],
        help="What to do when the context is full: refuse (default), leave out the oldest turns, or slide, where the model "
        "was trained for it.",
    ),
    _sampling(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        callback=finite,
        help="0 (default) takes the best token.",
    ),
    _sampling("--top-k", type=click.IntRange(0), default=0, help="Sample from the k best tokens; 0: all."),
    _share("--top-p", 1.0, "Sample from this mass."),
    _share("--min-p", 0.0, "Drop tokens below this part of the best.", above_zero=False),
    _share("--typical-p", 1.0, "Sample from this mass of the tokens nearest to the expected information."),
    _sampling(
        "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, callback=finite, help="1 is off."
    ),
    _penalty("--presence-penalty", "Lower the logits of tokens that the reply has; 0 is off."),
    _penalty("--frequency-penalty", "The same for each time that it has them; 0 is off."),
    _sampling("--seed", type=click.IntRange(0), help="Make sampling repeatable."),
    _shape("--json-schema", type=_READABLE, metavar="FILE", help="Reply with JSON that this schema admits."),
    _shape("--regex", metavar="PATTERN", help="Reply with a text that matches, in Rust's syntax."),
    _shape("--choice", multiple=True, callback=_not_empty, metavar="TEXT", help="Reply with one of these; repeat it."),
    _shape("--grammar", type=_READABLE, metavar="FILE", help="Reply with a text of this Lark grammar."),
    click.option("--system", metavar="TEXT", help="A system message."),
    click.option(
        "--no-speculate",
        "speculate",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Compute one token at a time, and draft none.",
    ),
    threads_option,
)
logprobs_option = _sampling(
    "--logprobs",
    type=click.IntRange(0, MAX_ALTERNATIVES),
    metavar="N",
    help="With --json: the log-probability of each token, and of N alternatives.",
)


def generation_options(function: _F) -> _F:
    """The options of GenerateOptions, under their names there, and --threads."""

    @functools.wraps(function)
    def called(
        *arguments: Any,
        json_schema: Path | None,
        regex: str | None,
        choice: tuple[str, ...],
        grammar: Path | None,
        **options: Any,
    ) -> Any:
        return function(*arguments, structure=_structure(json_schema, regex, choice, grammar), **options)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called  # type: ignore[return-value]  # as click's own decorators
