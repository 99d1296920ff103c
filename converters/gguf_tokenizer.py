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
from collections.abc import Mapping

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
from .tokenizer_document import (
    BYTE_LEVEL,
    bpe_model,
    split_pre_tokenizer,
    tokenizer_document,
    wrapping_post_processor,
)

__all__ = ["SPACE", "tokenizer_json"]

SPACE = "\u2581"
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
    return tokenizer_document(
        added_tokens=_added_tokens(metadata, vocabulary),
        pre_tokenizer=split_pre_tokenizer(rules.splits),
        post_processor=_post_processor(metadata, vocabulary, add_bos=rules.add_bos),
        decoder=BYTE_LEVEL,
        model=bpe_model(vocabulary.ids, merges, ignore_merges=rules.ignore_merges),
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
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    return tokenizer_document(
        added_tokens=_added_tokens(metadata, vocabulary, strip_right=architecture == "phi3"),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        post_processor=_post_processor(metadata, vocabulary, add_bos=True),
        decoder={"type": "Sequence", "decoders": decoders},
        model=bpe_model(
            vocabulary.ids,
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
        plain = token.replace(SPACE, " ")
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
    return wrapping_post_processor(bos, eos, vocabulary.ids)


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
