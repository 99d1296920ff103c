"""The parts of a Hugging Face `tokenizer.json`, as every reader of another format puts them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["BYTE_LEVEL", "bpe_model", "split_pre_tokenizer", "tokenizer_document", "wrapping_post_processor"]

# Spells the bytes of a text as letters; as a decoder, the way back.
BYTE_LEVEL: Mapping[str, object] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def split_pre_tokenizer(patterns: Iterable[str], *, byte_level: Mapping[str, object] = BYTE_LEVEL) -> dict[str, object]:
    """Cut text by patterns, one after another, then spell its bytes as letters."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def wrapping_post_processor(
    begins: Sequence[str], ends: Sequence[str], ids: Mapping[str, int]
) -> dict[str, object] | None:
    """Put tokens before and after each text; None where there are none."""
    if not begins and not ends:
        return None
    single = [*_template(begins, 0), {"Sequence": {"id": "A", "type_id": 0}}, *_template(ends, 0)]
    pair = [*single, *_template(begins, 1), {"Sequence": {"id": "B", "type_id": 1}}, *_template(ends, 1)]
    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in sorted({*begins, *ends})}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _template(texts: Iterable[str], type_id: int) -> list[dict[str, object]]:
    return [{"SpecialToken": {"id": text, "type_id": type_id}} for text in texts]


def bpe_model(
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, object]:
    """The model of byte pair encoding; the vocabulary is written in the order of its ids."""
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
        "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
        "merges": merges,
    }


def tokenizer_document(
    *,
    added_tokens: Sequence[Mapping[str, object]],
    model: Mapping[str, object],
    decoder: Mapping[str, object],
    post_processor: Mapping[str, object] | None,
    normalizer: Mapping[str, object] | None = None,
    pre_tokenizer: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The whole file."""
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
