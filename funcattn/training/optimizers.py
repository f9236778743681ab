"""Optimizers as pairs of pure functions over trees.

    state = optimizer.init(params)
    updates, state = optimizer.update(gradients, state, params)
    params = apply(params, updates)                                 # params + updates

Gradients and updates are trees like params, so optimizers compose: in `chain(clip(1.0),
adamw(3e-4))` the second takes the updates of the first for gradients. A state is a record whose
count of updates is an int64 tensor; so a whole training run is a function that vmap, grad and
compile support (an ensemble is `vmap(init)`; the learning rate has a gradient). Absent leaves `()`
have neither gradient nor state: frozen weights cost nothing.

Source: the interface of optax (DeepMind), Babuschkin et al., The DeepMind JAX ecosystem, 2020.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door, printed, uncalled
from ..records import ABSENT, record
from ..tree import Tree, Where
from ..tree.selection import chooses_none
from . import fused
from .leafwise import check_positive, check_share, columns_of, scalar, scaled, unzip, zero_count
from .norms import cut_axes
from .schedules import Rate, at, check_rate

Column: TypeAlias = list[Tensor]


def matrices(path: str, leaf: Tensor) -> bool:
    """True for leaves of two axes or more, to which weight decay applies."""
    return leaf.dim() >= 2


@dataclass(frozen=True, repr=False)
class Optimizer:
    """Two pure functions, `init, update = optimizer`. Prints as the call that made it.

    init: (params) -> state
    update: (gradients, state, params) -> (updates, state); updates are to be added to params.
    text: that call, or "" for a user-defined one.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    text: str = field(default="", kw_only=True, compare=False)
    __call__ = uncalled

    def __iter__(self) -> Iterator[Callable[..., Tree]]:
        """init, update."""
        return iter((self.init, self.update))

    def __repr__(self) -> str:
        return self.text or "Optimizer(init, update)"

    def _replace(self, **fields: object) -> "Optimizer":
        return replace(self, **{"text": ""} | fields)  # it is no longer what the call made


@record
class Momentum(NamedTuple):
    """The state of `sgd`. count: int64 (); velocity: like params, or () without momentum."""

    count: Tensor
    velocity: Tree


@record
class Moments(NamedTuple):
    """The state of `adamw`. count: int64 (); mean, square: like params."""

    count: Tensor
    mean: Tree
    square: Tree


@door
def apply(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf, in the dtype of params.

    Example:
        >>> apply({"w": torch.ones(2)}, {"w": torch.full((2,), -0.5)})
        {'w': tensor([0.5000, 0.5000])}
    """
    return tree.map(lambda p, u: p + u.to(p.dtype), params, updates)


@door
@printed
def sgd(
    learning_rate: Rate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent.

        g = gradient + weight_decay p        u = momentum u + g
        p = p - rate (g + momentum u if nesterov else u)

    Args:
        learning_rate: a number, a tensor (), or a schedule.
        momentum: 0 to 1; 0 keeps no velocity. nesterov: whether to look ahead.
        weight_decay: of every leaf, added to the gradient as torch.optim.SGD does.

    Law: steps are those of torch.optim.SGD
        (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    """
    check_rate("sgd", learning_rate)
    check_share("sgd", "momentum", momentum)
    check_positive("sgd", "weight_decay", weight_decay)
    if nesterov and not momentum:
        errors.fail("sgd", "nesterov", "used with momentum", "momentum 0", "Give it momentum=0.9.")

    def init(params: Tree) -> Momentum:
        return Momentum(
            zero_count(params), tree.map(torch.zeros_like, params) if momentum else ABSENT
        )

    def update(gradients: Tree, state: Momentum, params: Tree) -> tuple[Tree, Momentum]:
        rate = scalar(at(learning_rate, state.count))

        def move(g: Tensor, p: Tensor, *velocity: Tensor) -> tuple[Tensor, ...]:
            g = g.add(p, alpha=weight_decay) if weight_decay else g
            if not velocity:
                return (scaled(g, -rate),)
            u = velocity[0] * momentum + g
            return scaled(g.add(u, alpha=momentum) if nesterov else u, -rate), u

        trees = (state.velocity,) if momentum else ()
        moved, *velocity = unzip(1 + len(trees), move, gradients, params, *trees)
        return moved, Momentum(state.count + 1, velocity[0] if velocity else ABSENT)

    return Optimizer(init, update)


@door
@printed
def adamw(
    learning_rate: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    decays: Where = matrices,
) -> Optimizer:
    """Adam with decoupled weight decay.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - rate (m / (1 - b1^i)) / (sqrt(v / (1 - b2^i)) + epsilon) - rate weight_decay p

    Args:
        learning_rate: a number, a tensor (), or a schedule.
        betas, epsilon, weight_decay: as above.
        decays: which leaves decay, a regex of whole paths or a predicate of (path, leaf): matrices
            by default, as in nanoGPT, not norms and biases.

    Law: steps are those of torch.optim.AdamW
        (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv:1711.05101.
    """
    check_rate("adamw", learning_rate)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        errors.fail(
            "adamw",
            "betas",
            "two numbers",
            f"a {type(betas).__name__}",
            "Such as (0.9, 0.999).",
            TypeError,
        )
    b1, b2 = betas
    check_share("adamw", "betas", b1)
    check_share("adamw", "betas", b2)
    check_positive("adamw", "epsilon", epsilon)
    check_positive("adamw", "weight_decay", weight_decay)
    is_decayed = tree.predicate("adamw", decays, "decays")

    def init(params: Tree) -> Moments:
        if isinstance(decays, str) and not any(
            is_decayed(path, leaf) for path, leaf in tree.items(params)
        ):
            chooses_none("adamw", decays, "decays")
        return Moments(
            zero_count(params),
            tree.map(torch.zeros_like, params),
            tree.map(torch.zeros_like, params),
        )

    def moved(
        gs: Column, ms: Column, vs: Column, rate: Tensor, count: Tensor
    ) -> tuple[Column, Column, Column]:
        pull = scalar(-rate / (1 - b1 ** count.double()))
        spread = scalar((1 - b2 ** count.double()).sqrt())
        ms = [torch.lerp(m, g, 1 - b1) for m, g in zip(ms, gs, strict=True)]
        vs = [(v * b2).addcmul(g, g, value=1 - b2) for v, g in zip(vs, gs, strict=True)]
        us = [
            scaled(m, pull) / (v.sqrt() / spread.to(v.dtype) + epsilon)
            for m, v in zip(ms, vs, strict=True)
        ]
        return us, ms, vs

    def update(gradients: Tree, state: Moments, params: Tree) -> tuple[Tree, Moments]:
        rate, count = at(learning_rate, state.count), state.count + 1
        gs, ms, vs, ps, build = columns_of(gradients, state.mean, state.square, params)
        if fused.serves(gs, ms, vs, ps):
            us, ms, vs = fused.adam(
                gs, ms, vs, count=count, rate=rate, betas=betas, epsilon=epsilon
            )
        else:
            us, ms, vs = moved(gs, ms, vs, rate, count)
        if weight_decay:
            held = [is_decayed(path, leaf) for path, leaf in tree.items(params)]
            share = scalar(rate * weight_decay)
            us = [u - scaled(p, share) if h else u for u, p, h in zip(us, ps, held, strict=True)]
        updates, mean, square = build(us), build(ms), build(vs)
        return updates, Moments(count, mean, square)

    return Optimizer(init, update)


@door
def hidden_matrices(path: str, leaf: Tensor) -> bool:
    """True for the matrices of layers, which Muon updates: not embedding, head, norms or biases."""
    return leaf.dim() == 2 and path.startswith("layers.")


@door
@printed
def muon(
    learning_rate: Rate,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    steps: int = 5,
    match: bool = False,
    where: Where = hidden_matrices,
    rest: Optimizer | None = None,
    dtype: torch.dtype = torch.bfloat16,
    specs: Tree = None,
) -> Optimizer:
    """Momentum with its singular values set to about one, for matrices; `rest` for other leaves.

        u = momentum u + (1 - momentum) g
        p = p (1 - rate weight_decay) - rate s orthogonal(lerp(g, u, momentum))

    Args:
        learning_rate: of the matrices: a number, a tensor (), or a schedule.
        steps: Newton-Schulz iterations.
        match: True scales by s = 0.2 sqrt(max(out, in)), which gives updates the size of AdamW's,
            so that its learning rate and decay can be used; False by s = sqrt(max(1, out / in)), as
            in the original.
        where: the matrices, a regex of whole paths or a predicate of (path, leaf).
        rest: the optimizer of all other leaves; None is `adamw(learning_rate)` where match,
            `adamw(3e-4)` where not.
        dtype: of the iterations.
        specs: on a mesh, how params are sharded, as in `norm`: the matrices must be replicated.

    Law: steps are those of torch.optim.Muon
        (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    Source: Jordan et al., Muon, kellerjordan.github.io/posts/muon, 2024; Liu et al., Muon is
        scalable for LLM training, arXiv:2502.16982, section 2.2.
    """
    check_rate("muon", learning_rate)
    check_share("muon", "momentum", momentum)
    check_positive("muon", "weight_decay", weight_decay)
    if not isinstance(steps, int) or not 1 <= steps < 100:
        errors.fail("muon", "steps", "in 1..99", steps, "Five are enough.")
    is_mine = tree.predicate("muon", where)
    others = rest if rest is not None else adamw(learning_rate if match else 3e-4)

    def init(params: Tree) -> tuple[Momentum, Tree]:
        mine, theirs = tree.partition(params, is_mine)
        if isinstance(where, str) and not tree.leaves(mine):
            chooses_none("muon", where)
        wrong = [path for path, leaf in tree.items(mine) if leaf.dim() != 2]
        if wrong:
            errors.fail(
                "muon",
                "where",
                "true of matrices only",
                f"true of {wrong[0]}",
                "Test leaf.dim() == 2 too.",
            )
        return Momentum(zero_count(params), tree.map(torch.zeros_like, mine)), others.init(theirs)

    def update(
        gradients: Tree, state: tuple[Momentum, Tree], params: Tree
    ) -> tuple[Tree, tuple[Momentum, Tree]]:
        if any(cut_axes("muon", params, specs)):
            remedy = "Use adamw, or keep params whole: sharding.replicated()."
            errors.fail(
                "muon",
                "params",
                "whole on every device",
                "matrices that are cut, of which none has the whole",
                remedy,
            )
        mine, theirs = tree.partition(params, is_mine)
        chosen = {path for path, leaf in tree.items(params) if is_mine(path, leaf)}
        gradient, rest_gradient = tree.partition(gradients, lambda path, _: path in chosen)
        rate = scalar(at(learning_rate, state[0].count))

        def move(g: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            u = torch.lerp(u, g, 1 - momentum)
            out, inner = p.shape[-2:]
            size = 0.2 * max(out, inner) ** 0.5 if match else max(1, out / inner) ** 0.5
            turned = orthogonal(
                torch.lerp(g, u, momentum) if nesterov else u, steps=steps, dtype=dtype
            ).to(p.dtype)
            return scaled(turned, -rate * size) - scaled(p, rate * weight_decay), u

        updates, velocity = unzip(2, move, gradient, state[0].velocity, mine)
        rest_updates, rest_state = others.update(rest_gradient, state[1], theirs)
        return tree.combine(updates, rest_updates), (
            Momentum(state[0].count + 1, velocity),
            rest_state,
        )

    return Optimizer(init, update)


@door
def orthogonal(x: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An approximation of U V^T of x = U S V^T.

    After five steps the singular values are in 0.5..1.5, with the signs and the order of those of
    x. A quintic p(x) = 3.4445 x - 4.775 x^3 + 2.0315 x^5 of singular values, by matrix products.
    """
    y = x.to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.addmm(
            y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445
        )
    return y.mT if tall else y
