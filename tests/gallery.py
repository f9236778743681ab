"""Kernels of attention for `funcattn check`: right ones, one of each signature, and wrong ones,
each of which breaks a law that names its mistake.

A wrong kernel is the definition with one line changed. What is differentiated wrongly is an
autograd Function, as kernels are.
"""

import torch
from torch.autograd import Function
from torch.func import jvp, vjp

import funcattn as fa
from funcattn.masks import Mask
from funcattn.testing import dense

INF = float("inf")


def repeated(x, q):
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def logits(q, k):
    return q @ repeated(k, q).mT / q.shape[-1] ** 0.5


def weights(S, seen):
    """The softmax over the keys that are seen; zero where there are none."""
    empty = ~seen.any(-1, keepdim=True)
    return torch.where(empty, 0, torch.where(seen | empty, S, -INF).softmax(-1))


def definition(q, k, v, seen):
    return weights(logits(q, k), seen) @ repeated(v, q)


# Right.


def closed(q, k, v, mask):
    """The library's own, with its log-sum-exp."""
    return fa.attend(q, k, v, mask)


def by_booleans(q, k, v, mask):
    return definition(q, k, v, mask)


def as_sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    T, S = q.shape[-2], k.shape[-2]
    if attn_mask is None:
        seen = torch.ones(T, S, dtype=torch.bool)
        attn_mask = seen.tril() if is_causal else seen
    return definition(q, k, v, attn_mask)


def as_flash(q, k, v, causal=False):
    """(B, T, H, D), with the log-sum-exp."""
    swap = lambda x: x.transpose(1, 2)
    mask = fa.masks.causal(q.shape[1]) if causal else None
    out, lse = fa.attend(swap(q), swap(k), swap(v), mask)
    return swap(out), lse


def by_blocks(q, k, v):
    """Causal, two keys at a time with a running maximum."""
    T, S = q.shape[-2], k.shape[-2]
    top = q.new_full((*q.shape[:-1], 1), -INF)
    mass, out = torch.zeros_like(top), q.new_zeros(*q.shape[:-1], v.shape[-1])
    for j in range(0, S, 2):
        seen = torch.arange(T).unsqueeze(-1) >= torch.arange(j, min(j + 2, S))
        block = torch.where(seen, logits(q, k[..., j : j + 2, :]), -INF)
        new = torch.maximum(top, block.amax(-1, keepdim=True).detach())
        fade, P = (top - new).exp(), torch.where(seen, (block - new).exp(), 0)
        mass, out = (
            mass * fade + P.sum(-1, keepdim=True),
            out * fade + P @ repeated(v[..., j : j + 2, :], q),
        )
        top = new
    return out / mass


# Wrong.


def wrong_scale(q, k, v, mask):
    return dense.attend(q, k, v, mask, scale=1.0)


def sees_the_next_key(q, k, v, mask):
    mask = Mask(mask.start, mask.stop + 1) if isinstance(mask, Mask) else mask
    return definition(q, k, v, dense.seen(mask, q, k))


def maximum_not_subtracted(q, k, v, mask):
    P = torch.where(mask, logits(q, k).exp(), 0)
    mass = P.sum(-1, keepdim=True)
    return P / torch.where(mass == 0, 1, mass) @ repeated(v, q)


def nan_for_an_empty_row(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    T, S = q.shape[-2], k.shape[-2]
    seen = torch.ones(T, S, dtype=torch.bool) if attn_mask is None else attn_mask
    seen = seen.tril() if is_causal else seen
    return torch.where(seen, logits(q, k), -INF).softmax(-1) @ repeated(v, q)


class Right(Function):
    """The definition, with its own derivatives; what others change."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, seen):
        return definition(q, k, v, seen)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        *x, seen = ctx.saved_tensors
        return *vjp(lambda *x: definition(*x, seen), *x)[1](g), None

    @staticmethod
    def jvp(ctx, *tangents):
        *x, seen = ctx.saved_tensors
        return jvp(lambda *x: definition(*x, seen), tuple(x), tangents[:3])[1]


class ZeroTangent(Right):
    @staticmethod
    def jvp(ctx, *tangents):
        return torch.zeros_like(definition(*ctx.saved_tensors))


class FirstHeadOfEachGroup(Right):
    """The gradients of k and v are of one query head of a group, not the sum over all."""

    @staticmethod
    def backward(ctx, g):
        q, k, v, seen = ctx.saved_tensors
        of_q, of_k, of_v = vjp(
            lambda q, k, v: definition(q, k, v, seen), q, repeated(k, q), repeated(v, q)
        )[1](g)
        G = q.shape[-3] // k.shape[-3]
        return of_q, of_k[..., ::G, :, :], of_v[..., ::G, :, :], None


class ExamplesMixed(Right):
    """The batching rule takes keys and values of the example before."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, *inputs):
        of = lambda n: [
            x if d is None else x.select(d, n) for x, d in zip(inputs, in_dims, strict=True)
        ]
        return torch.stack(
            [definition(of(n)[0], *of(n - 1)[1:]) for n in range(info.batch_size)]
        ), 0


def as_kernel(function):
    """(B, H, T, D), and booleans (B, H, T, S)."""

    def kernel(q, k, v, mask):
        return function.apply(q, k, v, mask)

    return kernel


tangent_is_zero = as_kernel(ZeroTangent)
gradient_of_one_head = as_kernel(FirstHeadOfEachGroup)
examples_mixed = as_kernel(ExamplesMixed)

# name -> options of the command
RIGHT = {
    "closed": "",
    "by_booleans": "--signature dense",
    "as_sdpa": "",
    "as_flash": "",
    "by_blocks": "--signature causal",
}
# name -> options, and the law that says what is wrong
WRONG = {
    "wrong_scale": ("", "agrees_with_the_reference"),
    "sees_the_next_key": ("", "future_cannot_change_the_past"),
    "maximum_not_subtracted": (
        "--signature dense",
        "shifting_all_logits_of_a_row_changes_nothing",
    ),
    "nan_for_an_empty_row": ("", "masked_rows_are_zero_with_zero_gradients"),
    "tangent_is_zero": ("--signature dense", "jvp_agrees_with_the_reference"),
    "gradient_of_one_head": ("--signature dense", "gradient_agrees_with_the_reference"),
    "examples_mixed": ("--signature dense", "commutes_with_vmap"),
}
