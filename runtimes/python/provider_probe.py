"""The process that tries a provider out: it may crash. It says which device runs the program, or what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.bundle import GOLDENS, Bundle, Program, open_bundle
from edgekit.child import answer
from edgekit.errors import EdgeKitError
from edgekit.goldens import GREEDY_TOKENS, MARGIN_TOLERANCE, read_goldens

from .engine import LoadedModel, load_model
from .provider_choice import ProviderChoice
from .providers import PROVIDERS, find_devices

__all__ = ["probe"]

CHECKED_TOKENS = 4  # each is an argmax over the vocabulary: a kernel that is wrong does not get one right by chance


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
    """What is wrong with the first tokens; nothing where the bundle was converted without verification.

    The golden tokens are fed whatever was computed, so that a near tie, which kernels may order otherwise, excuses only itself.
    """
    if not (bundle.directory / GOLDENS).is_file():
        return ""
    goldens, format = read_goldens(bundle, program), program.graph.format
    text, expected, margins = goldens.texts[0], goldens.greedy[format][0], goldens.margins[format][0]
    decoder, tokens, checked = model.backend.decoder(), list(text.tokens[: text.start]), 0
    rope_length = len(tokens) + min(GREEDY_TOKENS, model.context - len(tokens))  # as when they were written
    for step, (wanted, margin) in enumerate(zip(expected, margins, strict=True)):
        logits = decoder.forward(np.asarray(tokens, np.int64), rows=1, rope_length=rope_length)[0]
        if not np.isfinite(logits).all():
            return "it computes values that are not finite numbers"
        found, tokens = int(logits.argmax()), [wanted]
        if margin > MARGIN_TOLERANCE and found != wanted:
            return f"its results are wrong: token {step + 1} is {found}, expected {wanted}"
        checked += margin > MARGIN_TOLERANCE
        if checked == CHECKED_TOKENS:
            break
    return ""


if __name__ == "__main__":
    answer(probe)
