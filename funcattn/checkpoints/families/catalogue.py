"""The families by name, in order: a Config is written as the first that can express it."""

from .bart import BARTS
from .bert import BERTS
from .delta_nets import OLMO_HYBRID, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from .dense_variants import (
    ARCEE,
    CODEGEN,
    GPTJ,
    HUNYUAN_DENSE,
    HUNYUAN_MOE,
    JAIS2,
    MINISTRAL3,
    NEMOTRON,
    PHI,
)
from .distances import BLOOM, DBRX, MPT, NANOCHAT
from .falcon import FALCON
from .fused import COHERE, COHERE2, PHI3, PHI4_MULTIMODAL, STABLELM, STARCODER2
from .gated import AFMOE, APERTUS, APERTUS_TEXT
from .gemma import GEMMA, GEMMA2, GEMMA3, VAULTGEMMA
from .gemma4 import GEMMA3N, GEMMA4, GEMMA4_UNIFIED
from .gpt import GPT2, GPT_NEOX, GPT_SW3
from .gpt_variants import BIOGPT, GPT_BIGCODE, GPT_NEO, OPENAI_GPT, OPT, XGLM
from .granite import GRANITE_SWA, HYPERCLOVAX
from .granite_mixtures import GRANITEMOE, GRANITEMOE_SWA, GRANITEMOEHYBRID, GRANITEMOESHARED
from .kimi import KIMI_LINEAR
from .laguna import LAGUNA
from .latent_variants import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE_LITE,
    MINICPM3,
    SARVAM_MLA,
    YOUTU,
)
from .layer_norms import CTRL, GPT_NEOX_JAPANESE, MODERNBERT, PERSIMMON
from .llama import (
    GRANITE,
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN2,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3,
    QWEN3_VL,
    SMOLLM3,
)
from .llama4 import LLAMA4
from .llama_variants import (
    CWM,
    ERNIE4_5,
    EXAONE,
    EXAONE4,
    GLM,
    GLM4,
    HELIUM,
    INTERNLM3,
    IQUESTCODER,
    MINISTRAL,
    SEED_OSS,
)
from .mambas import BAMBA, FALCON_H1
from .mimo import MIMO
from .mixture_variants import ERNIE4_5_MOE, FLEX_OLMO, MELLUM, OLMOE, QWEN2_MOE
from .mixtures import GPT_OSS, MIXTRAL, QWEN3_MOE, QWEN3_VL_MOE
from .nemotron_hybrids import NEMOTRON_H
from .olmo import OLMO, OLMO3
from .router_variants import ARIA, COHERE2_MOE, PHIMOE, SARVAM_MOE
from .short_convolutions import LFM2, LFM2_MOE
from .sigmoid_mixtures import DOTS1, EXAONE_MOE, GLM4_MOE, HY_V3, MINIMAX_M2, SOLAR_OPEN
from .tables import Family, refuse

FAMILIES = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, OLMO2),
        *(GEMMA, GEMMA2, GEMMA3),
        *(PHI3, COHERE, STABLELM, STARCODER2),
        *(GPT2, GPT_NEOX),
        *(MIXTRAL, QWEN3_MOE, GPT_OSS),
        *(EXAONE, INTERNLM3, IQUESTCODER, CWM, MINISTRAL, SEED_OSS),
        *(HELIUM, ERNIE4_5, GLM, GLM4, EXAONE4, OLMO, OLMO3, GRANITE_SWA, HYPERCLOVAX),
        *(VAULTGEMMA, COHERE2, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE),
        *(OLMOE, FLEX_OLMO, MELLUM, QWEN2_MOE, ERNIE4_5_MOE),
        *(GRANITEMOE, GRANITEMOESHARED, GRANITEMOE_SWA, GRANITEMOEHYBRID),
        *(GLM4_MOE, DOTS1, SOLAR_OPEN, EXAONE_MOE, HY_V3, MINIMAX_M2),
        *(PHI, GPTJ, CODEGEN, NEMOTRON, JAIS2, ARCEE, HUNYUAN_DENSE, HUNYUAN_MOE, MINISTRAL3),
        *(DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, SARVAM_MLA, YOUTU, MINICPM3),
        *(BAMBA, FALCON_H1, NEMOTRON_H),
        *(FALCON, GPT_BIGCODE, GPT_NEO, OPT, BIOGPT, XGLM),
        *(AFMOE, APERTUS, APERTUS_TEXT, NANOCHAT, BLOOM, MPT, DBRX, LLAMA4, OPENAI_GPT),
        *(ARIA, PHIMOE, COHERE2_MOE, SARVAM_MOE, LAGUNA),
        *(PERSIMMON, GPT_NEOX_JAPANESE, CTRL, MODERNBERT, GPT_SW3, PHI4_MULTIMODAL),
        *(LFM2, LFM2_MOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, OLMO_HYBRID),
        *(GEMMA3N, GEMMA4, GEMMA4_UNIFIED, MIMO, KIMI_LINEAR),
        *BERTS,
        *BARTS,
    )
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # names in files whose classes are those of another


def family_of(name: object, where: str) -> Family:
    """The family of a name in a file; `where` is the field, for the error."""
    found = FAMILIES.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        refuse(where, f"one of {', '.join(FAMILIES)}", name)
    return found
