"""edgekit inspect: each tensor's storage, and size against KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgekit

SVG = "{http://www.w3.org/2000/svg}"
# The reports have four digits.
FOUR_DIGITS = 1e-3


@pytest.fixture(scope="session")
def two_bundles(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    made = [folder / "int8.edgekit", folder / "int4.edgekit"]
    for path in made:
        edgekit.convert(tiny_model("llama"), target="raspberry-pi-5", quant=path.stem, out=path, allow_low_quality=True)
    return made


def test_tensors_shows_each_weight(cli: Any, two_bundles: list[Path]) -> None:
    out = cli("inspect", "--tensors", two_bundles[1]).out
    reports = json.loads((two_bundles[1] / "edgekit.json").read_text(encoding="utf-8"))["programs"][0]["weights"]
    for report in reports:
        (line,) = [line.split() for line in out.splitlines() if line.startswith(f"{report['role']} ")]
        assert line[2:4] == [str(report["bits"]), str(report["block_size"] or "-")]
        assert line[4] == f"{report['size_bytes']:,}"
        assert line[5] == (f"{report['relative_error']:.2%}" if report["relative_error"] else "exact")


def test_reports_hold_the_checkpoints_own_figures(tiny_model: Any, two_bundles: list[Path]) -> None:
    tensors = load_file(next(tiny_model("llama").glob("*.safetensors")))
    reports = json.loads((two_bundles[1] / "edgekit.json").read_text(encoding="utf-8"))["programs"][0]["weights"]
    by_role = {report["role"]: report for report in reports}
    down = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float64)
    assert by_role["layers.0.down"]["peak"] == pytest.approx(
        np.abs(down).max() / np.sqrt(np.mean(down**2)), rel=FOUR_DIGITS
    )
    gate_up = np.concatenate([tensors[f"model.layers.0.mlp.{kind}_proj.weight"] for kind in ("gate", "up")])
    assert by_role["layers.0.gate_up"]["peak"] == pytest.approx(
        np.abs(gate_up).max() / np.sqrt(np.mean(gate_up.astype(np.float64) ** 2)), rel=FOUR_DIGITS
    )


def test_outliers_are_noted_by_name(cli: Any, tiny_model: Any, tmp_path: Path) -> None:
    import shutil

    source = shutil.copytree(tiny_model("llama"), tmp_path / "outlier")
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    # one among 64 x 128 weights can't stand out by more than the root of their number
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[5] *= 1e-3
    embedding[3, 7] = 200 * np.sqrt(np.mean(embedding.astype(np.float64) ** 2))
    expected = abs(embedding[3, 7]) / np.sqrt(np.mean(embedding.astype(np.float64) ** 2))
    save_file(tensors | {"model.embed_tokens.weight": embedding}, file, metadata={"format": "pt"})
    arguments = ("--target", "raspberry-pi-5", "--quant", "int4", "--no-verify", "--out", tmp_path / "b")
    result = cli("convert", source, *arguments)
    assert result.code == 0
    assert expected > 100
    assert f"embedding (4 bits, {expected:,.0f} times)" in result.err


def test_plot_draws_each_bundle(cli: Any, two_bundles: list[Path], tmp_path: Path) -> None:
    result = cli("inspect", *two_bundles, "--plot", tmp_path / "a.svg", "--json")
    assert (result.code, result.err) == (0, "")
    assert [item["kind"] for item in json.loads(result.out)["items"]] == ["bundle", "bundle"]
    tree = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert len(list(tree.iter(f"{SVG}circle"))) == 2
    assert {"int8", "int4"} <= {node.text for node in tree.iter(f"{SVG}text")}


def test_plot_refuses_what_has_no_kl(cli: Any, refused: Any, tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama")
    assert "is not a bundle" in refused("inspect", source, "--plot", tmp_path / "a.svg")
    bundle = tmp_path / "unverified.edgekit"
    edgekit.convert(source, target="raspberry-pi-5", quant="int8", out=bundle, verify=False)
    assert "was not compared" in refused("inspect", bundle, "--plot", tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_plot_that_cannot_be_written_is_named(refused: Any, two_bundles: list[Path], tmp_path: Path) -> None:
    assert "a.svg can't be written" in refused("inspect", *two_bundles, "--plot", tmp_path / "no" / "a.svg")


def test_tensors_of_a_source(cli: Any, tiny_model: Any) -> None:
    source = tiny_model("llama")
    out = cli("inspect", "--tensors", source).out
    for name, tensor in load_file(next(source.glob("*.safetensors"))).items():
        (line,) = [line.split() for line in out.splitlines() if line.startswith(f"{name} ")]
        assert line[1] == "F32"
        assert line[-1] == f"{tensor.nbytes:,}"
