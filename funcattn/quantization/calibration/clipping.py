"""Round-to-nearest with a searched range per group (clipping), and AWQ: scaling, then that search.

    min over c of sum_j E[x_j^2] (w_j - wq_j(c))^2          for each group of columns of each row

A narrower range clips the largest weight of a group and rounds the others more finely. Errors are
weighted by the mean square of each feature over a text.

Source: Lin et al., AWQ, arXiv:2306.00978, section 4; the search of the range is of its authors'
    implementation.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ... import quantization
from ...core import errors
from ...core.doors import door
from ...layers import Weight
from ...models import Model
from ...transformer import Layer, Params
from ...tree import Tree
from .. import Scheme, expand, is_quantized, packing
from .layerwise import Feeds, Progress, decoder_of, feeds_of, walk
from .smoothquant import smooth

CLIPS = tuple(1 - 0.05 * i for i in range(11))  # of the range of a group: 1 to 0.5


@door
def clipped(
    model: Model,
    tokens: Tensor,
    scheme: Scheme,
    where: quantization.Where | None = None,
    *,
    progress: Progress | None = None,
) -> Callable[[Tree], Tree]:
    """`quantize(scheme, where)` with a searched clipping range for each group.

    Embedding and head, whose inputs are not activations, and the matrices of experts are rounded as
    by `quantize`.

    Args:
        model: from `fa.decoder`.
        tokens: integers (T,), a text; some hundreds of tokens suffice.
        scheme: one whose `clip` is a fraction of the range: fa.int4, fa.int8 or fa.w8a8 with any
            settings.
        where: as in `quantize`.
        progress: called with the number of layers done, and of all.

    Returns:
        params -> params with quantized records.

    Raises:
        TypeError: another model, text or scheme.

    Law: no group loses more than by round-to-nearest, as weighed above (test_calibration.py).
    Source: Lin et al., AWQ, arXiv:2306.00978.
    """
    to_nearest = quantization.quantize(scheme, where)
    config = decoder_of("clipped", model, tokens)
    if not is_dataclass(scheme) or "clip" not in {field.name for field in fields(scheme)}:
        remedy = "Use fa.int4, fa.int8 or fa.w8a8."
        errors.fail(
            "clipped",
            "scheme",
            "one with a clip",
            f"a {type(scheme).__name__} without",
            remedy,
            TypeError,
        )

    clippable = cast(Clippable, scheme)

    @door(name="clipped(...)")
    def transform(params: Params) -> Params:
        with torch.no_grad():
            plan = to_nearest(params)

            def fitted(i: int, layer: Layer, feeds: Feeds) -> Layer:
                return (
                    plan.layers[i]
                    if config.layer_spec(i).experts
                    else _layer(layer, plan.layers[i], feeds, clippable)
                )

            return plan._replace(layers=walk(model, params, tokens, fitted, progress))

    return transform


@door
def awq(
    model: Model,
    tokens: Tensor,
    scheme: Scheme,
    where: quantization.Where | None = None,
    *,
    progress: Progress | None = None,
) -> Callable[[Tree], Tree]:
    """AWQ: features with large activations are scaled up, then rounded to nearest with clipping.

    That is `clipped` after `smooth`.

    Args:
        model, tokens, scheme, where: as in `smooth` and `clipped`.
        progress: called with the number of layers that are clipped, and of all.

    Returns:
        params -> params with quantized records.

    Raises:
        TypeError: another model, text or scheme.

    Law: on the text that it was calibrated with the model is nearer than by round-to-nearest
        (test_calibration.py).
    Source: Lin et al., AWQ, arXiv:2306.00978.
    """
    decoder_of("awq", model, tokens)
    scaled, rounded = (
        smooth(model, tokens, scheme, where),
        clipped(model, tokens, scheme, where, progress=progress),
    )
    return door(lambda params: rounded(scaled(params)), name="awq(...)")


class Clippable(Scheme, Protocol):
    """A scheme with a setting `clip`, the fraction of the range that codes cover."""

    def __call__(self, *, clip: float | Tensor) -> Scheme:
        """The scheme with another clip, of each group where it is a tensor."""
        ...


def best_clip(scheme: Clippable, weight: Tensor, square: Tensor) -> Weight:
    """The record of weight (N, K) with the best clip of each group, for mean squares (K,) of x."""
    whole = scheme(clip=1.0).encode(weight)
    least, best = _lost(whole, weight, square), torch.ones_like(whole.scale, dtype=torch.float32)
    for clip in CLIPS[1:]:
        lost = _lost(scheme(clip=clip).encode(weight), weight, square)
        best = torch.where(lost < least, clip, best)
        least = torch.minimum(lost, least)
    return scheme(clip=best).encode(weight)


def _lost(record: Weight, weight: Tensor, square: Tensor) -> Tensor:
    """(N, G): the squared error of each group, weighted by the mean squares (K,) of features."""
    off = (expand(record).float() - weight.float()).square() * square.float()
    return packing.groups(off, weight.shape[-1] // record.scale.shape[-1]).sum(-1)


def _layer(layer: Layer, plan: Layer, feeds: Feeds, scheme: Clippable) -> Layer:
    chosen = {
        name
        for name in Layer._fields
        if is_quantized(getattr(plan, name)) and not is_quantized(getattr(layer, name))
    }
    sums: dict[str, Tensor] = {}

    def gather(tap: str, rows: Tensor) -> None:
        sums[tap] = sums.get(tap, 0) + rows.double().square().sum(0)

    read = feeds_of(layer)
    feeds({tap for tap, names in read.items() if chosen & {*names}}, gather)
    found = {
        name: best_clip(scheme, getattr(layer, name), sums[tap])
        for tap in sums
        for name in read[tap]
        if name in chosen
    }
    return plan._replace(**found)
