"""Equivalent rescaling of features between layers, so that weights and activations round with less
error.

    W x = (W diag(s)) (x / s)          s > 0; 1 / s is folded into the weight that produces x

Large features shrink, and their columns of W grow. Activations of 8 bits then have fewer outliers
(SmoothQuant), and weights of 4 bits round important columns more finely (AWQ). x is produced by the
weight of a norm, or by rows of another matrix:

    the norm before attention -> q, k, v               v -> o
    the norm before the feed-forward -> gate, up       up -> down

Sources: Xiao et al., SmoothQuant, arXiv:2211.10438, section 4; Lin et al., AWQ, arXiv:2306.00978,
section 3.2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import layers, quantization
from ...core.doors import door
from ...models import Model
from ...records import is_absent
from ...transformer import Config, Layer, LayerSpec, Params, capabilities, why_not
from ...tree import Tree
from .. import Scheme, is_quantized
from .layerwise import Feeds, Progress, decoder_of, walk

POWERS = tuple(0.1 * i for i in range(1, 11))
ROWS = 512  # vectors on which candidates are compared


class Site(NamedTuple):
    """Weights of a layer between which a scale can move: those that produce x, and that read it."""

    tap: str
    makers: tuple[str, ...]  # leaves that produce x: their rows, or entries, are divided by s
    readers: tuple[str, ...]  # matrices that read x: their columns are multiplied by s
    offset: float = 0.0  # of a norm, which multiplies by offset + weight
    heads: tuple[int, int] = (1, 1)  # heads of the maker, and query heads for each of these


@door
def smooth(
    model: Model,
    tokens: Tensor,
    scheme: Scheme,
    where: quantization.Where | None = None,
    *,
    progress: Progress | None = None,
) -> Callable[[Tree], Tree]:
    """Rescale features: params of the same function that lose less by `quantize(scheme, where)`.

    For each site of each layer, s is searched among powers of the mean size of a feature (AWQ), and
    of its greatest size over that of its column (SmoothQuant): the one for which products of the
    rounded matrices have the least error, with rounded activations where the scheme rounds them.
    Where none is better, the site is unchanged.

    Args:
        model: from `fa.decoder`. Sites of other structure are not scaled: experts, a feed-forward
            without a gate, matrices that are quantized records.
        tokens: integers (T,), a text; some hundreds of tokens suffice.
        scheme: any that `quantize` takes.
        where: as in `quantize`.
        progress: called with the number of layers done, and of all.

    Returns:
        params -> params.

    Raises:
        TypeError: another model, text or scheme.

    Law: logits stay, up to rounding (test_calibration.py::test_smoothing_keeps_the_function).
    Sources: Xiao et al., SmoothQuant, arXiv:2211.10438; Lin et al., AWQ, arXiv:2306.00978.
    """
    to_nearest = quantization.quantize(scheme, where)
    config = decoder_of("smooth", model, tokens)

    @door(name="smooth(...)")
    def transform(params: Params) -> Params:
        with torch.no_grad():
            plan = to_nearest(params)

            def scaled(i: int, layer: Layer, feeds: Feeds) -> Layer:
                places = [
                    site
                    for site in sites(config, config.layer_spec(i), layer)
                    if _chosen(site, layer, plan.layers[i])
                ]
                return _layer(layer, places, feeds, scheme)

            return params._replace(layers=walk(model, params, tokens, scaled, progress))

    return transform


def sites(config: Config, spec: LayerSpec, layer: Layer) -> Iterator[Site]:
    """The sites of a layer where scaling changes no output; none for unsupported configs."""
    if why_not(config, capabilities.SMOOTHED):
        return
    together = config.shared_norm
    if not (together and spec.experts):
        inner = (("gate", "up") if config.gated else ("up",)) if together else ()
        yield Site(
            "attention.input",
            ("attention_norm", "attention_norm_bias"),
            ("q", "k", "v", *inner),
            config.norm_offset,
        )
    yield Site(
        "attention.mixed",
        ("v", "v_bias"),
        ("o",),
        heads=(config.kv_heads, config.heads // config.kv_heads),
    )
    if spec.experts:
        return
    if not together:
        makers, readers = (
            ("feed_forward_norm", "feed_forward_norm_bias"),
            ("gate", "up") if config.gated else ("up",),
        )
        yield Site("feed_forward.input", makers, readers, config.norm_offset)
    if config.gated and config.activation_limit is None:
        yield Site("feed_forward.inner", ("up", "up_bias"), ("down",))


def scale(layer: Layer, site: Site, s: Tensor) -> Layer:
    """The layer with x / s where a site produces x, and W diag(s) where x is read."""
    weight, bias = (getattr(layer, name) for name in site.makers)
    s = s.double()
    by = s if weight.dim() < 2 else s.unsqueeze(-1)
    changed = {
        site.makers[0]: ((weight.double() + site.offset) / by - site.offset).to(weight.dtype)
    }
    if not is_absent(bias):
        changed[site.makers[1]] = (bias.double() / s).to(bias.dtype)
    wide = spread(s, site.heads)
    for name in site.readers:
        matrix = getattr(layer, name)
        changed[name] = (matrix.double() * wide).to(matrix.dtype)
    return layer._replace(**changed)


def spread(s: Tensor, heads: tuple[int, int]) -> Tensor:
    """s of the produced features for the features that are read: repeated for each query head."""
    made, shares = heads
    return s.unflatten(0, (made, -1)).unsqueeze(1).expand(-1, shares, -1).flatten()


def _gathered(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """Sizes (K,) of features that are read, for those produced: the greatest of a group's heads."""
    made, shares = heads
    return x.unflatten(0, (made, shares, -1)).amax(1).flatten()


def _chosen(site: Site, layer: Layer, plan: Layer) -> bool:
    plain = all(
        isinstance(getattr(layer, name), Tensor) for name in (site.makers[0], *site.readers)
    )
    return plain and any(is_quantized(getattr(plan, name)) for name in site.readers)


def _layer(layer: Layer, places: Sequence[Site], feeds: Feeds, scheme: Scheme) -> Layer:
    seen: dict[str, list[Tensor]] = {}
    feeds({site.tap for site in places}, lambda tap, rows: seen.setdefault(tap, []).append(rows))
    for site in places:
        layer = _scaled(layer, site, torch.cat(seen[site.tap]), scheme)
    return layer


def _scaled(layer: Layer, site: Site, x: Tensor, scheme: Scheme) -> Layer:
    """The layer with the scale of a site that has the least error, if any is better than 1."""
    matrices = [getattr(layer, name) for name in site.readers]
    rows = x[:: max(1, len(x) // ROWS)]
    wanted = [layers.linear(matrix, rows).double() for matrix in matrices]
    sizes = torch.stack([goal.square().sum(-1) for goal in wanted]).sum(0)
    # Weight each vector by its size: a few are a hundred times as long as the rest.
    share = torch.where(sizes > 0, 1 / sizes, 0.0)

    def lost(s: Tensor) -> float:
        wide = spread(s, site.heads).to(rows.dtype)
        products = [
            layers.linear(scheme.encode((m * wide).contiguous()), rows / wide) for m in matrices
        ]
        off = [
            (found - goal).square().sum(-1) for found, goal in zip(products, wanted, strict=True)
        ]
        return float((sum(off) * share).sum())

    mean, greatest = (
        _gathered(size.float(), site.heads) for size in (x.abs().mean(0), x.abs().amax(0))
    )
    column = _gathered(torch.stack([m.abs().amax(0) for m in matrices]).amax(0).float(), site.heads)
    found, least = None, lost(torch.ones_like(mean))
    for s in _candidates(mean, greatest, column):
        loss = lost(s)
        if loss < least:
            found, least = s, loss
    return layer if found is None else scale(layer, site, found)


def _candidates(mean: Tensor, greatest: Tensor, column: Tensor) -> Iterator[Tensor]:
    for power in POWERS:
        yield _centred(mean**power)
        yield _centred(greatest**power / column.clamp(min=1e-5) ** (1 - power))


def _centred(s: Tensor) -> Tensor:
    """s made positive, with values around 1; 1 for a feature that is always zero."""
    alive = s > 0
    s = torch.where(alive, s.clamp(min=1e-4), 1.0)
    s = s / (s.amax() * s.amin()).sqrt()
    return torch.where(alive, s, 1.0)
