"""Transforms of optimizers: clip, chain, accumulate."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door, printed
from ..records import ABSENT, record
from ..tree import Tree
from .leafwise import check_positive, scalar, scaled, zero_count
from .norms import norm
from .optimizers import Optimizer


@record
class Accumulated(NamedTuple):
    """The state of `accumulate`.

    count: int64 (), gradients accumulated so far. total: their sum. inner: state of the optimizer.
    """

    count: Tensor
    total: Tree
    inner: Tree


@door
@printed
def clip(max_norm: float, *, specs: Tree = None) -> Optimizer:
    """Gradients clipped to a norm: g min(1, max_norm / |g|), |g| the norm of the whole tree.

    Args:
        max_norm: the greatest norm.
        specs: on a mesh, the sharding of gradients, which is that of params; see `norm`.

    Source: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks,
        arXiv:1211.5063.
    """
    check_positive("clip", "max_norm", max_norm)

    def update(gradients: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        length = norm(gradients, specs=specs) + 1e-6  # as torch's, so that steps agree
        share = scalar((max_norm / length).clamp(max=1.0))
        return tree.map(lambda g: scaled(g, share), gradients), ABSENT

    return Optimizer(lambda params: ABSENT, update)


@printed
def chain(*optimizers: Optimizer) -> Optimizer:
    """Optimizers in sequence: the updates of each are the gradients of the next.

    The state is the tuple of their states.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            got = f"a {type(optimizer).__name__}"
            errors.fail(
                "chain",
                "optimizers",
                "Optimizers",
                got,
                "Call them first: chain(clip(1.0), adamw(3e-4)).",
                TypeError,
            )

    def update(
        gradients: Tree, state: tuple[Tree, ...], params: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        after = []
        for optimizer, own in zip(optimizers, state, strict=True):
            gradients, own = optimizer.update(gradients, own, params)
            after.append(own)
        return gradients, tuple(after)

    return Optimizer(
        lambda params: tuple(optimizer.init(params) for optimizer in optimizers), update
    )


@door
@printed
def accumulate(n: int, optimizer: Optimizer) -> Optimizer:
    """Update once every n gradients, by their mean; the other updates are zero.

    Branch-free, so that it compiles and vmaps: `optimizer` is called each time, and its result is
    used every nth time. To split one batch into micro-batches without this state, use
    `step(..., micro_batches=n)`.

    Law: n gradients do what their mean does
        (test_optimizers.py::test_accumulated_gradients_act_by_their_mean).
    """
    if not isinstance(n, int) or n < 1:
        errors.fail(
            "accumulate", "n", "1 or more", n, "It is the number of gradients in one update."
        )
    if not isinstance(optimizer, Optimizer):
        got = f"a {type(optimizer).__name__}"
        errors.fail(
            "accumulate",
            "optimizer",
            "an Optimizer",
            got,
            "Call it first: accumulate(4, adamw(3e-4)).",
            TypeError,
        )

    def init(params: Tree) -> Accumulated:
        return Accumulated(
            zero_count(params), tree.map(torch.zeros_like, params), optimizer.init(params)
        )

    def update(gradients: Tree, state: Accumulated, params: Tree) -> tuple[Tree, Accumulated]:
        total = tree.map(torch.add, state.total, gradients)
        full = state.count + 1 == n
        updates, inner = optimizer.update(tree.map(lambda g: g / n, total), state.inner, params)
        choose = lambda new, old: torch.where(full, new, old)
        return tree.map(lambda u: torch.where(full, u, 0.0), updates), Accumulated(
            torch.where(full, 0, state.count + 1),
            tree.map(lambda g: torch.where(full, 0.0, g), total),
            tree.map(choose, inner, state.inner),
        )

    return Optimizer(init, update)
