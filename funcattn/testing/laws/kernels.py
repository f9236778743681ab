"""Laws of attention kernels: law(kernel, q, k, v, mask, key).

A kernel is kernel(q, k, v, mask) -> out, or Attended(out, lse), with scale 1 / sqrt(D); the mask is a Mask, booleans or None. Where
it gives lse, that is held to the laws too. Laws that change a mask give the kernel one of the same kind, a Mask where it was None.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ... import masks, randomness, tree
from ...kernels import merge
from ...masks import END, Mask
from ...records import Attended
from .. import dense
from ..agreement import Amplitudes, agree, amplitudes, longest, named

AnyMask: TypeAlias = Mask | Tensor | None
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, AnyMask], Any]
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
EXACT = "exactly: it is a sum over nothing"


@named
def agrees_with_the_reference(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """out and lse are those of the definition in float64; out has the dtype of v."""
    got, size = _parts(kernel(q, k, v, mask)), amplitudes(q, k, v)
    if got["out"].dtype != v.dtype:
        raise AssertionError(f"agrees_with_the_reference: out should be {v.dtype} as v is, got {got['out'].dtype}.")
    wanted = _parts(dense.attend(q.double(), k.double(), v.double(), mask))
    for name in got:
        agree(agrees_with_the_reference, name, got[name], wanted[name], _of_value(size, name), size.why)


@named
def order_of_keys_does_not_matter(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """Shuffling keys, values and the columns of the mask together changes nothing."""
    order = randomness.permutation(key, k.shape[-2]).to(k.device)
    wanted, size = _parts(kernel(q, k, v, mask)), amplitudes(q, k, v)
    got = _parts(kernel(q, k[..., order, :], v[..., order, :], _take(mask, order)))
    for name in got:
        agree(order_of_keys_does_not_matter, name, got[name], wanted[name], 2 * _of_value(size, name), size.why)


@named
def output_lies_in_the_hull_of_the_values(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """Weights are positive and sum to one: along any direction, out is between the least and the greatest visible value."""
    if not k.shape[-2]:
        return
    out, size, Dv = _parts(kernel(q, k, v, mask))["out"], amplitudes(q, k, v), v.shape[-1]
    eye = torch.eye(Dv, dtype=torch.float64, device=v.device)
    directions = torch.cat([eye, torch.nn.functional.normalize(_normal(key, eye, (4, Dv)), dim=-1)])
    values = (v.double() @ directions.mT).repeat_interleave(q.shape[-3] // v.shape[-3], -3)  # (*lead, H, S, directions)
    values = values.mT.unsqueeze(-2)  # (*lead, H, directions, 1, S)
    visible = dense.seen(mask, q, k).unsqueeze(-3)
    sees = visible.any(-1)
    least = torch.where(sees, torch.where(visible, values, torch.inf).amin(-1), 0).mT
    greatest = torch.where(sees, torch.where(visible, values, -torch.inf).amax(-1), 0).mT
    along = out.double() @ directions.mT
    allowed = size.rounding * size.v
    agree(output_lies_in_the_hull_of_the_values, "out . direction", along, along.clamp(least, greatest), allowed, size.why)


@named
def future_cannot_change_the_past(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """Under a causal mask, what comes at or after a position leaves the rows before it as they were."""
    T, S = q.shape[-2], k.shape[-2]
    if S < 2:
        return
    where, keys, values = randomness.split(key, 3)
    cut = int(randomness.randint(where, (), 1, S))
    mask = _and(mask, tree.to(q.device)(masks.causal(T)), S)
    later = (torch.arange(S, device=k.device) >= cut).unsqueeze(-1)
    other_k = torch.where(later, 4 * _normal(keys, k, k.shape), k)
    other_v = torch.where(later, 4 * _normal(values, v, v.shape), v)
    wanted, got = _parts(kernel(q, k, v, mask)), _parts(kernel(q, other_k, other_v, mask))
    size, before = amplitudes(q, other_k, other_v), slice(0, min(cut, T))
    for name, rows in (("out", (..., before, slice(None))), ("lse", (..., before))):
        if name in got:
            of_past = f"{name} before position {cut}"
            agree(future_cannot_change_the_past, of_past, got[name][rows], wanted[name][rows], 2 * _of_value(size, name), size.why)


@named
def shifting_all_logits_of_a_query_changes_only_lse(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """Adding u to every key adds scale q_i . u to every logit of query i, which out does not see and lse shows."""
    u = _normal(key, k, k.shape[-1:])
    before, after = _parts(kernel(q, k, v, mask)), _parts(kernel(q, k + u, v, mask))
    size, shift = amplitudes(q, k + u, v), (q.double() @ u.double()) * q.shape[-1] ** -0.5
    size = size._replace(rounding=size.rounding + amplitudes(q, k, v).rounding)
    law, wanted = shifting_all_logits_of_a_query_changes_only_lse, {**before, "lse": before.get("lse", 0) + shift}
    for name in after:
        agree(law, name, after[name], wanted[name], _of_value(size, name), size.why)


@named
def shifting_all_logits_of_a_row_changes_nothing(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """A row of equal logits is the mean of the values it sees, at any finite level: out and its gradient are those at level zero.

    The level, up to 1e30 and to the least number of the dtype, comes from q and the first feature of all keys, which no other query
    sees; and from a bias where the kernel takes one by that name.
    """
    law, (flat, several, features) = shifting_all_logits_of_a_row_changes_nothing, _shifted(kernel, q, k, v, key)
    size, wanted_out = amplitudes(*flat), dense.attend(*_double(*flat), mask).out
    for what, shifted, f in several:
        agree(law, f"out {what}", f(*shifted, mask), wanted_out, _of_value(size, "out"), size.why)
        loss, reference, weights = _losses(f, *flat, mask, key)
        got, wanted = grad(loss, (0, 1, 2))(*shifted), grad(reference, (0, 1, 2))(*_double(*flat))
        for name, part, ours, theirs, of in zip("qkv", features, got, wanted, _of_gradient(size, *weights), strict=True):
            agree(law, f"gradient of {name} {what}", ours[..., part:], theirs[..., part:], of, size.why)


@named
def shifting_all_logits_of_a_row_changes_no_tangents(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor
) -> None:
    """The same of jvp, and of jvp(grad)."""
    law, (flat, several, features) = shifting_all_logits_of_a_row_changes_no_tangents, _shifted(kernel, q, k, v, key)
    size, moved = amplitudes(*flat), _tangents(key, *flat)
    for x in moved[:2]:
        x[..., 0] = 0  # the level itself stays
    wanted_out = jvp(lambda q, k, v: dense.attend(q, k, v, mask).out, _double(*flat), _double(*moved))[1]
    allowed = size.rounding * (2 * _of_logits(size, moved) * size.v + longest(moved[2]))
    for what, shifted, f in several:
        out = jvp(lambda q, k, v, f=f: f(q, k, v, mask), shifted, moved)[1]
        agree(law, f"jvp of out {what}", out, wanted_out, allowed, size.why)
        loss, reference, weights = _losses(f, *flat, mask, key)
        got = jvp(grad(loss, (0, 1, 2)), shifted, moved)[1]
        wanted = jvp(grad(reference, (0, 1, 2)), _double(*flat), _double(*moved))[1]
        for name, part, ours, theirs, of in zip("qkv", features, got, wanted, _of_hvp(size, *weights, moved), strict=True):
            ours, theirs = (x[..., part:].clamp(*_range(q.dtype)) for x in (ours, theirs))  # beyond it is infinite
            agree(law, f"hvp of {name} {what}", ours, theirs, of, size.why)


@named
def merge_of_any_split_is_the_whole(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """Attention over some keys, merged by lse with attention over the others, is attention over all. Holds if lse is given."""
    S = k.shape[-2]
    whole = _parts(kernel(q, k, v, mask))
    if "lse" not in whole or S < 2:
        return
    cut, size = int(randomness.randint(key, (), 1, S)), amplitudes(q, k, v)
    part = lambda columns: Attended(*kernel(q, k[..., columns, :], v[..., columns, :], _take(mask, columns)))
    order = torch.arange(S, device=k.device)
    merged = _parts(merge(part(order[:cut]), part(order[cut:])))
    for name in merged:
        allowed = 3 * _of_value(size, name)
        agree(merge_of_any_split_is_the_whole, f"{name} merged at {cut}", merged[name], whole[name], allowed, size.why)


@named
def commutes_with_vmap(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """vmap is the loop: over all arguments, over queries alone, over keys and values alone, and over masks."""
    size, inputs = amplitudes(q, k, v), (q, k, v)
    examples = [torch.stack([x, -x, x / 2]) for x in inputs]
    causal = _and(mask, tree.to(q.device)(masks.causal(q.shape[-2])), k.shape[-2])
    several = None if mask is None else tree.stack([mask, causal, mask])
    run = lambda q, k, v, mask: _parts(kernel(q, k, v, mask))
    for dims in ((0, 0, 0, None), (0, None, None, None), (None, 0, 0, None), (None, None, 0, None), (None, None, None, 0)):
        if dims[3] is not None and several is None:
            continue
        arguments = [xs if d is not None else x for x, xs, d in zip((*inputs, mask), (*examples, several), dims, strict=True)]
        got = vmap(run, dims)(*arguments)
        for n in range(3):
            wanted = run(*(x if d is None else tree.unstack(x)[n] for x, d in zip(arguments, dims, strict=True)))
            for name in wanted:
                what = f"example {n}, in_dims={dims}, {name}"
                agree(commutes_with_vmap, what, got[name][n], wanted[name], 2 * _of_value(size, name), size.why)


@named
def gradient_agrees_with_the_reference(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """The gradient of a weighted sum of out (and lse) is that of the definition in float64."""
    size = amplitudes(q, k, v)
    loss, reference, weights = _losses(kernel, q, k, v, mask, key)
    got, wanted = grad(loss, (0, 1, 2))(q, k, v), grad(reference, (0, 1, 2))(*_double(q, k, v))
    allowed = _of_gradient(size, *weights)
    for name, ours, theirs, of in zip("qkv", got, wanted, allowed, strict=True):
        agree(gradient_agrees_with_the_reference, f"gradient of {name}", ours, theirs, of, size.why)


@named
def masked_rows_are_zero_with_zero_gradients(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """A query that sees no key has out = 0 and lse = -inf, adds nothing to any gradient, and spoils none with NaN."""
    law, (row, own, mask) = masked_rows_are_zero_with_zero_gradients, _mask_a_row(q, k, mask, key)
    got = _parts(kernel(q, k, v, mask))
    agree(law, f"out of masked row {row}", got["out"][..., row, :], torch.zeros_like(got["out"][..., row, :]), 0, EXACT)
    if "lse" in got:
        nothing = torch.full_like(got["lse"][..., row], -torch.inf)
        agree(law, f"lse of masked row {row}", got["lse"][..., row], nothing, 0, EXACT)
    loss, _, _ = _losses(kernel, q, k, v, mask, own)
    of_row, _, _ = _losses(kernel, q, k, v, mask, own, row)
    for name, whole, part in zip("qkv", grad(loss, (0, 1, 2))(q, k, v), grad(of_row, (0, 1, 2))(q, k, v), strict=True):
        agree(law, f"gradient of {name} from masked row {row}", part, torch.zeros_like(part), 0, EXACT)
        agree(law, f"gradient of {name} beside masked row {row}", whole, whole.nan_to_num(0, 0, 0), 0, "it must be finite")


@named
def jvp_agrees_with_the_reference(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """The directional derivative of out (and lse) is that of the definition in float64."""
    size, moved = amplitudes(q, k, v), _tangents(key, q, k, v)
    run = lambda f: lambda q, k, v: _finite(f(q, k, v, mask))
    got = jvp(run(kernel), (q, k, v), moved)[1]
    wanted = jvp(run(dense.attend), _double(q, k, v), _double(*moved))[1]
    of_logits, dv = _of_logits(size, moved), longest(moved[2])
    allowed = {"out": 2 * of_logits * size.v + dv, "lse": of_logits}
    for name in got:
        agree(jvp_agrees_with_the_reference, f"jvp of {name}", got[name], wanted[name], size.rounding * allowed[name], size.why)


@named
def hvp_agrees_with_the_reference(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """The derivative of the gradient along a direction, jvp(grad), is that of the definition in float64."""
    size, (direction, weighting) = amplitudes(q, k, v), randomness.split(key)
    moved = _tangents(direction, q, k, v)
    loss, reference, weights = _losses(kernel, q, k, v, mask, weighting)
    got = jvp(grad(loss, (0, 1, 2)), (q, k, v), moved)[1]
    wanted = jvp(grad(reference, (0, 1, 2)), _double(q, k, v), _double(*moved))[1]
    allowed = _of_hvp(size, *weights, moved)
    for name, ours, theirs, of in zip("qkv", got, wanted, allowed, strict=True):
        agree(hvp_agrees_with_the_reference, f"hvp of {name}", ours, theirs, of, size.why)


@named
def masked_rows_have_zero_tangents(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor) -> None:
    """A query that sees no key does not move: its jvp is zero, and it adds nothing to any Hessian."""
    law, (row, own, mask) = masked_rows_have_zero_tangents, _mask_a_row(q, k, mask, key)
    moved = _tangents(own, q, k, v)
    out = jvp(lambda q, k, v: _parts(kernel(q, k, v, mask))["out"], (q, k, v), moved)[1][..., row, :]
    agree(law, f"jvp of masked row {row}", out, torch.zeros_like(out), 0, EXACT)
    of_row, _, _ = _losses(kernel, q, k, v, mask, own, row)
    for name, part in zip("qkv", jvp(grad(of_row, (0, 1, 2)), (q, k, v), moved)[1], strict=True):
        agree(law, f"hvp of {name} from masked row {row}", part, torch.zeros_like(part), 0, EXACT)


# What is compared.


def _parts(result: Any) -> dict[str, Tensor]:
    """out, and lse where the kernel gives it, by name."""
    return {"out": result} if isinstance(result, Tensor) else dict(zip(("out", "lse"), result, strict=True))


def _finite(result: Any) -> dict[str, Tensor]:
    """The same with 0 for the lse of rows that see nothing: a value, and no number to differentiate."""
    parts = _parts(result)
    return {name: torch.where(x == -torch.inf, 0, x) if name == "lse" else x for name, x in parts.items()}


def _losses(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, key: Tensor, row: int | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[float, float]]:
    """One weighted sum of out and lse (of one row alone, if given), for the kernel and the definition, and its weights' size."""
    given, wanted = _parts(kernel(q, k, v, mask)), _parts(dense.attend(q.double(), k.double(), v.double(), mask))
    T = q.shape[-2]
    kept = torch.ones(T, dtype=torch.float64, device=q.device)
    kept = kept if row is None else (torch.arange(T, device=q.device) == row).double()
    weights = {name: _normal(randomness.fold_in(key, i), kept, wanted[name].shape) for i, name in enumerate(given)}
    weights = {name: w * (kept.unsqueeze(-1) if name == "out" else kept) for name, w in weights.items()}

    def weigh(f: Kernel) -> Callable[..., Tensor]:
        def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = _finite(f(q, k, v, mask))
            return torch.stack([(found[name].double() * w).sum() for name, w in weights.items()]).sum()

        return total

    most = float(weights["lse"].abs().max()) if "lse" in weights and weights["lse"].numel() else 0.0
    return weigh(kernel), weigh(dense.attend), (longest(weights["out"]), most)


def _tangents(key: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    dq, dk, dv = (_normal(randomness.fold_in(key, i), x, x.shape) for i, x in enumerate((q, k, v)))
    return dq, dk, dv


def _normal(key: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return randomness.normal(key, shape, like.dtype).to(like.device)


def _double(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return q.double(), k.double(), v.double()


# How far rounding may carry each, with g and h the sizes of the weights of out and lse in a loss.


def _of_value(size: Amplitudes, name: str) -> float:
    return size.rounding * (size.value if name == "out" else 1)


def _of_gradient(size: Amplitudes, g: float, h: float) -> tuple[float, float, float]:
    """dq_i = scale sum_j P_ij (g_i . (v_j - out_i) + h_i) k_j, dk_j the same summed over i, dv_j = sum_i P_ij g_i."""
    of_pair = size.rounding * size.scale * (2 * g * size.v + h)
    return size.leads * of_pair * size.k, size.rows * of_pair * size.q, size.rows * size.rounding * g


def _of_logits(size: Amplitudes, moved: tuple[Tensor, ...]) -> float:
    """The bound on dS_ij = scale (dq_i . k_j + q_i . dk_j)."""
    return size.scale * (longest(moved[0]) * size.k + size.q * longest(moved[1]))


def _of_hvp(size: Amplitudes, g: float, h: float, moved: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """The gradient's bound, each of its factors moved in turn; a weight P moves by 2 dS P, what it multiplies by as much again."""
    dS, (dq, dk, dv) = _of_logits(size, moved), (longest(x) for x in moved)
    pair, of_values = 2 * g * size.v + h, 2 * g * dv
    of_q = size.leads * size.scale * (pair * (4 * dS * size.k + dk) + of_values * size.k)
    of_k = size.rows * size.scale * (pair * (4 * dS * size.q + dq) + of_values * size.q)
    return size.rounding * of_q, size.rounding * of_k, size.rounding * size.rows * g * 2 * dS


# Levels.


def _range(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max


def _shifted(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, key: Tensor
) -> tuple[Inputs, list[tuple[str, Inputs, Callable[..., Tensor]]], tuple[int, ...]]:
    """Inputs with a row of equal logits; the ways to shift it: what to say, inputs, and the kernel to out; features that stay."""
    row, which = (
        int(randomness.randint(of, (), 0, most)) for of, most in zip(randomness.split(key), (q.shape[-2], 3), strict=True)
    )
    flat_q, flat_k = q.clone(), k.clone()
    flat_q[..., row, :], flat_q[..., 0], flat_k[..., 0] = 0, 0, 0
    flat, one = (flat_q, flat_k, v), torch.finfo(q.dtype)
    root = q.shape[-1] ** 0.5
    within = lambda room: max(min((1e30, -1e30, one.min)[which], one.max / room), one.min / room)
    level = within(4 * root)  # so that the product is finite before it is scaled, and as a power of two
    size = (abs(level) * root) ** 0.5
    far_q, far_k = flat_q.clone(), flat_k.clone()
    far_q[..., row, 0], far_k[..., 0] = math.copysign(size, level), size
    out = lambda *x, **options: _parts(kernel(*x, **options))["out"]
    ways = [(f"where row {row} is at {level:.3g}", (far_q, far_k, v), out)]
    if "bias" in inspect.signature(kernel).parameters:
        bias = q.new_zeros(q.shape[-2], k.shape[-2])
        bias[row] = within(1)
        ways.append((f"where the bias of row {row} is {within(1):.3g}", flat, functools.partial(out, bias=bias)))
    return flat, ways, (1, 1, 0)


# Masks of the same kind.


def _and(mask: AnyMask, other: Mask, S: int) -> Mask | Tensor:
    return other if mask is None else mask & other if isinstance(mask, Mask) else mask & other.dense(S).to(mask.device)


def _mask_a_row(q: Tensor, k: Tensor, mask: AnyMask, key: Tensor) -> tuple[int, Tensor, Mask | Tensor]:
    """A query chosen by the key, a fresh key, and the mask with nothing left for that query to see."""
    choice, own = randomness.split(key)
    row = int(randomness.randint(choice, (), 0, q.shape[-2]))
    start = torch.where(torch.arange(q.shape[-2], device=q.device) == row, END, 0).unsqueeze(-1)
    return row, own, _and(mask, Mask(start, torch.full_like(start, END)), k.shape[-2])


def _take(mask: AnyMask, columns: Tensor) -> AnyMask:
    """The mask of these keys in this order."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return mask if mask.shape[-1] == 1 else mask[..., columns]
    visible = mask.dense(int(columns.max()) + 1 if len(columns) else 0)[..., columns]
    place = torch.arange(len(columns), device=columns.device)
    alone = Mask(torch.where(visible, place, END), torch.where(visible, place + 1, END))  # an interval for each key
    nothing = torch.full_like(mask.start[..., :1], END)
    return masks.union(alone, Mask(nothing, nothing))  # joins neighbours, and keeps one interval where there are no keys
