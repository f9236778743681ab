"""A Model whose functions run on every device of a mesh, with the same signature.

    params = fa.shard(mesh)(params)
    fa.generate(key, fa.shard_map(model, mesh), params, prompt, steps=32)

Over a DeviceMesh every process makes the same calls. Params are DTensors, tokens and logits are
replicated, and caches are plain tensors of this process's heads: commit, fork and grow need no
change. Over a `Grid` params are whole, and the heads of a cache are those of all devices,
concatenated.

For a gradient, map the function that computes it: shard_map(grad(f), mesh, ...), where f calls the
model that is not mapped.
"""

import functools
from collections.abc import Callable

import optree
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import caches, tree
from ..caches import Branch, Cache, Delta, KVCache, make
from ..collectives import agree
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..core.doors import door
from ..masks import Mask
from ..models import Model, Past, written
from ..records import ABSENT, is_absent
from ..transformer import TENSOR, Config, cache_layers
from ..tree import Tree
from .devices import bind, refuse_transform, stacked
from .mesh import Grid, Mesh, P, axes_of, is_spec
from .rules import specs, tensor_parallel
from .storing import is_distributed, local, spec_of


def sharded(model: Model, mesh: Mesh) -> Model:
    """The Model on a mesh; see the module.

    Raises:
        TypeError: not a Model, or over a Grid one without a config.
    """
    if not isinstance(model, Model) or (isinstance(mesh, Grid) and model.config is None):
        wanted = "from fa.decoder" if isinstance(mesh, Grid) else "a Model"
        errors.fail(
            "shard_map",
            "model",
            wanted,
            f"a {type(model).__name__} of another make",
            "Make it with fa.decoder(config).",
            TypeError,
        )
    if isinstance(mesh, Grid) and model.config.recurrent_layers:
        remedy = "Map a function of it with specs of its own: shard_map(f, mesh, ...)."
        got = f"{len(model.config.recurrent_layers)} recurrent layers"
        errors.fail("shard_map", "model", "one of attention alone over a Grid", got, remedy)
    if isinstance(mesh, Grid) and len(model.config.cache_groups) > 1:
        remedy = "Map a function of it with specs of its own: shard_map(f, mesh, ...)."
        errors.fail(
            "shard_map", "model", "one with keys of one size over a Grid", "of several", remedy
        )
    run = _simulate(model, mesh) if isinstance(mesh, Grid) else _speak(mesh)
    fields: dict[str, Callable[..., Tree]] = {
        name: door(run(name, getattr(model, name)), name=name) for name in Model.FUNCTIONS
    }
    if not isinstance(mesh, Grid):
        fields["commit"] = run("commit", model.commit or caches.commit)
    name = written("shard_map", mesh=mesh)
    return model.wrap(name, lambda other: sharded(other, mesh), fields)


def _speak(mesh: DeviceMesh) -> Callable[[str, Callable[..., Tree]], Callable[..., Tree]]:
    """Each function with the axes bound to process groups."""
    names = tuple(axes_of(mesh))

    def run(name: str, f: Callable[..., Tree]) -> Callable[..., Tree]:
        if name == "init":
            return f

        @functools.wraps(f)
        def call(*args: Tree, **options: Tree) -> Tree:
            if (transforming() or has_tangent(args)) and any(
                is_distributed(leaf) for leaf in tree.leaves(args)
            ):
                refuse_transform("shard_map")
            whole: Tree = args
            flat, structure = optree.tree_flatten(whole)
            held = [local(x, spec_of(x), mesh) if is_distributed(x) else x for x in flat]
            with bind(mesh, names):
                cache = args[2] if len(args) > 2 else options.get("cache", ABSENT)
                if name == "hidden" and is_absent(cache):  # not in decoding, per token
                    agree("shard_map", {"tokens": args[1:]})
                return f(*optree.tree_unflatten(structure, held), **options)

        return call

    return run


def _simulate(
    model: Model, mesh: Grid
) -> Callable[[str, Callable[..., Tree]], Callable[..., Tree]]:
    """Each function as a vmap over the devices."""
    config = model.config
    n = axes_of(mesh).get(TENSOR, 1)
    rules = tensor_parallel(config, size=n)
    of_past = P(None, TENSOR)

    def past(cache: KVCache) -> Tree:
        if is_absent(cache):
            return ABSENT
        if type(cache) is Branch:
            return Branch(past(cache.prefix), past(cache.tail))
        if type(cache) is not Cache:
            got, remedy = (
                f"a {type(cache).__name__}",
                "Use a dense past, or map f with specs of its own: shard_map(f, mesh, ...).",
            )
            errors.fail(
                "shard_map",
                "cache",
                "a Cache, or a Branch of such, over a Grid",
                got,
                remedy,
                TypeError,
            )
        cuts: Tree = (of_past, of_past, P())
        return Cache(*cuts)

    def run(name: str, f: Callable[..., Tree]) -> Callable[..., Tree]:
        if name == "init":
            return f
        if name == "cache":
            return (
                f
                if "cache" in model.replaced
                else functools.wraps(f)(functools.partial(_room, config, n))
            )

        def mapped(params: Tree, *args: Tree, **options: Tree) -> Tree:
            kept = {key: value for key, value in options.items() if value is not None}
            whole = lambda value: tree.map(lambda _: P(), value)
            cuts = (
                specs(params, mesh, rules),
                *(past(x) if i else whole(x) for i, x in enumerate(args)),
                whole(kept),
            )
            given: Tree = (params, *args, kept)
            flat, structure = optree.tree_flatten(given)
            each: Tree = (P(TENSOR),) * cache_layers(config)
            rows = Delta(each, each)
            out = P() if name == "logits" else (P(), rows)
            return stacked(
                lambda params, *rest: f(params, *rest[:-1], **rest[-1]),
                *(
                    mesh,
                    flat,
                    structure,
                    tree.leaves(cuts, is_leaf=is_spec),
                    out,
                    tuple(axes_of(mesh)),
                ),
            )

        if name == "logits":
            return functools.wraps(f)(mapped)

        @functools.wraps(f)
        def call(
            params: Tree,
            tokens: Tensor,
            cache: Past = ABSENT,
            *,
            mask: Mask | Tensor | None = None,
            positions: Tensor | None = None,
        ) -> Tree:
            return mapped(params, tokens, cache, mask=mask, positions=positions)

        return call

    return run


def _room(
    config: Config, n: int, size: int, *, kind: type = Cache, dtype: torch.dtype | None = None
) -> Tree:
    K, *features = config.cached
    return make(kind, cache_layers(config), max(K, n), size, features, dtype)
