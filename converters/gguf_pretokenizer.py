"""The pre-tokenizers a GGUF can name: how a byte-level vocabulary cuts text into words before its merges run.

`tokenizer.ggml.pre` holds only a name; what it stands for is fixed by llama.cpp and by the `tokenizer.json` of the
model family that the name was made for. Where the two write one rule differently (llama.cpp's regex engine knows no
`(?i:...)`), the family's own pattern is used. Patterns are in the dialect of the `tokenizers` library (Oniguruma).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a `tokenizer.ggml.pre` name stands for.

    Attributes:
        splits: Patterns, applied one after another; each match and each gap between matches becomes a piece of its own.
        ignore_merges: Take a whole piece that is a token as that token, before trying any merge.
        add_bos: Whether text starts with BOS when the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_DIGITS_3 = r"\p{N}{1,3}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_CONTRACTION}|{_WORD}|{_DIGITS_3}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = f"{_CONTRACTION}|{_WORD}|{_DIGIT}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(
    after_word: str, digits: str, *, upper: str = _UPPER, lower: str = _LOWER, symbols_end: str = r"[\r\n/]*"
) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{after_word}|{lead}{upper}+{lower}*{after_word}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{symbols_end}|{_SPACES}"


_TEKKEN = _cased("", _DIGIT)
_GPT4O = _cased(f"{_CONTRACTION}?", _DIGITS_3)
_KIMI = r"\p{Han}+|" + _cased(
    f"{_CONTRACTION}?",
    _DIGITS_3,
    upper=r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    lower=r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    symbols_end=r"[\r\n]*",
)

_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_LINE_BREAK = r"[\r\n]"
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    _LINE_BREAK,
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (_LINE_BREAK, r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)
_MARKED_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_MARKED = rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_DEEPSEEK_V3 = (_DIGITS_3, _CJK_KANA, _MARKED)
_SPARK = (_DIGITS_3, _CJK_KANA, rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", _DIGIT)
_AFMOE = (
    # Digits in threes counted from the right, as a number is read.
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
    _MARKED,
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK_KANA,
    _cased(f"{_CONTRACTION}?", _DIGIT),
)
_JAIS2 = (
    f"{_CONTRACTION}|{_WORD}|{_DIGITS_3}|{_SYMBOLS}"
    r"|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
    r"|\s{1,2}(?!\S)|\s{1}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    _DIGIT,
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
_MINICPM5 = (_DIGITS_3, rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_TINY_AYA = (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)
# SuperBPE cuts at every place with a multiple of three digits to its right; this matches what lies between the cuts.
_SUPERBPE = (r"\p{N}+", r"\d{1,3}(?=(?:\d{3})*(?!\d))")

_GPT2_WORDS = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3_WORDS = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA3_MERGED = PreTokenizer((_LLAMA3,))
_QWEN2_WORDS = PreTokenizer((_QWEN2,))
_GPT4O_WORDS = PreTokenizer((_GPT4O,))
_DEEPSEEK_V3_WORDS = PreTokenizer(_DEEPSEEK_V3)
_BLOOM_WORDS = PreTokenizer((_BLOOM,))
_BAILING_WORDS = PreTokenizer((_BAILING,))
_TINY_AYA_WORDS = PreTokenizer(_TINY_AYA)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "a.x-4.0": _GPT2_WORDS,
    "afmoe": PreTokenizer(_AFMOE),
    "bailingmoe": _BAILING_WORDS,
    "bailingmoe2": _BAILING_WORDS,
    "bloom": _BLOOM_WORDS,
    "chameleon": PreTokenizer(_CHAMELEON, add_bos=True),
    "chatglm-bpe": _LLAMA3_MERGED,
    "codeshell": _SINGLE_DIGITS,
    "cohere2moe": _TINY_AYA_WORDS,
    "command-r": _SINGLE_DIGITS,
    "dbrx": _LLAMA3_MERGED,
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "deepseek-v3": _DEEPSEEK_V3_WORDS,
    "default": PreTokenizer(_DEFAULT),
    "exaone": _SINGLE_DIGITS,
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "exaone4": _GPT2_WORDS,
    "f2llmv2": _QWEN2_WORDS,
    "falcon": PreTokenizer(_FALCON),
    "falcon-h1": _LLAMA3_WORDS,
    "falcon3": _LLAMA3_WORDS,
    "gigachat": _GPT2_WORDS,
    "glm4": _LLAMA3_MERGED,
    "gpt-2": _GPT2_WORDS,
    "gpt-4o": _GPT4O_WORDS,
    "gpt3-finnish": _BLOOM_WORDS,
    "granite-docling": _GPT2_WORDS,
    "grok-2": _QWEN2_WORDS,
    "hunyuan": _QWEN2_WORDS,
    "hunyuan-dense": _DEEPSEEK_V3_WORDS,
    "hy_v4": _DEEPSEEK_V3_WORDS,
    "jais": _GPT2_WORDS,
    "jais-2": PreTokenizer((_JAIS2,)),
    "jina-v5-nano": _LLAMA3_WORDS,
    "joyai-llm": _DEEPSEEK_V3_WORDS,
    "kanana2": _GPT4O_WORDS,
    "kimi-k2": PreTokenizer((_KIMI,)),
    "kormo": _QWEN2_WORDS,
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "lfm2": _LLAMA3_WORDS,
    "llada-moe": _BAILING_WORDS,
    "llama-bpe": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama4": _GPT4O_WORDS,
    "megrez": _QWEN2_WORDS,
    "mellum": _GPT2_WORDS,
    "mellum2": _SINGLE_DIGITS,
    "midm-2.0": _LLAMA3_WORDS,
    "minerva-7b": _SINGLE_DIGITS,
    "minicpm5": PreTokenizer(_MINICPM5, ignore_merges=True),
    "minimax-m2": _GPT4O_WORDS,
    "mpt": _GPT2_WORDS,
    "olmo": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "pixtral": _LLAMA3_WORDS,
    "poro-chat": _BLOOM_WORDS,
    "qwen2": _QWEN2_WORDS,
    "qwen35": PreTokenizer((_QWEN35,)),
    "refact": _SINGLE_DIGITS,
    "seed-coder": PreTokenizer((_SEED,)),
    "smaug-bpe": _LLAMA3_MERGED,  # SmolLM3 too
    "smollm": _SINGLE_DIGITS,
    "solar-open": _QWEN2_WORDS,
    "spark2_5": PreTokenizer(_SPARK),
    "stablelm2": _QWEN2_WORDS,
    "starcoder": _SINGLE_DIGITS,
    "superbpe": PreTokenizer(_SUPERBPE),
    "talkie": _GPT4O_WORDS,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "tiny_aya": _TINY_AYA_WORDS,
    "trillion": _GPT2_WORDS,
    "ufakzeka": PreTokenizer((f"{_WORD}|{_DIGIT}|{_SYMBOLS}|{_SPACES}",)),
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    "youtu": PreTokenizer(_YOUTU, ignore_merges=True),
}
