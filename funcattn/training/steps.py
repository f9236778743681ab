"""One step of training, as a pure function.

    params, state, metrics = step(params, state, batch)

It is `torch.func.grad_and_value` of the loss, then the optimizer's update, so it supports vmap (an
ensemble), grad (with respect to anything it depends on) and `torch.compile(step, fullgraph=True)`,
which makes one graph of loss, gradient and update.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor
from torch.func import grad_and_value

from .. import tree
from ..core import errors
from ..core.autograd import is_recorded
from ..core.doors import door
from ..models import Model
from ..records import ABSENT, by_rows, record
from ..tree import Tree
from . import losses, optimizers
from .norms import norm
from .optimizers import Optimizer

Loss: TypeAlias = Callable[[Model, Tree, Tree], Tensor]
Step: TypeAlias = Callable[..., tuple[Tree, Tree, "Metrics"]]


@record
class Metrics(NamedTuple):
    """Metrics of a step.

    loss: (), of the params before the step. norm: (), the 2-norm of the gradient before clipping.

    Prints as numbers; under vmap, with fields (n,), as a line for each of the n.
    """

    loss: Tensor
    norm: Tensor

    def __str__(self) -> str:
        if not all(isinstance(x, Tensor) and errors.value(x) is not None for x in self):
            return repr(self)
        return by_rows(
            self,
            lambda row: f"loss {float(row.loss):.4f}, norm of the gradient {float(row.norm):.4g}",
        )


@door
def step(
    model: Model,
    optimizer: Optimizer,
    *,
    loss: Loss = losses.loss,
    micro_batches: int = 1,
    compute: torch.dtype | None = None,
    specs: Tree = None,
) -> Step:
    """A function (params, state, batch, frozen=()) -> (params, state, metrics).

    Its arguments:
        params: the tree that is trained; floating leaves. state: `optimizer.init(params)`.
        batch: the argument of the loss: for `fa.loss`, tokens (B, T).
        frozen: leaves that are not trained, the other half of `fa.tree.partition(params, ...)`, or
            ().

    Called inside `torch.no_grad()`, outside torch.func and torch.compile, no derivative of the step
    itself can be taken: the gradient is then computed by autograd, the same numbers with less
    overhead per operation. `fit` calls it so.

    Args:
        model: `fa.decoder(config)`. With kernel="sdpa" attention is torch's, whose first gradient
            is the fastest and which has no higher ones.
        optimizer: of `funcattn.training`.
        loss: f(model, params, batch) -> scalar.
        micro_batches: n splits the leading axis of each leaf of batch in n, and averages n
            gradients, so that only the activations of one are in memory. Equal to the whole where
            each has as many targets that count.
        compute: a dtype that parameters are cast to inside the loss, such as torch.bfloat16, while
            master weights, gradients and state keep theirs. The cast is differentiated.
        specs: on a mesh, how params are sharded: a tree of `sharding.P` or a prefix of it
            (`metrics.norm` is that of all shards).

    Example:
        >>> import funcattn as fa
        >>> model, optimizer = fa.decoder(fa.Config(layers=1)), fa.training.adamw(1e-2)
        >>> params = model.init(fa.key(0))
        >>> one = step(model, optimizer)
        >>> after, state, metrics = one(params, optimizer.init(params), torch.arange(12).view(2, 6))
        >>> bool(fa.loss(model, after, torch.arange(12).view(2, 6)) < metrics.loss)
        True

    Law: a compiled step is one graph and the same step
        (test_steps.py::test_a_step_compiles_to_one_graph).
    Law: micro-batches of one size give the step of the whole
        (test_steps.py::test_micro_batches_give_the_step_of_the_whole).
    """
    if not isinstance(micro_batches, int) or micro_batches < 1:
        errors.fail(
            "step",
            "micro_batches",
            "1 or more",
            micro_batches,
            "It is the number of parts of a batch.",
        )
    if not isinstance(optimizer, Optimizer):
        got = f"a {type(optimizer).__name__}"
        errors.fail(
            "step",
            "optimizer",
            "an Optimizer",
            got,
            "Use fa.training.adamw(3e-4), or one of its kin.",
            TypeError,
        )
    narrow = tree.cast(compute) if compute is not None else lambda params: params

    @door(name="step(model, optimizer)")
    def one(
        params: Tree, state: Tree, batch: Tree, frozen: Tree = ABSENT
    ) -> tuple[Tree, Tree, Metrics]:
        of = lambda part: lambda params: loss(model, narrow(tree.combine(params, frozen)), part)
        parts = _split(batch, micro_batches)
        gradients, value = _gradient(of(parts[0]), params)
        for part in parts[1:]:
            more, also = _gradient(of(part), params)
            gradients, value = tree.map(torch.add, gradients, more), value + also
        if len(parts) > 1:
            gradients, value = tree.map(lambda g: g / len(parts), gradients), value / len(parts)
        updates, state = optimizer.update(gradients, state, params)
        return (
            optimizers.apply(params, updates),
            state,
            Metrics(value, norm(gradients, specs=specs)),
        )

    return one


def _gradient(f: Callable[[Tree], Tensor], params: Tree) -> tuple[Tree, Tensor]:
    """The gradient of f and its value."""
    if torch.is_grad_enabled() or is_recorded(params) or torch.compiler.is_compiling():
        return grad_and_value(f)(params)
    leaves, structure = optree.tree_flatten(params)
    with torch.enable_grad():
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        value = f(optree.tree_unflatten(structure, fresh))
        gradients = torch.autograd.grad(value, fresh, allow_unused=True, materialize_grads=True)
    return optree.tree_unflatten(structure, gradients), value.detach()


def _split(batch: Tree, n: int) -> list[Tree]:
    if n == 1:
        return [batch]
    leaves, structure = optree.tree_flatten(batch)
    for leaf in leaves:
        if not leaf.dim() or leaf.shape[0] % n:
            remedy = "Choose sizes that divide."
            errors.fail(
                "step",
                "batch",
                f"of a leading axis that {n} micro_batches divide",
                errors.shape(leaf),
                remedy,
            )
    return [
        optree.tree_unflatten(structure, row)
        for row in zip(*(leaf.chunk(n) for leaf in leaves), strict=True)
    ]
