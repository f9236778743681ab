"""How a byte-level tokenizer cuts text before its merges, by the names of `tokenizer.ggml.pre`.

Each entry is regular expressions, applied one after the other to the pieces of the one before:
their matches become pieces, and so does what is between them. They are those of the tokenizer.json
of the models that a name stands for, where llama.cpp quotes it, else those of llama.cpp.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe.
"""

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

from .tokenizer_json import LLAMA3, QWEN2

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_case(upper: str, lower: str, after: str, numbers: str, ends: str = "/") -> str:
    """Words that begin with capitals and end with small letters, as o200k cuts them."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{after}|{before}{upper}+{lower}*{after}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{ends}]*|{LINES}"


BY_CASE = f"[{UPPER}]", f"[{LOWER}]"
O200K = _by_case(*BY_CASE, f"{ENGLISH}?", r"\p{N}{1,3}")
TEKKEN = _by_case(*BY_CASE, "", DIGIT)
NOT_HAN = rf"[{UPPER}&&[^\p{{Han}}]]", rf"[{LOWER}&&[^\p{{Han}}]]"
KIMI = r"[\p{Han}]+|" + _by_case(*NOT_HAN, f"{ENGLISH}?", r"\p{N}{1,3}", "")
ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}",
)
CJK = "[一-龥ࠀ-一가-퟿]+"
# letters of scripts with two cases, as DeepSeek LLM lists them
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    CJK,
    r"\p{N}+",
)
DEEPSEEK_CODER = r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
QWEN35 = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}"
EXAONE_MOE = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """Expressions; whether a piece that is a token is not cut at all; whether texts begin with the
    first token where the file does not say.
    """

    expressions: tuple[str, ...]
    ignores_merges: bool = False
    begins: bool = False


def _named(names: str, *expressions: str, ignores: bool = False, begins: bool = False) -> dict:
    return dict.fromkeys(names.split(), Split(expressions, ignores, begins))


SPLITS: dict[str, Split] = {
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        LLAMA3,
        ignores=True,
        begins=True,
    ),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", LLAMA3),
    **_named(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", QWEN2
    ),
    **_named("qwen35", QWEN35),
    **_named(
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum modern-bert "
        "exaone4 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
        GPT2,
    ),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", DIGIT, GPT2),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **_named("deepseek-llm", *DEEPSEEK_LLM),
    **_named("deepseek-coder", *DEEPSEEK_CODER),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *DEEPSEEK3),
    **_named("tekken", TEKKEN, ignores=True, begins=True),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", O200K),
    **_named("tiny_aya cohere2moe", r"\d{1,3}(?=(?:\d{3})*\b)", O200K),
    **_named("kimi-k2", KIMI),
    **_named("poro-chat bloom gpt3-finnish", BLOOM),
    **_named("viking", BLOOM, DIGIT),
    **_named("bailingmoe bailingmoe2 llada-moe", BAILING),
    **_named("seed-coder", SEED_CODER),
    **_named("exaone-moe", EXAONE_MOE),
    **_named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
        begins=True,
    ),
}


def pre_tokenizer(split: Split) -> pre_tokenizers.PreTokenizer:
    """The component that cuts text so, and writes its bytes as the letters of the vocabulary."""
    *first, last = split.expressions
    words = last == GPT2  # which the library knows
    parts: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True)
        if expression == DIGIT
        else pre_tokenizers.Split(Regex(expression), "isolated")
        for expression in (first if words else split.expressions)
    ]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    return pre_tokenizers.Sequence([*parts, whole]) if parts else whole
