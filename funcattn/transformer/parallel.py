"""Collectives of a decoder whose weights or tokens are sharded over a mesh.

Where the axis "tensor" is bound, a device has some heads, some features and a shard of the
vocabulary, by the table in `partition`. A layer copies its residual into two regions (attention,
feed-forward), each of which ends with one psum:

    y = copy_to_region(norm(x))
    x = x + psum(o attend(q y, k y, v y))        x = x + psum(down act(gate y, up y))

Forward and backward have 2 collectives a layer each. Replicated weights that are used in a region
(head norms, routers, the down-projection of an adapter) are copied into it too: their gradient is
the sum over all devices, the same on each.

Where the axis "data" is bound, each device has different sequences. A weight that is sharded over
it is gathered before its layer, and its gradient scattered; a replicated one is copied. So the
gradient of every leaf is sharded as the leaf is.

Where the axis "context" is bound, each device has a part of every text: ring attention covers all
of it, and attention to a context-sharded cache (`caches.ShardedCache`) is one merge over devices.

With no axis bound each function returns its argument.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

import functools
from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from .. import collectives, kernels, layers
from ..caches import CONTEXT, ShardedCache
from ..collectives import all_gather, all_gather_invariant, axis_index, axis_size, pmax, psum
from ..core import errors
from ..core.autograd import differentiated
from ..kernels import Kernel, Part
from ..layers import Weight
from ..layers.layouts import Division
from ..masks import Mask
from ..models import Past
from ..records import is_absent
from ..tree import Tree
from .config import Config, Kind
from .layer_spec import of_layer
from .partition import DATA, TENSOR, division
from .weights import Layer, shapes

_shapes = functools.cache(shapes)


def heads(config: Config) -> tuple[int, int]:
    """Query heads and key/value heads of this device.

    Raises:
        ValueError: the devices of "tensor" do not divide them.
    """
    n, H, K = axis_size(TENSOR), config.heads, config.kv_heads
    if n == 1:
        return H, K
    if H % n or (K % n and n % K):
        wanted = (
            f"such that the {n} devices of 'tensor' divide its {H} heads, and divide or are "
            f"divided by its {K} key/value heads"
        )
        errors.fail("decoder", "config", wanted, f"{H} and {K}", "Take another number of devices.")
    if config.head_norm == "rms_width":
        remedy = "Shard it over 'data' alone."
        errors.fail(
            "decoder",
            "config.head_norm",
            "other than rms_width over 'tensor'",
            "a norm over all heads together",
            remedy,
        )
    return H // n, max(1, K // n)


def cached(config: Config) -> tuple[int, int, int]:
    """`Config.cached` of this device: latents are replicated."""
    K, D, Dv = config.cached
    return (K if config.latent_size else heads(config)[1]), D, Dv


def slopes(config: Config, device: torch.device) -> Tensor:
    """The slopes (H,) of ALiBi of this device's query heads, float32."""
    every = torch.tensor(layers.slopes(config.heads), dtype=torch.float32, device=device)
    n = axis_size(TENSOR)
    return every if n == 1 else every.unflatten(0, (n, -1))[axis_index(TENSOR).to(device)]


def layer(config: Config, number: int, weights: Layer) -> Layer:
    """The weights of a layer as this device uses them.

    Gathered over "data"; replicated weights of a region are copied into it.
    """
    if not collectives.bound():
        return weights
    n, whole, experts = (
        axis_size(TENSOR),
        _shapes(config).layers[number],
        config.layer_spec(number).experts,
    )
    config = of_layer(config, config.layer_spec(number))
    made = []
    for name, weight, shape in zip(Layer._fields, weights, whole, strict=True):
        if is_absent(weight) or is_absent(shape):
            made.append(weight)
            continue
        cut = division(config, name, len(shape), n, experts=experts)
        weight = _over_data(f"layers.{number}.{name}", weight, cut.over_tensor(shape, n))
        if n > 1 and cut.region:
            weight = _copied_to_region(weight, cut.tensor, len(shape))
        if cut.replicated:
            weight = _local_kv_heads(config, weight, cut.block, len(shape))
        if n > 1 and cut.once:
            first = axis_index(TENSOR).to(weight.device) == 0
            weight = torch.where(first, copy_to_region(weight), 0)
        made.append(weight)
    return Layer(*made)


def _division(shape_length: int, dim: int | None, mark: str) -> tuple[str | None, ...]:
    return tuple(mark if i == dim else None for i in range(shape_length))


def _copied_to_region(weight: Weight, cut: int | None, rank: int) -> Weight:
    """The weight with its replicated tensors copied into a region."""
    divided = layers.fields(weight, _division(rank, cut, TENSOR))
    copied = lambda x, d: x if TENSOR in d or not x.is_floating_point() else copy_to_region(x)
    return optree.tree_map(copied, weight, divided)


def _local_kv_heads(config: Config, weight: Weight, block: int, rank: int) -> Weight:
    """The rows of the key/value head that belongs to this device's query heads."""
    axis = collectives.find(TENSOR)
    assert axis is not None
    divided = layers.fields(weight, _division(rank, 0, TENSOR))

    def one(x: Tensor, division: Division) -> Tensor:
        if TENSOR not in division:
            return x
        if not axis.mapped:
            return x.narrow(0, axis.rank * config.kv_heads // axis.size * block, block)
        mine = axis_index(TENSOR) * config.kv_heads // axis.size
        select = lambda x: (
            x.unflatten(0, (config.kv_heads, block)).index_select(0, mine.reshape(1)).flatten(0, 1)
        )
        # 8-bit floating codes: torch has no index_select for them.
        if x.is_floating_point() and x.element_size() == 1:
            return select(x.view(torch.uint8)).view(x.dtype)
        return select(x)

    return optree.tree_map(one, weight, divided)


def _over_data(path: str, weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A weight whole along "data": gathered where it is sharded, else copied.

    shape is that of the weight, whole along "data", on this device.
    """
    n = axis_size(DATA)
    got = getattr(weight, "shape", None)
    if got is None:  # prepared for compiled code
        return weight
    got = tuple(got)
    dims = [dim for dim, (size, whole) in enumerate(zip(got, shape, strict=False)) if size != whole]
    if len(got) != len(shape) or len(dims) > 1 or any(got[dim] * n != shape[dim] for dim in dims):
        remedy = (
            "Shard params by fa.sharding.tensor_parallel(config) or fsdp(config), and give "
            "in_specs of the same rules."
        )
        bound = ", ".join(f"{axis.size} devices of {axis.name!r}" for axis in collectives.bound())
        errors.fail("decoder", path, f"a part {shape} for {bound}", got, remedy)
    if n == 1 and not in_parts():
        return weight
    divided = layers.fields(weight, _division(len(shape), dims[0] if dims else None, DATA))

    def one(x: Tensor, division: Division) -> Tensor:
        x = collectives.copy_to_region(x, CONTEXT) if x.is_floating_point() else x
        if DATA in division:
            return all_gather(x, DATA, dim=division.index(DATA))
        return collectives.copy_to_region(x, DATA) if x.is_floating_point() else x

    return optree.tree_map(one, weight, divided)


def vector(path: str, weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A norm, bias or table outside of the layers, gathered over "data"."""
    return (
        weight if is_absent(weight) or not collectives.bound() else _over_data(path, weight, shape)
    )


def embed(config: Config, weight: Weight, tokens: Tensor) -> Tensor:
    """Rows of the embedding; where it is sharded, other shards' rows are zeros, summed by psum."""
    if not collectives.bound():
        return layers.embed(weight, tokens)
    rows = weight.shape[0]
    if rows == config.vocabulary:
        return layers.embed(
            _over_data("embedding", weight, (config.vocabulary, config.width)), tokens
        )
    weight = _table(config, "embedding", weight)
    first = axis_index(TENSOR).to(tokens.device) * rows
    mine = (tokens >= first) & (tokens < first + rows)
    found = layers.embed(weight, torch.where(mine, tokens - first, 0))
    return psum(
        torch.where(
            mine.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device)
        ),
        TENSOR,
    )


def _table(config: Config, path: str, weight: Weight) -> Weight:
    """The shard of the embedding or head over the vocabulary, gathered over "data"."""
    n = axis_size(TENSOR)
    cut = division(config, path, 2, n)
    weight = _over_data(path, weight, cut.over_tensor((config.vocabulary, config.width), n))
    return _copied_to_region(weight, cut.tensor, 2) if n > 1 else weight


def head(config: Config, weight: Weight, hidden: Tensor) -> Tensor:
    """Logits (*lead, V), or (*lead, V / n) for a head that is sharded over the vocabulary."""
    return layers.linear(*head_inputs(config, weight, hidden))


def head_inputs(config: Config, weight: Weight, hidden: Tensor) -> tuple[Weight, Tensor]:
    """The weight of the head on this device, gathered over "data", and what it is applied to."""
    shape = getattr(weight, "shape", None)
    # a weight without a shape is prepared for compiled code, without derivatives
    if not collectives.bound() or shape is None:
        return weight, hidden
    if shape[0] == config.vocabulary:
        return _over_data("head", weight, (config.vocabulary, config.width)), hidden
    return _table(config, "head", weight), copy_to_region(hidden)


def head_bias(config: Config, bias: Weight) -> Weight:
    """The bias of the head for the logits of `head`."""
    if not collectives.bound() or getattr(bias, "shape", None) is None:
        return bias
    whole = (config.vocabulary,)
    if tuple(bias.shape) == whole:
        return _over_data("head_bias", bias, whole)
    n = axis_size(TENSOR)
    return _over_data("head_bias", bias, division(config, "head_bias", 1, n).over_tensor(whole, n))


def gather_vocab(config: Config, logits: Tensor) -> Tensor:
    """Logits (*lead, V) on every device, gathered from the shards of the vocabulary."""
    if logits.shape[-1] == config.vocabulary:
        return logits
    return all_gather_invariant(logits, TENSOR, dim=-1)


def in_parts() -> bool:
    """True where texts are sharded over "context"."""
    return axis_size(CONTEXT) > 1


def check(config: Config, params: Tree, cache: Past, mask: Mask | Tensor | None) -> None:
    """Fail where an argument does not support the axes that are bound: sparse features "tensor",
    a mask, another cache and gradients behind a cache "context".
    """
    if config.embedding_size and collectives.bound():
        remedy = "Run it on one device."
        errors.fail(
            "decoder", "config.embedding_size", "0 on a mesh", config.embedding_size, remedy
        )
    if axis_size(TENSOR) > 1 and any(config.sparsities):
        remedy = "Shard it over 'data' alone."
        got = "a share of the features of a device"
        errors.fail("decoder", "config.sparsities", "none over 'tensor'", got, remedy)
    if not in_parts():
        return
    if is_absent(cache):
        if mask is not None:
            remedy = "A text in parts is causal; leave the mask out."
            errors.fail(
                "decoder", "mask", "None over 'context'", f"a {type(mask).__name__}", remedy
            )
        return
    if not isinstance(cache, ShardedCache):
        remedy = (
            "Make it with model.cache(size, kind=fa.caches.ShardedCache), or "
            "ShardedCache.from_local(delta)."
        )
        errors.fail(
            "decoder",
            "cache",
            "a ShardedCache over 'context'",
            f"a {type(cache).__name__}",
            remedy,
            TypeError,
        )
    if any(differentiated(x) for x in optree.tree_leaves(params) if isinstance(x, Tensor)):
        remedy = "Take gradients without a past: the ring gives them."
        errors.fail(
            "decoder",
            "params",
            "followed by no gradient behind a ShardedCache",
            "some that are",
            remedy,
            NotImplementedError,
        )


def longest(length: Tensor) -> Tensor:
    """The greatest length over the devices of "context"."""
    return pmax(length, CONTEXT)


def places(T: int) -> Tensor | None:
    """Positions of this device's tokens, in the order of `kernels.zigzag`; None unless sharded."""
    return kernels.places(T, CONTEXT) if in_parts() else None


def attend(
    config: Config,
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    past: Sequence[Part],
    kernel: str | Kernel | None,
) -> Tensor:
    """Attention over a text sharded over "context".

    Without a cache it is ring attention. With one, the new tokens are replicated: they attend to
    each device's shard of the cache, and the results are merged.
    """
    for name, given in (
        ("attention_cap", config.attention_cap),
        ("sinks", config.sinks or None),
        ("window", kind.window),
    ):
        if given is not None:
            remedy = "Shard it over 'data' and 'tensor'."
            errors.fail("decoder", f"config.{name}", "none over 'context'", given, remedy)
    if not past:
        return kernels.ring(q, k, v, CONTEXT, scale=config.scale, kernel=kernel).out
    new = kernels.partial(q, k, v, mask, scale=config.scale, kernel=kernel)
    query = collectives.copy_to_region(q, CONTEXT)
    seen = lambda part: None if is_absent(part.mask) else part.mask
    held = [
        kernels.partial(query, part.k, part.v, seen(part), scale=config.scale, kernel=kernel)
        for part in past
    ]
    before = kernels.join_over(functools.reduce(kernels.join, held), CONTEXT)
    return kernels.join(before, new).out


def reduce_from_region(x: Tensor) -> Tensor:
    """End a region: the sum over the devices of "tensor"."""
    return psum(x, TENSOR)


def copy_to_region(x: Tensor) -> Tensor:
    """Begin a region: the identity, whose gradient is summed over the devices of "tensor"."""
    return collectives.copy_to_region(x, TENSOR)
