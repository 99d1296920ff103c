"""edgekit plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from edgekit.alternatives import Limits, Request, plans_within, rank, what_would_fit
from edgekit.cli.options import SizeType, finite, json_option, print_json
from edgekit.cli.plan_text import model_text, plan_text, ranking_text
from edgekit.lint import Finding, lint
from edgekit.outline import Outline, UnknownModel, open_outline
from edgekit.plan import Plan
from edgekit.quant import CacheFormat
from edgekit.target import Target, list_targets, load_target

__all__ = ["command"]

ALL = "all"


@click.command("plan")
@click.argument("source")
@click.option(
    "--target", required=True, metavar="ID", help="The device: an id from `edgekit targets`, a profile file, or `all`."
)
@click.option(
    "--format", "format_", metavar="F", help="By default the first that the target prefers and is converted to."
)
@click.option("--quant", default="auto", metavar="SCHEME", help="As for convert.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens; by default at most 4,096, and what fits.")
@click.option(
    "--cache",
    type=click.Choice([kind.value for kind in CacheFormat]),
    help="How keys and values are kept; by default the best that fits.",
)
@click.option("--max-ram", type=SizeType(), metavar="SIZE", help="List what takes at most so much memory, such as 2GB.")
@click.option(
    "--min-speed", type=click.FloatRange(0, 1e6), callback=lambda c, p, v: v and finite(c, p, v), metavar="N",
    help="List what decodes N tokens a second.",
)  # fmt: skip
@json_option
def command(
    source: str,
    target: str,
    format_: str | None,
    quant: str,
    context: int | None,
    cache: str | None,
    max_ram: int | None,
    min_speed: float | None,
    as_json: bool,
) -> None:
    """Say whether SOURCE fits a device and how fast it will be there.

    SOURCE is as for convert, but a config.json is enough: no weight is read, and of a hub id only the config is fetched.
    With --max-ram or --min-speed it lists the schemes and the longest contexts that keep to them.
    """
    targets = list_targets() if target == ALL else (load_target(target),)
    request = Request(quant, context, format_, CacheFormat(cache) if cache else None)
    request.check()
    outline = open_outline(source)
    if isinstance(outline, UnknownModel):
        _show(_unknown_values(outline, target), f"{outline.name}: unknown, since {outline.reason}", as_json)
        return
    limits = Limits(max_ram, min_speed)
    if limits != Limits():
        values, text = _within(outline, request, targets, limits)
    elif target == ALL:
        values, text = _ranking(outline, request, targets)
    else:
        values, text = _single(outline, request, targets[0])
    _show({"model": _model_values(outline), **values}, f"{model_text(outline)}\n{text}", as_json)


def _show(values: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        click.echo(text)


def _model_values(outline: Outline) -> dict[str, Any]:
    anatomy = outline.anatomy
    return {
        "name": outline.name,
        "model_type": anatomy.model_type,
        "parameters": anatomy.parameters,
        "active_parameters": anatomy.active_parameters,
        "parameters_by_kind": anatomy.parameters_by_kind(),
        "trained_context": anatomy.context,
        "converted": not outline.obstacle,
    }


def _unknown_values(model: UnknownModel, target: str) -> dict[str, Any]:
    unknown = dict.fromkeys(("format", "quant", "context", "cache", "memory", "speed"))
    return {"model": {"name": model.name}, "target": target, "fits": "unknown", **unknown, "notes": [model.reason]}


def _values(plan: Plan, findings: Iterable[Finding]) -> dict[str, Any]:
    return {"target": plan.target, **plan.to_json(), "findings": [finding.to_json() for finding in findings]}


def _single(outline: Outline, request: Request, target: Target) -> tuple[dict[str, Any], str]:
    plan = request.plan(outline, target)
    findings = lint(outline, target, plan)
    values, text = _values(plan, findings), plan_text(plan, findings)
    if plan.fits == "no":
        would_fit = what_would_fit(outline, target, plan)
        values["would_fit"] = would_fit.to_json()
        text += f"\n  would fit   {would_fit.hint()}"
    return values, text


def _ranking(outline: Outline, request: Request, targets: tuple[Target, ...]) -> tuple[dict[str, Any], str]:
    plans = rank(request.plan(outline, target) for target in targets)
    return {"plans": _each(outline, targets, plans)}, ranking_text(plans)


def _each(outline: Outline, targets: tuple[Target, ...], plans: list[Plan]) -> list[dict[str, Any]]:
    by_id = {target.id: target for target in targets}
    return [_values(plan, lint(outline, by_id[plan.target], plan)) for plan in plans]


def _within(
    outline: Outline, request: Request, targets: tuple[Target, ...], limits: Limits
) -> tuple[dict[str, Any], str]:
    """For one device all schemes that keep to the limits, for several the finest one on each."""
    found = [plans_within(outline, target, request, limits) for target in targets]
    plans = found[0] if len(targets) == 1 else rank(plans[0] for plans in found if plans)
    values = {"limits": asdict(limits), "plans": _each(outline, targets, plans)}
    return values, ranking_text(plans) if plans else "nothing keeps to these limits"
