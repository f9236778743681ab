"""GPTQ: codes that minimize the error of a layer's output on a text, column by column.

    min over codes of | (W - Wq) X |          X the activations that a text gives

Columns are rounded one after the other; the columns that follow are updated to compensate the error
of each. The order is by descending diagonal of H = X X^T; scales and zeros are those of
round-to-nearest, fixed before.

Layers are fitted in order, on activations of the quantized layers before, so that each also
compensates their errors.

Source: Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1; act-order with static groups are of its
    authors' implementation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ... import quantization, tree
from ...core import errors
from ...core.doors import door
from ...layers import Weight
from ...models import Model
from ...transformer import Layer, Params
from ...tree import Tree
from .. import Int4, Int8, Int8Dynamic, Scheme, is_quantized, packing
from .layerwise import BY_EXPERT, Feeds, decoder_of, feeds_of, walk

BLOCK = 128  # columns between two updates of all that follow


@door
def gptq(
    model: Model,
    tokens: Tensor,
    scheme: Scheme,
    where: quantization.Where | None = None,
    *,
    damping: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Callable[[Tree], Tree]:
    """`quantize(scheme, where)` with codes fitted by GPTQ to a text.

    Embedding and head, whose inputs are not activations, and other selected matrices are rounded to
    nearest. An expert is fitted to the tokens routed to it; where these are fewer than the columns
    of a matrix, it is rounded to nearest, and `fa.quantization.report` says of how many.

    Args:
        model: from `fa.decoder`.
        tokens: integers (T,), a text of at least as many tokens as the widest selected matrix has
            columns (with experts: more, so that each gets as many); it is read in windows of 512,
            without the remainder at the end.
        scheme: fa.int4, fa.int8 or fa.w8a8 with any settings.
        where: as in `quantize`.
        damping: added to the diagonal of H, as a fraction of its mean.
        progress: called with the number of layers done, and of all.

    Returns:
        params -> params with quantized records.

    Raises:
        ValueError: a text that is too short. TypeError: another model or scheme.

    Law: the codes are those of the exact update in float64 (test_calibration.py); on the text that
        it was calibrated with the output of a layer is nearer than that of round-to-nearest.
    Source: Frantar et al., GPTQ, arXiv:2210.17323.
    """
    if not isinstance(damping, float) or not damping > 0:
        errors.fail("gptq", "damping", "above 0", damping, "0.01 is usual.")
    to_nearest = quantization.quantize(scheme, where)
    decoder_of("gptq", model, tokens)

    @door(name="gptq(...)")
    def transform(params: Params) -> Params:
        with torch.no_grad():
            plan = to_nearest(params)  # selected matrices with their scales
            _check_length(plan, params, tokens)
            fitted = lambda i, layer, feeds: _layer(layer, plan.layers[i], feeds, damping)
            return plan._replace(layers=walk(model, params, tokens, fitted, progress))

    return transform


def _check_length(plan: Params, params: Params, tokens: Tensor) -> None:
    for path, leaf in tree.items(plan.layers, is_leaf=is_quantized):
        if is_quantized(leaf) and not isinstance(leaf, (Int4, Int8, Int8Dynamic)):
            remedy = "Round it to nearest, with fa.quantize(scheme)."
            errors.fail(
                "gptq",
                "scheme",
                "int4, int8 or w8a8",
                f"one that makes a {type(leaf).__name__}",
                remedy,
                TypeError,
            )
        if is_quantized(leaf) and len(leaf.shape) == 2 and leaf.shape[-1] > len(tokens):
            wanted = f"at least {leaf.shape[-1]} tokens, the columns of layers.{path}"
            errors.fail("gptq", "tokens", wanted, f"{len(tokens)}", "Calibrate with a longer text.")


def _layer(layer: Layer, plan: Layer, feeds: Feeds, damping: float) -> Layer:
    """The layer with fitted codes."""
    chosen = {
        name
        for name in Layer._fields
        if is_quantized(getattr(plan, name)) and not is_quantized(getattr(layer, name))
    }
    of_experts = {name for name in chosen if getattr(layer, name).dim() > 2}
    taps = {tap: [*chosen & {*names} - of_experts] for tap, names in feeds_of(layer).items()}
    heard = {name: [*of_experts & {*names}] for name, names in BY_EXPERT.items()}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def gather(tap: str, rows: Tensor) -> None:
        sums[tap] = sums.get(tap, 0) + (rows.mT @ rows).double()
        counts[tap] = counts.get(tap, 0) + len(rows)

    feeds({tap for tap, names in (taps | heard).items() if names}, gather)
    done = {}
    for tap in sums:
        place, _, number = tap.rpartition(".")
        if place not in heard:
            order, U = factor(sums[tap], damping)
            done |= {
                name: fit(getattr(plan, name), getattr(layer, name), order, U) for name in taps[tap]
            }
        elif counts[tap] >= len(sums[tap]):
            order, U = factor(sums[tap], damping)
            for name in heard[place]:
                records = done.setdefault(name, [*tree.unstack(getattr(plan, name))])
                records[int(number)] = fit(
                    records[int(number)], getattr(layer, name)[int(number)], order, U
                )
    return plan._replace(
        **{name: tree.stack(found) if name in of_experts else found for name, found in done.items()}
    )


def factor(H: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The order of columns, by descending diagonal, and U with H^-1 = U^T U in that order.

    U is the upper Cholesky factor of the inverse of H.

    Args:
        H: X X^T (K, K) in float64.
        damping: added to the diagonal, as a fraction of its mean.
    """
    heavy = H.diagonal().clone()
    order = heavy.argsort(descending=True, stable=True)
    added = damping * heavy.mean() if bool(heavy.any()) else H.new_ones(())
    damped = H[order][:, order] + added * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return order, torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
    )


def fit(plan: Weight, weight: Tensor, order: Tensor, U: Tensor) -> Weight:
    """The record `plan` with codes for which (W - Wq) X is small.

    Where rounding column j has error e, the columns after it change by -e U_jk / U_jj, which
    minimizes the remaining error.

    Args:
        plan: int4, int8 or w8a8 of the weight, whose scales are kept.
        weight: (N, K).
        order, U: of `factor`.
    """
    K = weight.shape[-1]
    least, greatest = (0, 15) if isinstance(plan, Int4) else (-127, 127)
    scale = packing.spread(plan.scale.double(), K)[:, order]
    zero = (
        packing.spread(plan.zero.double(), K)[:, order]
        if isinstance(plan, Int4)
        else torch.zeros_like(scale)
    )
    by = torch.where(scale == 0, 1, scale)
    w, codes = weight.double()[:, order], torch.zeros_like(scale)
    for first in range(0, K, BLOCK):
        stop = min(first + BLOCK, K)
        errors = []
        for j in range(first, stop):
            codes[:, j] = ((w[:, j] - zero[:, j]) / by[:, j]).round().clamp(least, greatest)
            error = (w[:, j] - (codes[:, j] * scale[:, j] + zero[:, j])) / U[j, j]
            w[:, j:stop] -= error.unsqueeze(-1) * U[j, j:stop]
            errors.append(error)
        w[:, stop:] -= torch.stack(errors, -1) @ U[first:stop, stop:]
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    if isinstance(plan, Int4):
        return plan._replace(
            codes=packing.pack(codes.to(torch.uint8), K // plan.scale.shape[-1], 4)
        )
    return plan._replace(codes=codes.to(torch.int8))
