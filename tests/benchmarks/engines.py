"""Engines that the benchmarks compare, each behind one small interface. Not a benchmark itself.

Each imports its package when it is made: it runs in a worker (`peers.py`) whose interpreter has that package.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt as text and as tokens; an engine takes the one its interface has."""

    text: str
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Timing:
    """One reply: seconds up to its first token, seconds from there, and the number of its tokens."""

    ttft_s: float
    decode_s: float
    tokens: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, a second."""
        return (self.tokens - 1) / self.decode_s


class Engine(Protocol):
    """A loaded model. Decoding is greedy, and its time includes the choice of the token."""

    def prefill(self, prompt: Prompt) -> float:
        """Run the prompt from an empty cache up to its first new token; seconds."""
        ...

    def decode(self, count: int) -> float:
        """Continue the prompt by `count` tokens, one at a time; seconds."""
        ...

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after every token, `[len(tokens), vocabulary]`."""
        ...

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        """Reply to a prompt from an empty cache, with `count` tokens or up to an end token.

        Args:
            options: `speculate`, and those of EdgeKit's `generate`.
        """
        ...


class EdgeKit:
    """An EdgeKit bundle through its public interface."""

    def __init__(self, bundle: str, threads: int, context: int) -> None:
        import edgekit

        # no prefix of an earlier prompt is kept: every prefill is a whole one
        self._model: Any = edgekit.load(bundle, threads=threads, session_cache_bytes=0)
        self._prompt = Prompt("", ())

    def prefill(self, prompt: Prompt) -> float:
        self._prompt = prompt
        stats = self._model.generate(prompt.text, max_tokens=1, raw=True).stats
        if abs(stats.prompt_tokens - len(prompt.tokens)) > 2:
            raise ValueError(f"the prompt has {stats.prompt_tokens} tokens, expected {len(prompt.tokens)}")
        return len(prompt.tokens) / float(stats.prefill_tokens_per_s)

    def decode(self, count: int) -> float:
        stats = self._model.generate(self._prompt.text, max_tokens=count, raw=True, speculate=False).stats
        if stats.new_tokens < count // 2:
            raise ValueError(f"the reply ended after {stats.new_tokens} tokens, too few to time")
        return count / float(stats.decode_tokens_per_s)

    def logits(self, tokens: Sequence[int]) -> Logits:
        return np.asarray(self._model.logits(tokens), dtype=np.float32)

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        from edgekit.structure import JsonSchema

        chosen = {key: value for key, value in options.items() if key != "schema"}
        if "schema" in options:
            chosen["structure"] = JsonSchema(options["schema"])
        stats = self._model.generate(prompt.text, raw=True, max_tokens=count, **chosen).stats
        decode_s = (stats.new_tokens - 1) / stats.decode_tokens_per_s if stats.new_tokens > 1 else 0.0
        return Timing(stats.ttft_s, decode_s, stats.new_tokens)


class OnnxRuntimeGenAI:
    """A folder written by onnxruntime-genai's builder. Logits come from its `model.onnx` on plain ONNX Runtime."""

    def __init__(self, folder: str, threads: int, context: int) -> None:
        import onnxruntime_genai as genai

        self._genai, self._folder, self._context, self._threads = genai, folder, context, threads
        self._model: Any = None
        self._generator: Any = None

    def _open(self) -> Any:
        config = self._genai.Config(self._folder)
        options = {"session_options": {"intra_op_num_threads": self._threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        return self._genai.Model(config)

    def prefill(self, prompt: Prompt) -> float:
        self._model = self._model or self._open()
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, min_length=self._context, max_length=self._context)
        self._generator = self._genai.Generator(self._model, options)
        tokens = np.array(prompt.tokens, dtype=np.int32)
        start = time.perf_counter()
        self._generator.append_tokens(tokens)
        self._generator.generate_next_token()
        return time.perf_counter() - start

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        self._model = self._model or self._open()
        chosen = self._genai.GeneratorParams(self._model)
        chosen.set_search_options(do_sample=False, max_length=self._context)
        if options["speculate"]:
            chosen.set_speculative_options(ngram_size=3)  # its n-gram lookup; all else as it comes
        generator = self._genai.Generator(self._model, chosen)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompt.tokens, dtype=np.int32))
        generator.generate_next_token()
        first, tokens = time.perf_counter(), 1
        while tokens < count and not generator.is_done():
            generator.generate_next_token()
            tokens += 1
        return Timing(first - start, time.perf_counter() - first, tokens)

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._generator.generate_next_token()
        return time.perf_counter() - start

    def logits(self, tokens: Sequence[int]) -> Logits:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        self._model = self._model or onnxruntime.InferenceSession(f"{self._folder}/model.onnx", options)
        decoder = json.loads(Path(self._folder, "genai_config.json").read_text())["model"]["decoder"]
        past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
        feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), dtype=np.int64)}
        for value in self._model.get_inputs():
            feed.setdefault(value.name, past)
        return np.asarray(self._model.run(["logits"], feed)[0][0], dtype=np.float32)


class LlamaCpp:
    """A GGUF file on llama.cpp's own C interface."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        weights = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads
        options.n_outputs_max = 512
        self._context = llama_cpp.llama_init_from_model(weights, options)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        self._next = 0

    def _run(self, tokens: Sequence[int], *, every: bool = False) -> Logits:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if every:
            wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
            batch.logits = ctypes.cast(wanted, type(batch.logits))
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        shape = (len(tokens) if every else 1, self._vocabulary)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape)

    def prefill(self, prompt: Prompt) -> float:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        start = time.perf_counter()
        self._next = int(self._run(prompt.tokens)[0].argmax())
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._next = int(self._run([self._next])[0].argmax())
        return time.perf_counter() - start

    def logits(self, tokens: Sequence[int]) -> Logits:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._run(tokens, every=True).copy()

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        lookup = LlamaPromptLookupDecoding() if options["speculate"] else None  # with the binding's defaults
        start = time.perf_counter()
        self.prefill(prompt)
        first, memory = time.perf_counter(), self._api.llama_get_memory(self._context)
        text, tokens = [*prompt.tokens, self._next], 1
        while tokens < count and text[-1] not in options["ends"]:
            draft = [] if lookup is None else lookup(np.array(text, dtype=np.intc)).tolist()
            best = self._run([text[-1], *draft], every=True).argmax(axis=1).tolist()
            kept = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
            text += best[: kept + 1]
            tokens += kept + 1
            self._api.llama_memory_seq_rm(memory, 0, len(text) - 1, -1)
        return Timing(first - start, time.perf_counter() - first, tokens)


class TorchAo:
    """A checkpoint that torchao quantizes when it is opened: for its distribution, not for its speed.

    The artifact is a folder with `recipe.json`: the checkpoint's `source` and the `recipe`. As in ExecuTorch's recipes, the
    head is untied, linear layers have 4 bits in groups of 32, and the embedding 8 bits for each row.

    torchao dequantizes such weights at every forward; here that is done once, and its own rounding of inputs is applied
    before each product: the same numbers, in a fraction of the time.
    """

    NOT_TIMED = "torchao has no 4-bit kernels for this processor: it dequantizes at every step"

    def __init__(self, folder: str, threads: int, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        recipe = json.loads(Path(folder, "recipe.json").read_text())
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(recipe["source"], dtype=torch.float32)
        head = self._model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        self._quantize(recipe["recipe"])
        self._weight_bytes = self._stored_bytes()
        self._dequantize()

    def _quantize(self, recipe: str) -> None:
        from torchao import quantization
        from torchao.quantization import granularity

        torch: Any = self._torch
        groups = granularity.PerGroup(32)
        linear: Any = (
            quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=groups)
            if recipe == "8da4w"
            else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
        )
        rows = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity.PerAxis(0))
        quantization.quantize_(self._model, linear)
        quantization.quantize_(self._model, rows, lambda module, name: isinstance(module, torch.nn.Embedding))

    def _dequantize(self) -> None:
        from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

        torch: Any = self._torch
        for module in self._model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, intx.IntxUnpackedToInt8Tensor):
                continue
            if weight.activation_quantization is not None:
                round_inputs = intx._apply_int8_act_asym_per_token_quant_dequant
                module.register_forward_pre_hook(lambda _, inputs, rounded=round_inputs: (rounded(inputs[0]),))
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)

    def prefill(self, prompt: Prompt) -> float:
        raise NotImplementedError(self.NOT_TIMED)

    def decode(self, count: int) -> float:
        raise NotImplementedError(self.NOT_TIMED)

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        raise NotImplementedError(self.NOT_TIMED)

    def logits(self, tokens: Sequence[int]) -> Logits:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([list(tokens)])).logits[0]
        return np.asarray(logits.numpy(), dtype=np.float32)

    def weight_bytes(self) -> int:
        """The weights as their widths say; in memory torchao keeps 4 bits in a byte."""
        return self._weight_bytes

    def _stored_bytes(self) -> int:
        size = 0
        for weight in self._model.parameters():
            if hasattr(weight, "qdata"):
                values, groups = weight.qdata.numel(), weight.scale.numel()
                bits = 4 if weight.target_dtype == self._torch.int4 else 8
                size += values * bits // 8 + groups * weight.scale.element_size()  # the zero points are all 0
            else:
                size += weight.numel() * weight.element_size()
        return size


class ExecuTorch:
    """A .pte with `forward(tokens [1, new], input_pos [1]) -> logits [1, 1, vocabulary]` on ExecuTorch's own Python runtime."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401 - registers operators, as the line above does
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)
        self._torch: Any = torch
        self._method: Any = Runtime.get().load_program(Path(file)).load_method("forward")
        self._length, self._next = 0, 0

    def _run(self, tokens: Sequence[int]) -> None:
        inputs = (self._torch.tensor([list(tokens)]), self._torch.tensor([self._length]))
        self._next = int(self._method.execute(inputs)[0][0, -1].argmax())
        self._length += len(tokens)

    def prefill(self, prompt: Prompt) -> float:
        self._length = 0
        start = time.perf_counter()
        self._run(prompt.tokens)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._run([self._next])
        return time.perf_counter() - start

    def logits(self, tokens: Sequence[int]) -> Logits:
        raise NotImplementedError("a plain export gives the last token's logits only")

    def reply(self, prompt: Prompt, count: int, options: dict[str, Any]) -> Timing:
        raise NotImplementedError("a plain export has no end tokens and no sampling")


ENGINES: dict[str, type[EdgeKit] | type[OnnxRuntimeGenAI] | type[LlamaCpp] | type[TorchAo] | type[ExecuTorch]] = {
    "edgekit": EdgeKit,
    "onnxruntime-genai": OnnxRuntimeGenAI,
    "llama.cpp": LlamaCpp,
    "torchao": TorchAo,
    "executorch": ExecuTorch,
}
PIP_LINES = {
    "edgekit": "pip install edgekit-toolkit",
    "onnxruntime-genai": "pip install onnxruntime-genai",
    "llama.cpp": "pip install llama-cpp-python",
    "torchao": "pip install torchao",
    "executorch": "pip install executorch==1.5.1",
}
