"""funcattn as an attention implementation of Hugging Face transformers.

fa.interop.register_transformers()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="funcattn")
"""

import sys
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..core import errors
from ..kernels import attend, attention, attention_with_score
from ..masks import Mask
from .closing import dropout_key

DOOR = "transformers attention"  # the function name in errors


def register_transformers() -> None:
    """Register "funcattn" with transformers, as an attention function and its masks; idempotent.

    Models built with attn_implementation="funcattn" compose, through `functional` or
    torch.func.functional_call: grad, jvp, hvp, and vmap with an attention_mask for each row, where
    "sdpa" fails inside the mask code of transformers. Keys of grouped heads are not repeated; the
    sinks of gpt-oss and, more slowly, the soft caps of Gemma 2 are implemented. Attention dropout
    in training takes its key from an `override_sdpa(key=...)` around the call.
    output_attentions=True returns dense weights, zero where a query sees no key. An option of
    transformers that is not implemented raises.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as missing:
        raise ImportError(
            "register_transformers: transformers should be installed, got none. Run pip install "
            "transformers."
        ) from missing
    AttentionInterface.register("funcattn", _attend)
    AttentionMaskInterface.register("funcattn", _mask)


# Options without effect here: the mask has the positions, and what a model's loss reads passes
# through its attention too; the last two are of bergson's weighted loss.
KNOWN = frozenset(
    {
        *(
            "position_ids",
            "cache_position",
            "use_cache",
            "return_dict",
            "output_hidden_states",
            "output_router_logits",
            "labels",
        ),
        *("num_items_in_batch", "logits_to_keep", "max_length_q", "max_length_k", "deterministic"),
        *("shift_labels", "ignore_index", "example_weight", "shift_loss_mask"),
    }
)


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
    cache: object = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    indices: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: object,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, H, T, D), k, v (B, K, S, D): out (B, T, H, D), weights (B, H, T, S).

    s_aux (H,) and sinks (B, H, T, 1) are one more logit for each head or query without a value:
    they scale out by exp(lse) / (exp(lse) + exp(s)). cu_seq_lens and seq_idx give the document of
    each token, indices (B, T, n) the keys that a query sees. Any other option that is not in KNOWN
    raises, unless it is None. Weights are None unless they are requested.
    """
    if cache is not None:
        errors.fail(
            DOOR,
            "cache",
            "None",
            "a paged cache",
            'Take attn_implementation="sdpa" for continuous batching.',
        )
    T, S = query.shape[-2], key.shape[-2]
    _check_others(others, attention_mask, T, S)
    mask, bias = attention_mask, position_bias
    if (
        mask is None
        and T > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        mask = masks.causal(T, S, offset=torch.zeros((), dtype=torch.int64, device=query.device))
    elif mask is not None and mask.is_floating_point():
        mask, bias = None, mask if bias is None else mask + bias
    seen = _both(
        _documents(query, key, cu_seq_lens_q, cu_seq_lens_k, seq_idx), _chosen(key, indices)
    )
    if seen is not None:
        mask = _both(mask.dense(S) if isinstance(mask, Mask) else mask, seen)
    sink = (
        s_aux.unsqueeze(-1) if s_aux is not None else None if sinks is None else sinks.squeeze(-1)
    )
    if dropout and (sink is not None or softcap is not None):
        errors.fail(
            DOOR,
            "dropout",
            "0 with sinks or a soft cap",
            dropout,
            "Set the model's attention_dropout to zero.",
        )
    if softcap is not None and bias is not None:
        errors.fail(
            DOOR, "attention_mask", "of booleans with a soft cap", "numbers", "Pass mask == 0."
        )
    drawn = dropout_key(dropout)

    def mixed(value: Tensor) -> Tensor:
        if sink is None and softcap is None:
            return attention(
                query, key, value, mask, scale=scaling, bias=bias, dropout=dropout, key=drawn
            )
        if softcap is None:
            out, lse = attend(query, key, value, mask, scale=scaling, bias=bias)
        else:
            capped = lambda s, b, h, i, j, cap=softcap: cap * torch.tanh(s / cap)
            out, lse = attention_with_score(query, key, value, capped, mask, scale=scaling)
        return out if sink is None else out * torch.sigmoid(lse - sink).unsqueeze(-1).to(out.dtype)

    weights = None
    if output_attentions or _weights_are_collected():
        one_hot = torch.eye(S, dtype=value.dtype, device=value.device)
        # attention with one-hot values returns the weights
        weights = mixed(one_hot.expand(*key.shape[:-2], S, S))
    return mixed(value).transpose(1, 2).contiguous(), weights


def _weights_are_collected() -> bool:
    """True where hooks of transformers collect weights, since GPT-2 drops output_attentions."""
    collector: Any = getattr(
        sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None
    )
    if collector is None:
        return False
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _check_others(others: dict[str, Any], mask: Tensor | None, T: int, S: int) -> None:
    """Raise for an option that is not implemented."""
    remedy = 'Take attn_implementation="eager", or leave it out.'
    for name, option in others.items():
        if option is None or name in KNOWN:
            continue
        if name != "sliding_window":
            errors.fail(DOOR, name, "None, since nothing here reads it", option, remedy)
        if mask is None and T > 1 and option < S:
            errors.fail(
                DOOR,
                name,
                f"at least {S}, the keys, where no attention_mask says it",
                option,
                remedy,
            )


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def _documents(
    query: Tensor,
    key: Tensor,
    begin: Tensor | None,
    begin_keys: Tensor | None,
    number: Tensor | None,
) -> Tensor | None:
    """Booleans (B or 1, 1, T, S), True where query and key are in one document; None: no documents.

    Args:
        query, key: (B, H, T, D) and (B, K, S, D).
        begin, begin_keys: (documents + 1,) offsets of documents, for a batch of one.
        number: (B, T), the index of the document of each token.
    """
    T, S = query.shape[-2], key.shape[-2]
    if begin is not None or begin_keys is not None:
        if begin is None or begin_keys is None or query.shape[0] != 1:
            got = f"a batch of {query.shape[0]}"
            errors.fail(
                DOOR,
                "cu_seq_lens_q",
                "given with cu_seq_lens_k, in a batch of one",
                got,
                "Pack the batch into one row.",
            )
        of = lambda ends, n: torch.searchsorted(
            ends[1:].contiguous(), torch.arange(n, device=ends.device), right=True
        )
        return (of(begin, T).unsqueeze(-1) == of(begin_keys, S))[None, None]
    if number is None:
        return None
    if number.shape[-1] != T or T != S:
        errors.fail(
            DOOR,
            "seq_idx",
            f"(B, {T}) for {S} keys",
            errors.shape(number),
            "Leave it out with a cache.",
        )
    return (number.unsqueeze(-1) == number.unsqueeze(-2)).unsqueeze(-3)


def _chosen(key: Tensor, indices: Tensor | None) -> Tensor | None:
    """Booleans (B, 1, T, S), True for the keys in indices (B, T, n), -1 for none; None: all."""
    if indices is None:
        return None
    S = key.shape[-2]
    places = torch.where(indices < 0, S, indices).long()
    return torch.zeros(*places.shape[:-1], S + 1, dtype=torch.bool, device=key.device).scatter(
        -1, places, True
    )[:, None, :, :S]


def _mask(*sizes: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The boolean mask (B, 1, T, S) of transformers, or None for plain causal attention.

    transformers reads the values of attention_mask to leave it out if possible; under vmap it
    cannot, so the mask is kept.
    """
    from transformers.masking_utils import sdpa_mask

    if (
        attention_mask is not None
        and not torch.compiler.is_compiling()
        and errors.value(attention_mask) is None
    ):
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*sizes, attention_mask=attention_mask, **options)
