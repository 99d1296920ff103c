"""Tokenizer of a GGUF file, as the text of a Hugging Face `tokenizer.json`.

A GGUF carries a vocabulary and the names of the rules around it. Two kinds are handled: byte-level BPE with a named
pre-tokenizer (`tokenizer.ggml.model` "gpt2") and SentencePiece BPE ("llama", and "gemma4", which brings its merges).

Where readers of GGUF disagree, the rules that the model was trained with decide:

- The pre-tokenizer is the one the file names, never a general one in its stead. Transformers knows about twenty of the
  names and splits the rest as GPT-2 does; for `smollm` that shows in runs of spaces before digits.
- A file that does not say whether BOS is added gets llama.cpp's default for its pre-tokenizer: yes for Llama 3 and
  Tekken, no for the other byte-level ones. Transformers then adds none.
- Control tokens are matched whole even if their text is not in the byte alphabet (DeepSeek's); transformers drops them.
- SentencePiece puts its space before the text even if that starts with one, and so do llama.cpp and the
  `tokenizer.json` of Llama 2, TinyLlama and Phi-3, which put another after each control token. Transformers puts one
  in front of the first word only.
- `add_space_prefix` counts for SentencePiece only, as in llama.cpp and transformers.
- Control, byte and user-defined tokens take no part in derived merges, as in SentencePiece: typing `<0x41>` gives six
  characters, not the byte.
- Phi-3's control tokens swallow the white space after them, as in its `tokenizer.json` and in llama.cpp.
- SentencePiece finds user-defined tokens after the leading space was added, this tokenizer before; and it takes unused
  tokens apart again, which cannot be expressed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from edgekit.errors import SourceError, UnsupportedError

from .gguf_pretokenizer import PRE_TOKENIZERS, PreTokenizer
from .gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_flag,
    read_merges,
    read_scores,
    read_text,
    read_token_id,
    read_vocabulary,
)

__all__ = ["tokenizer_json"]

_SPACE = "\u2581"
_SENTENCEPIECE_MODELS = ("gemma4", "llama")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_json(metadata: Mapping[str, object]) -> str:
    """Write the `tokenizer.json` that a GGUF's metadata describes; the same metadata gives the same text.

    Args:
        metadata: Keys and values of the file's header. Lists may be numpy arrays.

    Raises:
        SourceError: The metadata is incomplete or contradicts itself.
        UnsupportedError: The tokenizer or its pre-tokenizer is of a kind EdgeKit does not know.
    """
    model = read_text(metadata, "model")
    if model is None:
        raise SourceError(
            "the GGUF has no tokenizer: tokenizer.ggml.model is missing", hint="use a file that includes its tokenizer"
        )
    if model == "gpt2":
        document = _byte_level(metadata)
    elif model in _SENTENCEPIECE_MODELS:
        document = _sentencepiece(metadata)
    else:
        raise UnsupportedError(
            f"the GGUF tokenizer model {model[:60]!r} is not supported",
            hint="supported: gpt2 (byte-level BPE), llama and gemma4 (SentencePiece BPE)",
        )
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _byte_level(metadata: Mapping[str, object]) -> dict[str, object]:
    rules = _pre_tokenizer(metadata)
    vocabulary = read_vocabulary(metadata)
    merges = read_merges(metadata, vocabulary)
    if merges is None:
        raise SourceError(
            "GGUF metadata tokenizer.ggml.merges is missing", hint="convert the model again with a current llama.cpp"
        )
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in rules.splits
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _document(
        added_tokens=_added_tokens(metadata, vocabulary),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        post_processor=_post_processor(metadata, vocabulary, add_bos=rules.add_bos),
        decoder=byte_level,
        model=_bpe(vocabulary, merges, ignore_merges=rules.ignore_merges),
    )


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    name = read_text(metadata, "pre")
    if name is None:
        raise UnsupportedError(
            "the GGUF does not name its pre-tokenizer (tokenizer.ggml.pre)",
            hint="it was made by an old converter; convert the model again with a current llama.cpp",
        )
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"the GGUF pre-tokenizer {name[:60]!r} is not supported", hint="known: " + ", ".join(sorted(PRE_TOKENIZERS))
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece(metadata: Mapping[str, object]) -> dict[str, object]:
    _refuse_normalizers(metadata)
    vocabulary = _respell_spaces(read_vocabulary(metadata))
    architecture = metadata.get("general.architecture")
    gemma = isinstance(architecture, str) and architecture.startswith("gemma")
    merges = read_merges(metadata, vocabulary)
    if merges is None:
        scores = read_scores(metadata, vocabulary)
        # Gemma's scores do not follow the order in which its merges were learned; the ids do.
        merges = _derive_merges(vocabulary, [0.0] * len(scores) if gemma else scores)
    prefix = read_flag(metadata, "add_space_prefix", not gemma)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    return _document(
        added_tokens=_added_tokens(metadata, vocabulary, strip_right=architecture == "phi3"),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        post_processor=_post_processor(metadata, vocabulary, add_bos=True),
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocabulary,
            merges,
            unk_token=_unknown(metadata, vocabulary),
            byte_fallback=_BYTES.issubset(vocabulary.ids),
        ),
    )


def _refuse_normalizers(metadata: Mapping[str, object]) -> None:
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None or read_flag(metadata, "remove_extra_whitespaces", False):
        raise UnsupportedError(
            "the GGUF tokenizer rewrites text (precompiled_charsmap, remove_extra_whitespaces), which is not supported",
            hint="convert from the original checkpoint with its own tokenizer.json",
        )


def _respell_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """Spell the spaces of user-defined tokens as text has them, because they are matched before it is normalized."""
    ids = dict(vocabulary.ids)
    tokens = list(vocabulary.tokens)
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        plain = token.replace(_SPACE, " ")
        if kind == USER_DEFINED and plain != token and plain not in ids:
            del ids[token]
            ids[plain] = index
            tokens[index] = plain
    return Vocabulary(tokens, vocabulary.kinds, ids)


def _derive_merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first: the pair with the highest score is merged first."""
    pieces = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED) and token not in _BYTES
    }
    merges = []
    for token in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in pieces and token[cut:] in pieces:
                merges.append((token[:cut], token[cut:]))
    return merges


def _unknown(metadata: Mapping[str, object], vocabulary: Vocabulary) -> str | None:
    index = read_token_id(metadata, "unknown_token_id", vocabulary)
    if index is None:
        index = next((i for i, kind in enumerate(vocabulary.kinds) if kind == UNKNOWN), vocabulary.ids.get("<unk>"))
    return None if index is None else vocabulary.tokens[index]


def _added_tokens(
    metadata: Mapping[str, object], vocabulary: Vocabulary, *, strip_right: bool = False
) -> list[dict[str, object]]:
    # Some converters forget to mark the ends of a sequence or a turn as control tokens.
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
    ends = {read_token_id(metadata, name, vocabulary) for name in names}
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        special = kind in (UNKNOWN, CONTROL) or index in ends
        if special or kind == USER_DEFINED:
            added.append(
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": strip_right and token not in _PHI3_KEEPS_SPACE,
                    "normalized": False,
                    "special": special,
                }
            )
    return added


def _post_processor(
    metadata: Mapping[str, object], vocabulary: Vocabulary, *, add_bos: bool
) -> dict[str, object] | None:
    bos = _wrapper(metadata, vocabulary, "bos", "<s>", default=add_bos)
    eos = _wrapper(metadata, vocabulary, "eos", "</s>", default=False)
    if not bos and not eos:
        return None
    single = [*_template(bos, 0), {"Sequence": {"id": "A", "type_id": 0}}, *_template(eos, 0)]
    pair = [*single, *_template(bos, 1), {"Sequence": {"id": "B", "type_id": 1}}, *_template(eos, 1)]
    special = {text: {"id": text, "ids": [vocabulary.ids[text]], "tokens": [text]} for text in sorted({*bos, *eos})}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _wrapper(
    metadata: Mapping[str, object], vocabulary: Vocabulary, name: str, usual: str, *, default: bool
) -> list[str]:
    flag = f"add_{name}_token"
    if not read_flag(metadata, flag, default):
        return []
    index = read_token_id(metadata, f"{name}_token_id", vocabulary)
    if index is None:
        index = vocabulary.ids.get(usual)
    if index is not None:
        return [vocabulary.tokens[index]]
    if f"tokenizer.ggml.{flag}" not in metadata:
        return []
    raise SourceError(
        f"GGUF metadata tokenizer.ggml.{flag} asks for a token that tokenizer.ggml.{name}_token_id does not name",
        hint="convert the model again with a current llama.cpp",
    )


def _template(texts: Iterable[str], type_id: int) -> list[dict[str, object]]:
    return [{"SpecialToken": {"id": text, "type_id": type_id}} for text in texts]


def _bpe(
    vocabulary: Vocabulary,
    merges: list[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, object]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        # SentencePiece gives one unknown token for a run of unknown characters.
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(sorted(vocabulary.ids.items(), key=lambda item: item[1])),
        "merges": merges,
    }


def _document(
    *,
    added_tokens: list[dict[str, object]],
    model: dict[str, object],
    decoder: dict[str, object],
    post_processor: dict[str, object] | None,
    normalizer: dict[str, object] | None = None,
    pre_tokenizer: dict[str, object] | None = None,
) -> dict[str, object]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }
