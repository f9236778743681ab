"""funcattn as an attention implementation of Hugging Face transformers.

fa.interop.register_transformers()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="funcattn")
"""

from typing import Any

import torch
from torch import Tensor

from .. import _checks, masks
from ..kernels import attend, attention, attention_with_score
from .sdpa import dropout_key

DOOR = "transformers attention"  # who speaks in errors


def register_transformers() -> None:
    """Register "funcattn" with transformers, as an attention and for the masks it wants. Calling it again changes nothing.

    Models built with attn_implementation="funcattn" compose, through `functional` or torch.func.functional_call: grad, jvp, hvp,
    and vmap with an attention_mask for each row, where "sdpa" stops inside transformers' own mask code. Keys that heads share are
    not repeated; the sinks of gpt-oss and, more slowly, the soft caps of Gemma 2 are there. Attention dropout while training takes
    its key from an `override_sdpa(key=...)` around the call.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as missing:
        raise ImportError(
            "register_transformers: transformers should be installed, got none. Run pip install transformers."
        ) from missing
    AttentionInterface.register("funcattn", _attend)
    AttentionMaskInterface.register("funcattn", _mask)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q (B, H, T, D), k and v (B, K, S, D) to (B, T, H, D) and no weights.

    s_aux (H,) are sinks, one more logit for each head with no value behind it: they scale out by exp(lse) / (exp(lse) + exp(s)).
    What else transformers passes along (the window, positions) is in the mask already.
    """
    if cache is not None:
        _checks.fail(DOOR, "cache", "None", "a paged cache", 'Take attn_implementation="sdpa" for continuous batching.')
    T, S = query.shape[-2], key.shape[-2]
    mask, bias = attention_mask, position_bias
    if mask is None and T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = masks.causal(T, S, offset=torch.zeros((), dtype=torch.int64, device=query.device))
    elif mask is not None and mask.is_floating_point():
        mask, bias = None, mask if bias is None else mask + bias
    if s_aux is None and softcap is None:
        out = attention(query, key, value, mask, scale=scaling, bias=bias, dropout=dropout, key=dropout_key(dropout))
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        _checks.fail(DOOR, "dropout", "0 with sinks or a soft cap", dropout, "Set the model's attention_dropout to zero.")
    if softcap is None:
        out, lse = attend(query, key, value, mask, scale=scaling, bias=bias)
    elif bias is None:
        capped = lambda s, b, h, i, j: softcap * torch.tanh(s / softcap)
        out, lse = attention_with_score(query, key, value, capped, mask, scale=scaling)
    else:
        _checks.fail(DOOR, "attention_mask", "of booleans with a soft cap", "numbers", "Pass mask == 0.")
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux.unsqueeze(-1)).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _mask(*sizes: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Transformers' own booleans (B, 1, T, S), or None for plain causal attention.

    Transformers looks at the values of attention_mask to find out whether it may be left out, which vmap forbids: there it stays.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is not None and not torch.compiler.is_compiling() and _checks.value(attention_mask) is None:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*sizes, attention_mask=attention_mask, **options)
