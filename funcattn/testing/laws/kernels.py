"""Laws of attention kernels: law(kernel, q, k, v, mask, key).

A kernel is kernel(q, k, v, mask) -> out, or Attended(out, lse), with scale 1 / sqrt(D); the mask is
a Mask, booleans or None. Where it returns lse, laws apply to that too. Laws that change a mask pass
one of the same type, a Mask where it was None.
"""

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ... import masks, randomness, tree
from ...kernels import merge
from ...records import Attended
from .. import dense
from ..agreement import agree, amplitudes, longest, named
from .comparisons import (
    AnyMask,
    Kernel,
    both,
    double,
    finite,
    losses,
    mask_a_row,
    normal,
    of_gradient,
    of_hvp,
    of_logits,
    of_value,
    parts_of,
    take,
    tangents,
    ways_to_shift,
)

EXACT = "exactly: it is a sum over nothing"


@named
def agrees_with_the_reference(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """out and lse equal those of the definition in float64; out has the dtype of v."""
    got, size = parts_of(kernel(q, k, v, mask)), amplitudes(q, k, v)
    if got["out"].dtype != v.dtype:
        raise AssertionError(
            f"agrees_with_the_reference: out should be {v.dtype} as v is, got {got['out'].dtype}."
        )
    wanted = parts_of(dense.attend(q.double(), k.double(), v.double(), mask))
    for name in got:
        agree(agrees_with_the_reference, name, got[name], wanted[name], of_value(size, name), size)


@named
def order_of_keys_does_not_matter(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """Permuting keys, values and the columns of the mask together changes no output."""
    order = randomness.permutation(key, k.shape[-2]).to(k.device)
    wanted, size = parts_of(kernel(q, k, v, mask)), amplitudes(q, k, v)
    got = parts_of(kernel(q, k[..., order, :], v[..., order, :], take(mask, order)))
    for name in got:
        agree(
            order_of_keys_does_not_matter,
            name,
            got[name],
            wanted[name],
            2 * of_value(size, name),
            size,
        )


@named
def output_lies_in_the_hull_of_the_values(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """out is a convex combination: along any direction it is within the range of visible values."""
    if not k.shape[-2]:
        return
    out, size, Dv = parts_of(kernel(q, k, v, mask))["out"], amplitudes(q, k, v), v.shape[-1]
    eye = torch.eye(Dv, dtype=torch.float64, device=v.device)
    directions = torch.cat([eye, torch.nn.functional.normalize(normal(key, eye, (4, Dv)), dim=-1)])
    # (*lead, H, S, directions)
    values = (v.double() @ directions.mT).repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    values = values.mT.unsqueeze(-2)  # (*lead, H, directions, 1, S)
    visible = dense.seen(mask, q, k).unsqueeze(-3)
    sees = visible.any(-1)
    least = torch.where(sees, torch.where(visible, values, torch.inf).amin(-1), 0).mT
    greatest = torch.where(sees, torch.where(visible, values, -torch.inf).amax(-1), 0).mT
    along = out.double() @ directions.mT
    allowed = size.rounding * size.v
    agree(
        output_lies_in_the_hull_of_the_values,
        "out . direction",
        along,
        along.clamp(least, greatest),
        allowed,
        size,
    )


@named
def future_cannot_change_the_past(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """Under a causal mask, keys and queries from a position on do not change earlier rows."""
    T, S = q.shape[-2], k.shape[-2]
    if S < 2:
        return
    where, keys, values = randomness.split(key, 3)
    cut = int(randomness.randint(where, (), 1, S))
    mask = both(mask, tree.to(q.device)(masks.causal(T)), S)
    later = (torch.arange(S, device=k.device) >= cut).unsqueeze(-1)
    other_k = torch.where(later, 4 * normal(keys, k, k.shape), k)
    other_v = torch.where(later, 4 * normal(values, v, v.shape), v)
    wanted, got = parts_of(kernel(q, k, v, mask)), parts_of(kernel(q, other_k, other_v, mask))
    size, before = amplitudes(q, other_k, other_v), slice(0, min(cut, T))
    for name, rows in (("out", (..., before, slice(None))), ("lse", (..., before))):
        if name in got:
            of_past = f"{name} before position {cut}"
            agree(
                future_cannot_change_the_past,
                of_past,
                got[name][rows],
                wanted[name][rows],
                2 * of_value(size, name),
                size,
            )


@named
def shifting_all_logits_of_a_query_changes_only_lse(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """Adding u to every key adds scale q_i . u to the logits and lse of query i, and keeps out."""
    u = normal(key, k, k.shape[-1:])
    before, after = parts_of(kernel(q, k, v, mask)), parts_of(kernel(q, k + u, v, mask))
    size, shift = amplitudes(q, k + u, v), (q.double() @ u.double()) * q.shape[-1] ** -0.5
    size = size._replace(rounding=size.rounding + amplitudes(q, k, v).rounding)
    law, wanted = (
        shifting_all_logits_of_a_query_changes_only_lse,
        {**before, "lse": before.get("lse", 0) + shift},
    )
    for name in after:
        agree(law, name, after[name], wanted[name], of_value(size, name), size)


@named
def shifting_all_logits_of_a_row_changes_nothing(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """A row of equal logits is the mean of visible values: out and gradient at any finite level.

    The level, up to 1e30 and to the least number of the dtype, comes from q and the first feature
    of all keys, which no other query sees; and from a bias where the kernel has such an argument.
    """
    law, (flat, several, features) = (
        shifting_all_logits_of_a_row_changes_nothing,
        ways_to_shift(kernel, q, k, v, key),
    )
    size, wanted_out = amplitudes(*flat), dense.attend(*double(*flat), mask).out
    for what, shifted, f in several:
        agree(law, f"out {what}", f(*shifted, mask), wanted_out, of_value(size, "out"), size)
        loss, reference, weights = losses(f, *flat, mask, key)
        got, wanted = grad(loss, (0, 1, 2))(*shifted), grad(reference, (0, 1, 2))(*double(*flat))
        for name, part, ours, theirs, of in zip(
            "qkv", features, got, wanted, of_gradient(size, *weights), strict=True
        ):
            agree(
                law,
                f"gradient of {name} {what}",
                ours[..., part:],
                theirs[..., part:],
                of,
                size,
            )


@named
def shifting_all_logits_of_a_row_changes_no_tangents(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """The same for jvp, and for jvp(grad)."""
    law, (flat, several, features) = (
        shifting_all_logits_of_a_row_changes_no_tangents,
        ways_to_shift(kernel, q, k, v, key),
    )
    size, moved = amplitudes(*flat), tangents(key, *flat)
    for x in moved[:2]:
        x[..., 0] = 0  # the level itself has no tangent
    wanted_out = jvp(
        lambda q, k, v: dense.attend(q, k, v, mask).out, double(*flat), double(*moved)
    )[1]
    allowed = size.rounding * (2 * of_logits(size, moved) * size.v + longest(moved[2]))
    for what, shifted, f in several:
        out = jvp(lambda q, k, v, f=f: f(q, k, v, mask), shifted, moved)[1]
        agree(law, f"jvp of out {what}", out, wanted_out, allowed, size)
        loss, reference, weights = losses(f, *flat, mask, key)
        got = jvp(grad(loss, (0, 1, 2)), shifted, moved)[1]
        wanted = jvp(grad(reference, (0, 1, 2)), double(*flat), double(*moved))[1]
        for name, part, ours, theirs, of in zip(
            "qkv", features, got, wanted, of_hvp(size, *weights, moved), strict=True
        ):
            agree(law, f"hvp of {name} {what}", ours[..., part:], theirs[..., part:], of, size)


@named
def merge_of_any_split_is_the_whole(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """Attention to some keys, merged by lse with attention to the others, is attention to all.

    Applies where the kernel returns lse.
    """
    S = k.shape[-2]
    whole = parts_of(kernel(q, k, v, mask))
    if "lse" not in whole or S < 2:
        return
    cut, size = int(randomness.randint(key, (), 1, S)), amplitudes(q, k, v)
    part = lambda columns: Attended(
        *kernel(q, k[..., columns, :], v[..., columns, :], take(mask, columns))
    )
    order = torch.arange(S, device=k.device)
    merged = parts_of(merge(part(order[:cut]), part(order[cut:])))
    for name in merged:
        allowed = 3 * of_value(size, name)
        agree(
            merge_of_any_split_is_the_whole,
            f"{name} merged at {cut}",
            merged[name],
            whole[name],
            allowed,
            size,
        )


@named
def commutes_with_vmap(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """vmap equals the loop: over all arguments, queries only, keys and values only, and masks."""
    size, inputs = amplitudes(q, k, v), (q, k, v)
    examples = [torch.stack([x, -x, x / 2]) for x in inputs]
    causal = both(mask, tree.to(q.device)(masks.causal(q.shape[-2])), k.shape[-2])
    several = None if mask is None else tree.stack([mask, causal, mask])
    run = lambda q, k, v, mask: parts_of(kernel(q, k, v, mask))
    for dims in (
        (0, 0, 0, None),
        (0, None, None, None),
        (None, 0, 0, None),
        (None, None, 0, None),
        (None, None, None, 0),
    ):
        if dims[3] is not None and several is None:
            continue
        arguments = [
            xs if d is not None else x
            for x, xs, d in zip((*inputs, mask), (*examples, several), dims, strict=True)
        ]
        got = vmap(run, dims)(*arguments)
        for n in range(3):
            wanted = run(
                *(
                    x if d is None else tree.unstack(x)[n]
                    for x, d in zip(arguments, dims, strict=True)
                )
            )
            for name in wanted:
                what = f"example {n}, in_dims={dims}, {name}"
                agree(
                    commutes_with_vmap,
                    what,
                    got[name][n],
                    wanted[name],
                    2 * of_value(size, name),
                    size,
                )


@named
def gradient_agrees_with_the_reference(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """The gradient of a weighted sum of out (and lse) is that of the definition in float64."""
    size = amplitudes(q, k, v)
    loss, reference, weights = losses(kernel, q, k, v, mask, key)
    got, wanted = grad(loss, (0, 1, 2))(q, k, v), grad(reference, (0, 1, 2))(*double(q, k, v))
    allowed = of_gradient(size, *weights)
    for name, ours, theirs, of in zip("qkv", got, wanted, allowed, strict=True):
        agree(gradient_agrees_with_the_reference, f"gradient of {name}", ours, theirs, of, size)


@named
def masked_rows_are_zero_with_zero_gradients(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """A query without visible keys has out = 0, lse = -inf, and gradients of zero, not NaN."""
    law, (row, own, mask) = masked_rows_are_zero_with_zero_gradients, mask_a_row(q, k, mask, key)
    got = parts_of(kernel(q, k, v, mask))
    agree(
        law,
        f"out of masked row {row}",
        got["out"][..., row, :],
        torch.zeros_like(got["out"][..., row, :]),
        0,
        EXACT,
    )
    if "lse" in got:
        nothing = torch.full_like(got["lse"][..., row], -torch.inf)
        agree(law, f"lse of masked row {row}", got["lse"][..., row], nothing, 0, EXACT)
    loss, _, _ = losses(kernel, q, k, v, mask, own)
    of_row, _, _ = losses(kernel, q, k, v, mask, own, row)
    for name, whole, part in zip(
        "qkv", grad(loss, (0, 1, 2))(q, k, v), grad(of_row, (0, 1, 2))(q, k, v), strict=True
    ):
        agree(
            law, f"gradient of {name} from masked row {row}", part, torch.zeros_like(part), 0, EXACT
        )
        agree(
            law,
            f"gradient of {name} beside masked row {row}",
            whole,
            whole.nan_to_num(0, 0, 0),
            0,
            "it must be finite",
        )


@named
def jvp_agrees_with_the_reference(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """The directional derivative of out (and lse) is that of the definition in float64."""
    size, moved = amplitudes(q, k, v), tangents(key, q, k, v)
    run = lambda f: lambda q, k, v: finite(f(q, k, v, mask))
    got = jvp(run(kernel), (q, k, v), moved)[1]
    wanted = jvp(run(dense.attend), double(q, k, v), double(*moved))[1]
    logits, dv = of_logits(size, moved), longest(moved[2])
    allowed = {"out": 2 * logits * size.v + dv, "lse": logits}
    for name in got:
        agree(
            jvp_agrees_with_the_reference,
            f"jvp of {name}",
            got[name],
            wanted[name],
            size.rounding * allowed[name],
            size,
        )


@named
def hvp_agrees_with_the_reference(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """The derivative of the gradient along a direction, jvp(grad), is that of the definition in
    float64.
    """
    size, (direction, weighting) = amplitudes(q, k, v), randomness.split(key)
    moved = tangents(direction, q, k, v)
    loss, reference, weights = losses(kernel, q, k, v, mask, weighting)
    got = jvp(grad(loss, (0, 1, 2)), (q, k, v), moved)[1]
    wanted = jvp(grad(reference, (0, 1, 2)), double(q, k, v), double(*moved))[1]
    allowed = of_hvp(size, *weights, moved)
    for name, ours, theirs, of in zip("qkv", got, wanted, allowed, strict=True):
        agree(hvp_agrees_with_the_reference, f"hvp of {name}", ours, theirs, of, size)


@named
def masked_rows_have_zero_tangents(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """A query without visible keys has a jvp of zero, and adds nothing to any Hessian."""
    law, (row, own, mask) = masked_rows_have_zero_tangents, mask_a_row(q, k, mask, key)
    moved = tangents(own, q, k, v)
    out = jvp(lambda q, k, v: parts_of(kernel(q, k, v, mask))["out"], (q, k, v), moved)[1][
        ..., row, :
    ]
    agree(law, f"jvp of masked row {row}", out, torch.zeros_like(out), 0, EXACT)
    of_row, _, _ = losses(kernel, q, k, v, mask, own, row)
    for name, part in zip("qkv", jvp(grad(of_row, (0, 1, 2)), (q, k, v), moved)[1], strict=True):
        agree(law, f"hvp of {name} from masked row {row}", part, torch.zeros_like(part), 0, EXACT)
