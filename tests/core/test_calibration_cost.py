"""The forecast of calibration's cost: sums by hand, and bounds that measurements of the sample gave."""

from __future__ import annotations

import pytest

from edgekit.calibration_cost import calibration_cost


def model(layers: int, hidden: int, inner: int, key_value: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, hidden)}
    for index in range(layers):
        shapes |= {
            f"layers.{index}.qkv": (hidden + 2 * key_value, hidden),
            f"layers.{index}.output": (hidden, hidden),
            f"layers.{index}.gate_up": (2 * inner, hidden),
            f"layers.{index}.down": (hidden, inner),
        }
    return shapes | {"final_norm": (hidden,)}


def test_sample_takes_what_was_measured() -> None:
    """44 s and 435 MB in all, about 120 MB of which any conversion takes."""
    shapes = model(30, 576, 1536, 192, 49152)
    cost = calibration_cost(shapes, frozenset(shapes) - {"final_norm"})
    assert 25 < cost.seconds < 75
    assert 60e6 < cost.peak_bytes < 435e6


def test_eight_billion_parameters_take_hours_and_gigabytes() -> None:
    shapes = model(32, 4096, 14336, 1024, 128256)
    cost = calibration_cost(shapes, frozenset(shapes) - {"final_norm"})
    assert 3600 < cost.seconds < 5 * 3600
    moments = 8 * (3 * 4096**2 + 14336**2)
    assert cost.peak_bytes == 3 * 4 * 3100 * 4096 + moments + 2 * 8 * 14336**2
    time, layer = f"{cost.seconds / 60:.0f} min", f"{cost.layer_seconds:.2g} s a layer"
    assert str(cost) == f"about {time} ({layer}) and {cost.peak_bytes / 1e9:.1f} GB"


def test_a_layer_takes_its_part() -> None:
    small, large = (model(layers, 64, 256, 32, 1000) for layers in (2, 6))
    costs = [calibration_cost(shapes, frozenset(shapes) - {"final_norm"}) for shapes in (small, large)]
    assert costs[0].layer_seconds == pytest.approx(costs[1].layer_seconds)
    assert costs[0].layer_seconds * 2 < costs[0].seconds


@pytest.mark.parametrize("more", [{"layers": 3}, {"hidden": 128}, {"inner": 512}, {"vocabulary": 2000}])
def test_larger_models_take_longer(more: dict[str, int]) -> None:
    sizes = {"layers": 2, "hidden": 64, "inner": 256, "key_value": 32, "vocabulary": 1000}
    small, large = model(**sizes), model(**(sizes | more))
    costs = [calibration_cost(shapes, frozenset(shapes) - {"final_norm"}) for shapes in (small, large)]
    assert costs[0].seconds < costs[1].seconds
    assert costs[0].peak_bytes <= costs[1].peak_bytes


def test_matrices_that_are_not_rounded_cost_only_running() -> None:
    shapes = model(2, 64, 256, 32, 1000)
    whole = calibration_cost(shapes, frozenset(shapes) - {"final_norm"})
    part = calibration_cost(shapes, frozenset({"layers.0.down"}))
    assert part.seconds < whole.seconds
