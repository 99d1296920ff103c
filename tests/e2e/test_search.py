"""Converting to a size or to a quality: the files keep the size, the program the quality, and the recipe gives the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.allocation import Option, frontier
from edgekit.bundle import RECIPE, Bundle
from edgekit.cli import main
from edgekit.errors import EdgeKitError, PlanError
from edgekit.pipeline import convert
from edgekit.plan import make_plan
from edgekit.quant import QuantScheme, WeightFormat
from edgekit.search import FORMATS, Budget, Candidates, SchemeSearch, choose, possible_plans
from edgekit.source import Source, open_source
from edgekit.target import load_target

TARGET = "linux-x86-64"
BOUNDS = (0.02, 0.002)  # with int8 products, the tiny model reaches about 0.001


@pytest.fixture
def directory(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("edgekit.calibration.NEW_TOKENS", 24)
    found: Path = tiny_model("llama")
    return found


def program_bytes(bundle: Bundle) -> int:
    files = bundle.manifest.files
    return sum(int(entry["size_bytes"]) for name, entry in files.items() if name.startswith("onnx/"))


def uniform_bytes(directory: Path, form: WeightFormat, place: Path) -> int:
    return program_bytes(convert(directory, target=TARGET, out=place, quant=_recipe(place, form), verify=False))


def _recipe(place: Path, form: WeightFormat) -> str:
    path = place.with_suffix(".toml")
    symmetric = str(form.symmetric).lower()
    path.write_text(f"bits = {form.bits}\nblock_size = {form.block_size}\nsymmetric = {symmetric}\n", encoding="utf-8")
    return str(path)


def test_files_keep_the_size_and_the_recipe_gives_them_again(directory: Path, tmp_path: Path) -> None:
    room = (
        uniform_bytes(directory, WeightFormat(4, 32), tmp_path / "four")
        + uniform_bytes(directory, WeightFormat(8, 32), tmp_path / "eight")
    ) // 2
    bundle = convert(directory, target=TARGET, out=tmp_path / "a", max_size_bytes=room)
    assert 0.97 * room < program_bytes(bundle) <= room
    forms = {(report.bits, report.block_size) for report in bundle.program().graph.weights if report.bits < 16}
    assert {4, 8} <= {bits for bits, _ in forms}
    assert any(note.startswith("searched: ") for note in bundle.manifest.plan["notes"])
    again = convert(directory, target=TARGET, out=tmp_path / "b", quant=str(tmp_path / "a" / RECIPE))
    weights = [found.directory / "onnx" / "model.onnx.data" for found in (bundle, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_divergence_is_kept_by_the_smallest_formats(directory: Path, tmp_path: Path) -> None:
    loose, strict = (convert(directory, target=TARGET, out=tmp_path / str(bound), max_kl=bound) for bound in BOUNDS)
    for bundle, bound in zip((loose, strict), BOUNDS, strict=True):
        assert bundle.program().quality["kl_mean"] <= bound
    assert program_bytes(loose) < program_bytes(strict)


def test_try_that_misses_is_followed_by_a_finer_one(directory: Path, tmp_path: Path) -> None:
    source = open_source(directory)
    target = load_target(TARGET)
    search = _search(source, tmp_path, Budget(max_kl=0.02))
    tries = search.tries()
    first = next(tries)
    assert search.keeps(None)
    assert search.keeps(0.019)
    assert not search.keeps(0.05)
    second = next(tries)
    assert sum(w.size_bytes for w in second.weights.values()) > sum(w.size_bytes for w in first.weights.values())
    assert not search.keeps(0.03)
    next(tries)
    with pytest.raises(PlanError, match="was not kept in 3 tries") as caught:
        next(tries)
    assert "--max-kl" in str(caught.value.hint)
    assert target.id == first.target


def _search(source: Source, place: Path, budget: Budget) -> SchemeSearch:
    start = make_plan(source, load_target(TARGET), quant=QuantScheme("x", WeightFormat(4, 32), rounding="gptq"))
    return SchemeSearch(source, load_target(TARGET), start, budget, place / "unfinished")


def test_size_below_the_smallest_formats_is_told_before_anything_is_measured(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.search.calibration_texts", None)  # calling it would be a TypeError
    with pytest.raises(PlanError, match=r"0\.0 MB are too few: the smallest formats take \d+\.\d MB") as caught:
        convert(directory, target=TARGET, out=tmp_path / "a", max_size_bytes=1000)
    assert "--max-size" in str(caught.value.hint)
    assert not (tmp_path / "a").exists()


def candidates() -> Candidates:
    """Three matrices of 1 and 2 MB that cost 0.4 nats at their smallest and 0.01 at their largest."""
    items = [[Option(1_000_000 * n, 0.4 / n), Option(2_000_000 * n, 0.01 / n)] for n in (1, 1, 2)]
    plans: dict[str, Any] = {f"layers.{number}.down": (None, None) for number in range(3)}
    return Candidates(plans, frontier(items), 3)


def test_impossible_budgets_say_what_is_possible() -> None:
    with pytest.raises(PlanError, match=r"3\.9 MB are too few: the smallest formats take 4\.5 MB") as caught:
        choose(candidates(), Budget(3_900_000), 500_000)
    assert caught.value.hint is not None
    assert "--max-size 4.6MB" in caught.value.hint
    with pytest.raises(PlanError, match=r"no choice of formats .* of 0\.01; the least is 0\.025") as caught:
        choose(candidates(), Budget(max_kl=0.01), 0)
    assert "--max-kl 0.028" in str(caught.value.hint)
    with pytest.raises(PlanError, match=r"a KL divergence of 0\.03 takes about 8\.0 MB, more than 5\.0 MB") as caught:
        choose(candidates(), Budget(5_000_000, 0.03), 0)
    assert "--max-size 8.1MB" in str(caught.value.hint)


def test_what_earlier_tries_have_cost_counts_in_what_is_said() -> None:
    with pytest.raises(PlanError, match=r"no choice of formats .* of 0\.05; the least is 0\.1") as caught:
        choose(candidates(), Budget(max_kl=0.05), 0, correction=4.0)
    assert "--max-kl 0.11" in str(caught.value.hint)
    with pytest.raises(PlanError, match=r"a KL divergence of 0\.06 takes about 8\.0 MB") as caught:
        choose(candidates(), Budget(5_000_000, 0.06), 0, correction=2.0)
    assert "--max-kl 1.3" in str(caught.value.hint)  # 0.01 + 0.4 + 0.2 expected, twice that found, and 5% more
    assert choose(candidates(), Budget(max_kl=0.05), 0, correction=2.0) == choose(candidates(), Budget(max_kl=0.025), 0)


def test_both_bounds_give_the_smallest_that_keeps_the_divergence() -> None:
    assert choose(candidates(), Budget(8_000_000, 1.0), 0) == (0, 0, 0)
    assert choose(candidates(), Budget(8_000_000), 0) == (1, 1, 1)


@pytest.mark.parametrize(
    "bounds", [{}, {"max_bytes": 0}, {"max_bytes": -5}, {"max_kl": 0.0}, {"max_kl": -1.0}, {"max_kl": float("nan")}]
)
def test_bounds_that_mean_nothing_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Budget(**bounds)


def test_a_scheme_and_a_budget_contradict_each_other(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match="leaves no scheme to search for"):
        convert(directory, target=TARGET, out=tmp_path / "a", quant="int8", max_kl=0.1)


def test_all_ways_of_keeping_a_matrix_differ(directory: Path) -> None:
    found = possible_plans(open_source(directory))
    for plans in found.values():
        assert len(set(plans)) == len(plans) <= len(FORMATS)
        assert [plan.size_bytes for plan in plans] == sorted(plan.size_bytes for plan in plans)


def test_command_line_converts_to_a_size(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = uniform_bytes(directory, WeightFormat(8, 32), tmp_path / "eight")
    arguments = ["convert", str(directory), "--target", TARGET, "--out", str(tmp_path / "a"), "--json"]
    assert main([*arguments, "--max-size", f"{room / 1e6}MB"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert sum(entry["size_bytes"] for name, entry in files.items() if name.startswith("onnx/")) <= room
    assert RECIPE in files
    for wrong in (["--max-size", "many"], ["--max-size", "-3MB"], ["--max-kl", "0"], ["--max-kl", "nan"]):
        assert main([*arguments, "--force", *wrong]) == 2
