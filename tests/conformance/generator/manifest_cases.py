"""manifest.json: bundles that open, and such that must be refused.

Written by hand from the rules of `edgekit.json`: each case changes one thing of a bundle that is whole, and states what is
wrong with it then.
"""

from __future__ import annotations

import hashlib
from typing import Any

FILES = {
    "goldens.json": "{}\n",
    "onnx/model.onnx": "a program\n",
    "onnx/model.onnx.data": "its weights\n",
    "tokenizer.json": "{}\n",
}
WEIGHTS = "onnx/model.onnx.data"
REMOVED = object()

At = tuple[str | int, ...]
P: At = ("programs", 0)
C: At = (*P, "cache")
W: At = (*P, "weights", 0)
R: At = (*P, "runtime")

_TOP = "schema_version edgekit_version model target plan programs tokenizer generation_defaults files provenance"
_PROGRAM = "format files inputs outputs cache vocab_size rope_switch weights context quality"
_CACHE = "layers kv_heads head_dim dtype past_key past_value present_key present_value"
_RUNTIME = "threads spinning arena prepacking mapped_weights"
_WEIGHT = "role stored bits block_size size_bytes source_bytes relative_error"
REQUIRED: tuple[At, ...] = (
    *((key,) for key in _TOP.split()),
    ("plan", "notes"),
    ("tokenizer", "eos_token_ids"),
    ("tokenizer", "special_tokens"),
    *((*P, key) for key in _PROGRAM.split()),
    *((*C, key) for key in _CACHE.split()),
    *((*W, key) for key in _WEIGHT.split()),
    *((*R, key) for key in _RUNTIME.split()),
    ("files", WEIGHTS, "size_bytes"),
    ("files", WEIGHTS, "sha256"),
)
WRONG: tuple[tuple[At, Any], ...] = (
    (("schema_version",), "1"),
    (("schema_version",), True),
    (("schema_version",), 1.5),
    (("edgekit_version",), 1),
    (("model",), []),
    (("model", "parameters"), "many"),
    (("plan", "notes"), "text"),
    (("plan", "notes"), [1]),
    (("programs",), {}),
    (("programs",), []),
    ((*P,), "onnx"),
    ((*P, "files"), []),
    ((*P, "files"), [1]),
    ((*P, "inputs", "tokens"), 1),
    ((*P, "context"), 0),
    ((*P, "context"), -1),
    ((*P, "context"), "4096"),
    ((*P, "context"), True),
    ((*P, "vocab_size"), -1),
    ((*P, "quality"), []),
    ((*P, "quality", "kl_mean"), "small"),
    ((*C, "layers"), -1),
    ((*C, "layers"), 1.5),
    ((*C, "dtype"), "int16"),
    ((*W,), 0),
    ((*W, "bits"), -8),
    ((*W, "relative_error"), -0.1),
    ((*W, "relative_error"), None),
    ((*R,), []),
    ((*R, "threads"), -1),
    ((*R, "threads"), 1_000_000),
    ((*R, "threads"), "4"),
    ((*R, "spinning"), 1),
    ((*R, "arena"), "no"),
    ((*R, "prepacking"), None),
    (("tokenizer", "eos_token_ids"), [1.5]),
    (("tokenizer", "eos_token_ids"), ["2"]),
    (("tokenizer", "eos_token_ids"), [True]),
    (("tokenizer", "bos_token_id"), "1"),
    (("tokenizer", "special_tokens"), {"bos_token": 1}),
    (("chat_template",), 1),
    (("chat_template",), ["a"]),
    (("generation_defaults",), None),
    (("licence",), 2.0),
    (("files",), []),
    (("files", WEIGHTS), 12),
    (("files", WEIGHTS, "size_bytes"), -1),
    (("files", WEIGHTS, "size_bytes"), "12"),
    (("files", WEIGHTS, "sha256"), 0),
)
PATHS = (
    "../a",
    "/etc/passwd",
    "onnx/../../a",
    "onnx/../a",
    "./a",
    "onnx//a",
    "a/",
    "a\\b",
    "C:a",
    "a\u0000b",
    "",
    ".",
    "..",
)
TEXTS = ("", "{", "[]", "null", "1", '"text"', "{}", '{"schema_version": 1', "{'schema_version': 1}")


def suite() -> dict[str, Any]:
    """The file."""
    cases = [*_opening(), *_fields(), *_windows(), *_schemas(), *_paths(), *_files(), *_texts()]
    return {"suite": "manifest", "version": 1, "manifest": _manifest(), "files": FILES, "cases": cases}


def _manifest() -> dict[str, Any]:
    cache = {"layers": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    cache |= {"past_key": "past_key.{}", "past_value": "past_value.{}"}
    cache |= {"present_key": "present_key.{}", "present_value": "present_value.{}"}
    weight = {"role": "attention", "stored": "int8", "bits": 8, "block_size": 32}
    weight |= {"size_bytes": 12, "source_bytes": 40, "relative_error": 0.004}
    program = {
        "format": "onnx",
        "files": ["onnx/model.onnx", WEIGHTS],
        "inputs": {"tokens": "tokens", "length": "length", "logits_start": "logits_start"},
        "outputs": {"logits": "logits"},
        "cache": cache,
        "vocab_size": 320,
        "rope_switch": 0,
        "weights": [weight],
        "context": 256,
        "runtime": {"threads": 4, "spinning": True, "arena": True, "prepacking": True, "mapped_weights": True},
        "quality": {"status": "ok", "executed": "onnxruntime", "kl_mean": 0.001, "kl_bound": 0.05},
    }
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = {"file": "tokenizer.json", "eos_token_ids": [2], "bos_token_id": 1, "special_tokens": special}
    return {
        "schema_version": 1,
        "edgekit_version": "0.1.0",
        "model": {"name": "tiny", "parameters": 1000},
        "target": "linux-x86-64",
        "plan": {"notes": []},
        "programs": [program],
        "tokenizer": tokenizer,
        "chat_template": "{{ messages[0].content }}",
        "generation_defaults": {},
        "files": {name: _entry(text) for name, text in FILES.items()},
        "provenance": {},
        "licence": "apache-2.0",
    }


def _entry(text: str) -> dict[str, Any]:
    data = text.encode()
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _opening() -> list[dict[str, Any]]:
    opens: tuple[tuple[str, At, Any], ...] = (
        ("a key of a later version", ("a_later_key",), {"of": ["any", "kind"]}),
        ("a key of a later version in a program", (*P, "a_later_key"), 1),
        ("no chat template", ("chat_template",), None),
        ("the chat template is left out", ("chat_template",), REMOVED),
        ("no licence", ("licence",), None),
        ("no token to begin with", ("tokenizer", "bos_token_id"), None),
        ("several end tokens", ("tokenizer", "eos_token_ids"), [2, 3]),
        ("no end token", ("tokenizer", "eos_token_ids"), []),
        ("no weights listed", (*P, "weights"), []),
        ("a cache in half precision", (*C, "dtype"), "float16"),
        ("no runtime options", R, REMOVED),
        ("threads as the runtime likes", (*R, "threads"), 0),
        ("a program of another format", (*P, "format"), "executorch"),
        ("the number of parameters is unknown", ("model", "parameters"), None),
    )
    changed = [_case(f"opens: {name}", {"opens": True}, at, value) for name, at, value in opens]
    return [{"name": "opens: whole", "expect": {"opens": True}}, *changed]


def _fields() -> list[dict[str, Any]]:
    lost = [_case(f"without {_shown(at)}", _refused("field"), at, REMOVED) for at in REQUIRED]
    wrong = [_case(f"{_shown(at)} is {value!r}", _refused("field"), at, value) for at, value in WRONG]
    for name in ("tokens", "length", "logits_start"):
        lost.append(_case(f"the program has no input {name}", _refused("field"), (*P, "inputs", name), REMOVED))
    lost.append(_case("the program has no output logits", _refused("field"), (*P, "outputs", "logits"), REMOVED))
    return [*lost, *wrong]


def _windows() -> list[dict[str, Any]]:
    """A program slides if and only if it has positions, a window shorter than its context and the input for them."""
    takes: tuple[At, Any] = ((*P, "inputs", "first_position"), "first_position")
    opens: tuple[tuple[str, int | None, int | None, bool], ...] = (
        ("with a window alone", 32, None, False),
        ("with a window and no position", 32, 0, False),
        ("with no window", 0, 0, False),
        ("that slides", 32, 4096, True),
    )
    refused: tuple[tuple[str, int | None, int | None, bool], ...] = (
        ("with positions and no input for them", 32, 4096, False),
        ("with an input for positions that it has not", 32, None, True),
        ("with positions and no window", None, 4096, True),
        ("with a window as long as the context", 256, 4096, True),
        ("with a window below 0", -1, None, False),
        ("with positions below 0", 32, -1, True),
    )
    found = []
    for rows, expect in ((opens, {"opens": True}), (refused, _refused("field"))):
        for name, window, positions, has_input in rows:
            stated = {"window": window, "positions": positions}
            pairs: list[tuple[At, Any]] = [((*P, key), value) for key, value in stated.items() if value is not None]
            changes = [{"at": list(at), "set": value} for at, value in [*pairs, *([takes] if has_input else [])]]
            found.append({"name": f"a program {name}", "changes": changes, "expect": expect})
    return found


def _schemas() -> list[dict[str, Any]]:
    newer = _refused("newer-schema")
    return [_case(f"schema {version}", newer, ("schema_version",), version) for version in (2, 3, 1000)]


def _paths() -> list[dict[str, Any]]:
    entry = _entry(FILES[WEIGHTS])
    return [_case(f"lists the file {path!r}", _refused("path"), ("files", path), entry) for path in PATHS]


def _files() -> list[dict[str, Any]]:
    def bundle(name: str, reason: str, files: dict[str, str | None]) -> dict[str, Any]:
        return {"name": name, "files": files, "expect": _refused(reason)}

    longer, other = FILES[WEIGHTS] + "x", FILES[WEIGHTS].upper()
    size = _case("states another size", _refused("size"), ("files", WEIGHTS, "size_bytes"), len(FILES[WEIGHTS]) - 1)
    digest = _case("states another SHA-256", _refused("hash"), ("files", WEIGHTS, "sha256"), "0" * 64)
    upper = _case("the SHA-256 is empty", _refused("hash"), ("files", WEIGHTS, "sha256"), "")
    return [
        bundle("a file is missing", "missing-file", {WEIGHTS: None}),
        bundle("the tokenizer is missing", "missing-file", {"tokenizer.json": None}),
        bundle("a file too many", "extra-file", {"onnx/extra.bin": "x"}),
        bundle("a file too many beside the manifest", "extra-file", {"notes.txt": "x"}),
        bundle("a file is longer", "size", {WEIGHTS: longer}),
        bundle("a file is shorter", "size", {WEIGHTS: FILES[WEIGHTS][:-1]}),
        bundle("a file is empty", "size", {WEIGHTS: ""}),
        bundle("a file of the same size was changed", "hash", {WEIGHTS: other}),
        size,
        digest,
        upper,
        _case("the tokenizer is not listed", _refused("not-listed"), ("files", "tokenizer.json"), REMOVED),
        _case("a program's file is not listed", _refused("not-listed"), ("files", WEIGHTS), REMOVED),
        _case("a program has a file that is not there", _refused("not-listed"), (*P, "files"), ["onnx/other.onnx"]),
        _case("lists a file that is not there", _refused("missing-file"), ("files", "onnx/other.onnx"), _entry("x")),
    ]


def _texts() -> list[dict[str, Any]]:
    texts = [*TEXTS, '{"schema_version": 1, "edgekit_version": "\\ud800"}']
    reasons = {"[]": "field", "null": "field", "1": "field", '"text"': "field", "{}": "field"}
    found = [
        {"name": f"the manifest is {text!r}", "manifest_text": text, "expect": _refused(reasons.get(text, "not-json"))}
        for text in texts
    ]
    return [*found, {"name": "there is no manifest", "manifest_text": None, "expect": _refused("no-manifest")}]


def _case(name: str, expect: dict[str, Any], at: At, value: Any) -> dict[str, Any]:
    change = {"at": list(at)} | ({"remove": True} if value is REMOVED else {"set": value})
    return {"name": name, "changes": [change], "expect": expect}


def _refused(reason: str) -> dict[str, Any]:
    return {"error": "BundleError", "reason": reason}


def _shown(at: At) -> str:
    return ".".join(str(part) for part in at)
