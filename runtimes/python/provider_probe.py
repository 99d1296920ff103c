"""The process that tries a provider out: it may crash. It says which device runs the program, or what is wrong."""

from __future__ import annotations

from typing import Any

from edgekit.bundle import GOLDENS, Bundle, Program, open_bundle
from edgekit.child import answer
from edgekit.errors import EdgeKitError
from edgekit.goldens import MARGIN_TOLERANCE, greedy_tokens, read_goldens

from .engine import LoadedModel, load_model
from .provider_choice import ProviderChoice
from .providers import PROVIDERS, find_devices

__all__ = ["probe"]

CHECKED_TOKENS = 8  # each is an argmax over the vocabulary: a kernel that is wrong does not get one right by chance


def probe(*, bundle: str, format: str, provider: str, any_device: bool) -> dict[str, Any]:
    """Load the program on a provider and compare its first tokens with the goldens.

    Args:
        any_device: Also one that the provider is not worth choosing for, such as an emulator.

    Returns:
        The device's kind and an empty `problem`, or the problem.
    """
    opened = open_bundle(bundle, check_hashes=False)
    program = opened.program(format)
    try:
        devices = find_devices(provider)
        worth = PROVIDERS[provider].devices
        usable = [kind for kind in (*worth, "gpu", "cpu") if kind in devices and (any_device or kind in worth)]
        if not usable:
            return {"device": "", "problem": f"it has no {' or '.join(worth)} here"}
        with load_model(opened, program, choice=ProviderChoice(provider, usable[0], "tried out")) as model:
            problem = _wrong_tokens(model, opened, program)
    except EdgeKitError as error:
        return {"device": "", "problem": error.message}
    return {"device": usable[0], "problem": problem}


def _wrong_tokens(model: LoadedModel, bundle: Bundle, program: Program) -> str:
    """What is wrong with the first tokens; nothing where the bundle was converted without verification."""
    if not (bundle.directory / GOLDENS).is_file():
        return ""
    goldens, format = read_goldens(bundle, program), program.graph.format
    text, expected, margins = goldens.texts[0], goldens.greedy[format][0], goldens.margins[format][0]
    found, _ = greedy_tokens(model, list(text.tokens[: text.start]), min(CHECKED_TOKENS, len(expected)))
    for step, (token, wanted, margin) in enumerate(zip(found, expected, margins, strict=False)):
        if token != wanted:
            close = margin <= MARGIN_TOLERANCE  # other kernels may order a near tie otherwise; later tokens then follow
            return "" if close else f"its results are wrong: token {step + 1} is {token}, expected {wanted}"
    return ""


if __name__ == "__main__":
    answer(probe)
