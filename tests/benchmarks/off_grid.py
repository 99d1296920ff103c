"""A copy of a checkpoint that computes the same function with weights that lie on no quantizer's grid.

`sample`, and every checkpoint that was dequantized from a file, has weights on a grid of few levels. That flatters the
schemes whose blocks happen to fall on the grid and punishes the others. The copy keeps the function and loses the grid:
random factors move between each norm weight and the columns of the linears after it, between the rows of `up` and the
columns of `down`, and between the value rows and the columns of the output projection; and the channels of the residual
stream change places, which mixes the blocks of a tied embedding, where no factor can go. Both models are then run on
transformers in float32; the copy is removed again where their outputs differ by more than float32's rounding.

    python tests/benchmarks/off_grid.py SOURCE OUT [--seed 0]

SOURCE is a Hugging Face directory of a Llama, Mistral, Qwen2 or Qwen3 model, a GGUF file, or sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from convert import CommandError, checkpoint

Floats = npt.NDArray[np.float32]
Factors = npt.NDArray[np.float64]
MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
SPREAD = 0.3  # of the factors' logarithms: 95% lie between 0.56 and 1.8
# Mean KL between two float32 runs of one function, in nats; SmolLM2-135M's copy has 1e-9, a wrong factor over 0.01.
SAME_FUNCTION_KL = 1e-6
CHECKED_TOKENS = 256


def read_tensors(source: Path) -> dict[str, Floats]:
    """Every tensor of a directory of safetensors, float32."""
    from safetensors import safe_open

    found: dict[str, Floats] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:  # numpy has no bfloat16
            found |= {name: tensors.get_tensor(name).float().numpy() for name in tensors.keys()}  # noqa: SIM118
    return found


def rescale(tensors: dict[str, Floats], config: dict[str, Any], random: np.random.Generator) -> Iterator[str]:
    """Move factors within each layer, in place; yields the names of the layers as they are done."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads

    def draw(count: int) -> Factors:
        return np.exp(random.normal(0.0, SPREAD, count))

    def scale(name: str, factors: Factors) -> None:  # rows of a matrix, or the elements of a norm or a bias
        if name in tensors:
            array = tensors[name]
            tensors[name] = (array * factors.reshape(-1, *[1] * (array.ndim - 1))).astype(np.float32)

    def divide_columns(name: str, factors: Factors) -> None:
        tensors[name] = (tensors[name] / factors).astype(np.float32)

    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{kind}_proj" for kind in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            factors = draw(config["hidden_size"])
            scale(f"{layer}.{norm}.weight", factors)
            for reader in readers:
                divide_columns(f"{layer}.{reader}.weight", factors)
        factors = draw(config["intermediate_size"])
        scale(f"{layer}.mlp.up_proj.weight", factors)
        scale(f"{layer}.mlp.up_proj.bias", factors)
        divide_columns(f"{layer}.mlp.down_proj.weight", factors)
        factors = draw(len(tensors[f"{layer}.self_attn.v_proj.weight"]))
        scale(f"{layer}.self_attn.v_proj.weight", factors)
        scale(f"{layer}.self_attn.v_proj.bias", factors)
        of_heads = np.repeat(factors.reshape(kv_heads, -1), heads // kv_heads, axis=0)
        divide_columns(f"{layer}.self_attn.o_proj.weight", of_heads.ravel())
        yield layer


def permute_channels(tensors: dict[str, Floats], order: npt.NDArray[np.int64]) -> None:
    """Put the channels of the residual stream into another order, in place, wherever they are read or written."""
    writers = ("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
    columns = ("embed_tokens.weight", "lm_head.weight")
    readers = tuple(f"{kind}_proj.weight" for kind in ("q", "k", "v", "gate", "up"))
    for name, array in tensors.items():
        if name.endswith((*writers, *norms)):
            tensors[name] = np.ascontiguousarray(array[order])
        elif name.endswith((*columns, *readers)):
            tensors[name] = np.ascontiguousarray(array[:, order])


def write_off_grid(source: Path, out: Path, seed: int) -> None:
    """Write the copy.

    Raises:
        CommandError: The architecture is not handled.
    """
    from safetensors.numpy import save_file

    config = json.loads((source / "config.json").read_text())
    if config["model_type"] not in MODEL_TYPES:
        raise CommandError(f"{config['model_type']} is not rescaled here, only {', '.join(sorted(MODEL_TYPES))}")
    random, tensors = np.random.default_rng(seed), read_tensors(source)
    for layer in rescale(tensors, config, random):
        print(f"rescaled {layer}", file=sys.stderr)
    permute_channels(tensors, random.permutation(config["hidden_size"]))
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def divergence(source: Path, copy: Path, seed: int) -> float:
    """Mean KL between two checkpoints on random tokens, in nats, both on transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = []
    for folder in (source, copy):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = np.random.default_rng(seed).integers(model.config.vocab_size, size=(1, CHECKED_TOKENS))
        with torch.inference_mode():
            found.append(torch.log_softmax(model(torch.from_numpy(tokens)).logits[0].double(), dim=-1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


def make_off_grid(source: Path, out: Path, *, seed: int = 0) -> float:
    """Write the copy and check it; the mean KL between both.

    Raises:
        CommandError: The architecture is not handled, or the copy computes something else.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        unchecked = Path(folder, "copy")
        unchecked.mkdir()
        write_off_grid(source, unchecked, seed)
        kl = divergence(source, unchecked, seed)
        if not kl <= SAME_FUNCTION_KL:
            raise CommandError(f"the copy of {source} computes something else: mean KL {kl:.3g}")
        unchecked.rename(out)
    return kl


def main() -> int:
    """Write an off-grid copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        source = checkpoint(arguments.source, arguments.out.parent)
        kl = make_off_grid(source, arguments.out, seed=arguments.seed)
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.out}: the same function, mean KL {kl:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
