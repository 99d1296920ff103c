"""Device profiles: the built-in ones load, a user's own is checked key by key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import TargetError
from edgekit.runtime_options import RuntimeOptions
from edgekit.target import Target, list_targets, load_target

FOLDER = Path(__file__).parents[2] / "targets"
GOOD = """
name = "A board"
formats = ["onnx"]

[memory]
installed_bytes = 4_000_000_000
app_bytes = 3_000_000_000
bandwidth_bytes_per_s = 10_000_000_000

[cpu]
cores = [
    { name = "fast", count = 2, clock_hz = 2_000_000_000, big = true },
    { name = "slow", count = 6, clock_hz = 1_500_000_000, big = false },
]
instruction_sets = ["neon", "dotprod"]
int8_ops_per_s = 100_000_000_000

[sources]
memory = "measured, 2026-11: free -b, and the probe in tests"
cpu.cores = "published, 2024: the data sheet"
cpu.instruction_sets = "published, 2024-02: the data sheet"
cpu.int8_ops_per_s = "modelled, 2026-11-22: cores and clocks"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my-board.toml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# ---- The built-in profiles ----


# Ids are part of scripts and bundles: none goes away.
PROMISED = """
    raspberry-pi-4 raspberry-pi-4-2gb raspberry-pi-4-8gb raspberry-pi-5 raspberry-pi-5-2gb raspberry-pi-5-4gb raspberry-pi-5-16gb
    raspberry-pi-zero-2w jetson-orin-nano jetson-agx-orin iphone-15 iphone-15-pro iphone-16 iphone-17-pro ipad-m4
    pixel-8 pixel-9-pro pixel-10-pro galaxy-s24 galaxy-s25 dimensity-9400-phone budget-android-4gb
    copilot-snapdragon-x-elite copilot-snapdragon-x2-elite copilot-lunar-lake copilot-panther-lake copilot-ryzen-ai-300
    linux-x86-64 browser
"""
# QNN's numbers of the chips (QnnTypes.h of Qualcomm's AI Runtime) and the versions of their Hexagon.
HEXAGON = {
    "copilot-snapdragon-x-elite": (60, "v73"),
    "galaxy-s24": (57, "v75"),
    "galaxy-s25": (69, "v79"),
    "copilot-snapdragon-x2-elite": (88, "v81"),
}


def test_every_profile_is_listed_by_id() -> None:
    ids = [target.id for target in list_targets()]
    assert ids == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert set(PROMISED.split()) <= set(ids)


def test_families_are_no_devices() -> None:
    families = {path.stem for path in FOLDER.glob("families/*.toml")}
    assert families.isdisjoint(target.id for target in list_targets())
    assert families <= {target.extends for target in list_targets()} | {"android", "copilot-pc"}
    with pytest.raises(TargetError, match="'ios' is not known"):
        load_target("ios")


def test_profile_of_a_memory_size_says_it_in_its_name() -> None:
    for target in list_targets():
        size = re.search(r"-(\d+)gb$", target.id)
        if size:
            assert f"({size[1]} GB" in target.name
            assert target.memory.installed_bytes == int(size[1]) * 2**30


def test_hexagon_profiles_have_qualcomms_numbers() -> None:
    found = {target.id: target.npu for target in list_targets() if target.npu and target.npu.kind == "hexagon"}
    assert {name: (npu.soc_model, npu.architecture) for name, npu in found.items()} == HEXAGON
    assert all(npu.provider == "qnn" and npu.static_shapes for npu in found.values())


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.id)
def test_every_figure_has_a_dated_source(target: Target) -> None:
    figures = {"memory.installed_bytes", "memory.app_bytes", "memory.bandwidth_bytes_per_s", "cpu.cores"}
    assert figures | {"cpu.instruction_sets", "cpu.int8_ops_per_s"} <= target.sources.keys()
    kinds = {text.partition(",")[0] for text in target.sources.values()}
    assert kinds <= {"published", "measured", "modelled", "estimate"}
    # Nobody has measured anything for us on a device: only the machine that we run on.
    assert "measured" not in kinds or target.id == "linux-x86-64"


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.id)
def test_profile_is_plausible(target: Target) -> None:
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", target.id)
    assert 0.2 <= target.memory.app_bytes / target.memory.installed_bytes <= 0.97
    assert 1e9 < target.memory.bandwidth_bytes_per_s < 1e12
    assert 1 <= target.options("onnx").threads <= 32
    assert "onnx" in target.formats


# ---- A user's own file ----


def test_own_file_loads_with_its_name_as_id(tmp_path: Path) -> None:
    target = load_target(written(tmp_path, GOOD))
    assert (target.id, target.options("onnx").threads, target.formats) == ("my-board", 2, ("onnx",))
    assert target.cpu.cores[1].name == "slow"
    assert target.to_json()["memory"]["app_bytes"] == 3_000_000_000
    assert load_target(str(tmp_path / "my-board.toml")) == target


def test_int8_activations_need_dot_products(tmp_path: Path) -> None:
    assert load_target(written(tmp_path, GOOD)).cpu.int8_activations
    assert not load_target(written(tmp_path, changed(', "dotprod"', ""))).cpu.int8_activations


def test_own_file_extends_a_built_in_profile(tmp_path: Path) -> None:
    text = (
        'extends = "raspberry-pi-5"\nname = "Mine"\n'
        "memory.installed_bytes = 4_294_967_296\nmemory.app_bytes = 3_000_000_000\n"
        'runtime.onnx.threads = 3\n[sources]\nmemory = "measured, 2026-11: free -b"\nruntime = "estimate, 2026: mine"'
    )
    target, base = load_target(written(tmp_path, text)), load_target("raspberry-pi-5")
    assert (target.name, target.extends, target.memory.installed_bytes) == ("Mine", "raspberry-pi-5", 2**32)
    assert target.memory.bandwidth_bytes_per_s == base.memory.bandwidth_bytes_per_s
    assert (target.cpu, target.formats) == (base.cpu, base.formats)
    assert target.options("onnx") == RuntimeOptions(threads=3)
    assert target.sources["memory.app_bytes"] == "measured, 2026-11: free -b"
    assert target.sources["memory.bandwidth_bytes_per_s"] == base.sources["memory.bandwidth_bytes_per_s"]


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        (
            "memory.bandwidth_gb_per_s = 15",
            "'memory.bandwidth_gb_per_s' is not known",
            "write memory.bandwidth_bytes_per_s",
        ),
        ("runtime.onnx.spinnning = false", "'runtime.onnx.spinnning' is not known", "did you mean spinning?"),
        ("npu.knid = 'hexagon'", "'npu.knid' is not known", "did you mean kind?"),
        ("treads = 4", "'treads' is not known", "known: name, memory"),
    ],
)
def test_key_that_is_not_known_is_not_asked_for_a_source(table: str, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        load_target(written(tmp_path, f'extends = "raspberry-pi-5"\nname = "A box"\n{table}\n'))
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("date", ["2026-13", "2026-00", "2026-11-32", "1999-01", "2026-1", "٢٠٢٦"])
def test_source_with_no_date_of_the_calendar_is_refused(date: str, tmp_path: Path) -> None:
    figure = f'memory.app_bytes = 1_000_000_000\nsources.memory = "measured, {date}: x"'
    text = f'extends = "raspberry-pi-5"\nname = "A box"\n{figure}\n'
    with pytest.raises(TargetError, match="the source of memory is"):
        load_target(written(tmp_path, text))


def test_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(TargetError, match="'rasberry-pi5' is not known") as caught:
        load_target("rasberry-pi5")
    assert "did you mean raspberry-pi-5" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["toaster", "", "../targets/pixel-9-pro", "/etc/passwd", "a\0b"])
def test_unknown_target_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="is not known") as caught:
        load_target(name)
    assert "`edgekit targets` lists all" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "words", "hint"),
    [
        ('name = "A board"', "", "name is missing", ""),
        ('name = "A board"', "name = 3", "name is 3, expected a printable text", ""),
        ('name = "A board"', 'name = "A"\nram = 3', "the key 'ram' is not known", "known: "),
        ('name = "A board"', 'name = "A"\nformat = "onnx"', "the key 'format' is not known", "did you mean formats?"),
        ('name = "A board"', 'name = "A"\nid = "a"', "the key 'id' is not known", "its file's name"),
        ('name = "A board"', "name = '", "not valid TOML", ""),
        ('name = "A board"', 'name = "\\u001b[31m"', "name is '\\x1b[31m', expected a printable text", ""),
        ('name = "A board"', 'name = "A"\nquant = "int3"', "quant is 'int3'", "int4-mixed"),
        ('name = "A board"', 'name = "A"\nextends = "raspberry-pi-6"', "extends is 'raspberry-pi-6'", "raspberry-pi-5"),
        ('["onnx"]', '"onnx"', "formats is 'onnx', expected a list", ""),
        ('["onnx"]', '["onxx"]', "formats[0] is 'onxx'", "did you mean onnx?"),
        ('["onnx"]', "[1]", "formats[0] is 1", ""),
        ('["onnx"]', "[]", "formats is []", ""),
        ('["onnx"]', '["onnx", "onnx"]', "formats is ['onnx', 'onnx']", ""),
        ("app_bytes = 3_000_000_000", "", "memory.app_bytes is missing", "targets/README.md"),
        ("app_bytes = 3_000_000_000", "app_bytes = 3", "memory.app_bytes is 3,", "were 3 GB meant? Write 3_000_000_000"),
        ("app_bytes = 3_000_000_000", "app_bytes = 3000", "memory.app_bytes is 3_000,", "3,000 MB meant"),
        ("app_bytes = 3_000_000_000", "app_bytes = -1", "memory.app_bytes is -1,", ""),
        ("app_bytes = 3_000_000_000", "app_bytes = 3e9", "memory.app_bytes is 3000000000.0, expected a whole", ""),
        ("app_bytes = 3_000_000_000", "app_gb = 3", "the key 'memory.app_gb' is not known", "write memory.app_bytes, in bytes"),
        ("app_bytes = 3_000_000_000", "app_bytes = 5_000_000_000", "more memory than the device has", ""),
        ("bandwidth_bytes_per_s = 10_000_000_000", "bandwidth_gb_per_s = 10", "the key 'memory.bandwidth_gb_per_s'",
         "write memory.bandwidth_bytes_per_s, in bytes per second"),
        ("bandwidth_bytes_per_s = 10_000_000_000", "bandwidth_bytes_per_s = 15", "bandwidth_bytes_per_s is 15, possible are",
         "were 15 GB/s meant? Write 15_000_000_000"),
        ("int8_ops_per_s = 100_000_000_000", "int8_ops_per_s = 4", "int8_ops_per_s is 4,", "were 4 TOPS meant?"),
        ("clock_hz = 2_000_000_000", "clock_hz = 2400", "cpu.cores[0].clock_hz is 2_400,", "were 2,400 MHz meant?"),
        ("count = 2", "count = 0", "cpu.cores[0].count is 0", ""),
        ("count = 2", "count = true", "cpu.cores[0].count is True", ""),
        ("count = 2", 'count = 2, "a\\nb" = 1', "the key \"cpu.cores[0].'a\\\\nb'\" is not known", ""),
        ("big = true", "big = false", "cpu.cores has no big cores", "set big = true"),
        ("big = true", "big = 1", "cpu.cores[0].big is 1, expected true or false", ""),
        ('"dotprod"', '"dotproduct"', "cpu.instruction_sets[1] is 'dotproduct'", "did you mean dotprod?"),
        ("[memory]", "[[memory]]", "memory is [", ""),
        ("[cpu]", '[npu]\nkind = "hexagn"\narchitecture = "v73"\ndtypes = []\n[cpu]', "npu.kind is 'hexagn'", "hexagon"),
        ("[cpu]", "[packaging]\nminimum_os = 'new'\n[cpu]", "packaging.minimum_os is 'new'", ""),
        ("[cpu]", "[runtime.onxx]\nthreads = 1\n[cpu]", "runtime is 'onxx'", "did you mean onnx?"),
        ("cpu.cores = ", "cpu.core = ", "cpu.cores has no source", "add cpu.cores ="),
        ("published, 2024: the", "2024: the", "the source of cpu.cores is '2024: the data sheet'", "published, 2026-11"),
        ("published, 2024: the", "published: the", "the source of cpu.cores is", "published, 2026-11"),
        ('cpu.cores = "published, 2024: the data sheet"', "cpu.cores = 3", "the source of cpu.cores is '3'", ""),
        ("[sources]", '[sources]\ngpu = "estimate, 2026: x"', "sources names 'gpu'", ""),
    ],
)  # fmt: skip
def test_mistake_in_a_file_is_named(old: str, new: str, words: str, hint: str, tmp_path: Path) -> None:
    text = changed(old, new)
    if new.startswith("["):  # a table more, and its source
        text += "".join(
            f'\n{table} = "estimate, 2026: x"' for table in ("npu", "packaging", "runtime") if f"[{table}" in new
        )
    with pytest.raises(TargetError) as caught:
        load_target(written(tmp_path, text))
    assert words in caught.value.message
    assert "my-board.toml" in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in str(caught.value.hint or "")


def test_child_needs_sources_for_its_own_figures(tmp_path: Path) -> None:
    text = 'extends = "raspberry-pi-5"\nname = "Mine"\nmemory.app_bytes = 3_000_000_000'
    with pytest.raises(TargetError, match=r"memory\.app_bytes has no source"):
        load_target(written(tmp_path, text))


LINES = (FOLDER / "copilot-snapdragon-x-elite.toml").read_text(encoding="utf-8").splitlines()
JUNK = ["= 1", "= -1", "= ''", "= [[]]", "= {}", "= nan", "= 1979-05-27", "", "= true", ".x = 1", '= "\\u0000"']


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(["drop", "twice", *JUNK])), max_size=3)
)
def test_spoilt_profile_is_a_profile_or_one_line(changes: list[tuple[int, str]], tmp_path: Path) -> None:
    lines = list(LINES)
    for index, change in changes:
        line = lines[index]
        spoilt = {"drop": "", "twice": f"{line}\n{line}"}
        lines[index] = spoilt.get(change, f"{line.partition('=')[0]}{change}")
    try:
        target = load_target(written(tmp_path, "\n".join(lines)))
    except TargetError as error:
        said = error
    else:
        assert target.to_json()
        return
    assert "my-board.toml" in said.message
    assert said.message.isprintable()


def test_missing_file_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read"):
        load_target(tmp_path / "none.toml")
