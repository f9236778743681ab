"""Optimizers as pairs of pure functions over trees.

    state = optimizer.init(params)
    updates, state = optimizer.update(gradients, state, params)
    params = apply(params, updates)                                 # params + updates

An optimizer takes anything shaped like params for gradients, so optimizers compose: `chain(clip(1.0), adamw(3e-4))` gives to the
second what the first makes of the gradients. A state is a record whose count of updates is an int64 tensor; so a whole run of
training is a function that vmap, grad and compile go through (an ensemble is `vmap(init)`, a gradient with respect to the learning
rate is a gradient). Absent leaves `()` have neither gradient nor state: frozen weights cost nothing.

Source: the shape of optax (DeepMind), Babuschkin et al., The DeepMind JAX ecosystem, 2020.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from .. import _checks, tree
from .._doors import door, printed, uncalled
from ..records import ABSENT, record
from ..tree import Tree
from . import fused
from .norms import cut_axes, norm
from .schedules import Rate, at, check_rate

Where: TypeAlias = Callable[[str, Tensor], bool]
Column: TypeAlias = list[Tensor]


def matrices(path: str, leaf: Tensor) -> bool:
    """True for leaves of two axes or more, which weight decay is for."""
    return leaf.dim() >= 2


@dataclass(frozen=True, repr=False)
class Optimizer:
    """Two pure functions, `init, update = optimizer`. Prints as the call that made it.

    init: (params) -> state
    update: (gradients, state, params) -> (updates, state); updates are to be added to params.
    text: that call, or "" for one of a user's own.
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    text: str = field(default="", kw_only=True, compare=False)
    __call__ = uncalled

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """init, update."""
        return iter((self.init, self.update))

    def __repr__(self) -> str:
        return self.text or "Optimizer(init, update)"

    def _replace(self, **fields: Any) -> "Optimizer":
        return replace(self, **fields)


@record
class Momentum(NamedTuple):
    """The state of `sgd`. count: int64 (); velocity: like params, or () without momentum."""

    count: Tensor
    velocity: Any


@record
class Moments(NamedTuple):
    """The state of `adamw`. count: int64 (); mean, square: like params."""

    count: Tensor
    mean: Any
    square: Any


@record
class Accumulated(NamedTuple):
    """The state of `accumulate`. count: int64 (), gradients held; total: their sum; inner: the state of the optimizer within."""

    count: Tensor
    total: Any
    inner: Any


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
def sgd(learning_rate: Rate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent.

        g = gradient + weight_decay p        u = momentum u + g        p = p - rate (g + momentum u if nesterov else u)

    Args:
        learning_rate: a number, a tensor (), or a schedule.
        weight_decay: of every leaf, added to the gradient as torch.optim.SGD does.

    Law: steps are those of torch.optim.SGD (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    """
    check_rate("sgd", learning_rate)
    _share("sgd", "momentum", momentum)
    _positive("sgd", "weight_decay", weight_decay)
    if nesterov and not momentum:
        _checks.fail("sgd", "nesterov", "used with momentum", "momentum 0", "Give it momentum=0.9.")

    def init(params: Tree) -> Momentum:
        return Momentum(_zero(params), tree.map(torch.zeros_like, params) if momentum else ABSENT)

    def update(gradients: Tree, state: Momentum, params: Tree) -> tuple[Tree, Momentum]:
        rate = _scalar(at(learning_rate, state.count))

        def move(g: Tensor, p: Tensor, *velocity: Tensor) -> tuple[Tensor, ...]:
            g = g.add(p, alpha=weight_decay) if weight_decay else g
            if not velocity:
                return (_scaled(g, -rate),)
            u = velocity[0] * momentum + g
            return _scaled(g.add(u, alpha=momentum) if nesterov else u, -rate), u

        trees = (state.velocity,) if momentum else ()
        moved, *velocity = _unzip(1 + len(trees), move, gradients, params, *trees)
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
        decays: f(path, leaf), True for leaves that decay: matrices by default, as in nanoGPT, not norms and biases.

    Law: steps are those of torch.optim.AdamW (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv:1711.05101.
    """
    check_rate("adamw", learning_rate)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        _checks.fail("adamw", "betas", "two numbers", f"a {type(betas).__name__}", "Such as (0.9, 0.999).", TypeError)
    b1, b2 = betas
    _share("adamw", "betas", b1)
    _share("adamw", "betas", b2)
    _positive("adamw", "epsilon", epsilon)
    _positive("adamw", "weight_decay", weight_decay)

    def init(params: Tree) -> Moments:
        return Moments(_zero(params), tree.map(torch.zeros_like, params), tree.map(torch.zeros_like, params))

    def moved(gs: Column, ms: Column, vs: Column, rate: Tensor, count: Tensor) -> tuple[Column, Column, Column]:
        pull = _scalar(-rate / (1 - b1 ** count.double()))
        spread = _scalar((1 - b2 ** count.double()).sqrt())
        ms = [torch.lerp(m, g, 1 - b1) for m, g in zip(ms, gs, strict=True)]
        vs = [(v * b2).addcmul(g, g, value=1 - b2) for v, g in zip(vs, gs, strict=True)]
        us = [_scaled(m, pull) / (v.sqrt() / spread.to(v.dtype) + epsilon) for m, v in zip(ms, vs, strict=True)]
        return us, ms, vs

    def update(gradients: Tree, state: Moments, params: Tree) -> tuple[Tree, Moments]:
        rate, count = at(learning_rate, state.count), state.count + 1
        gs, ms, vs, ps, build = _columns(gradients, state.mean, state.square, params)
        if fused.serves(gs, ms, vs, ps):
            us, ms, vs = fused.adam(gs, ms, vs, count=count, rate=rate, betas=betas, epsilon=epsilon)
        else:
            us, ms, vs = moved(gs, ms, vs, rate, count)
        if weight_decay:
            held = [decays(path, leaf) for path, leaf in tree.items(params)]
            share = _scalar(rate * weight_decay)
            us = [u - _scaled(p, share) if h else u for u, p, h in zip(us, ps, held, strict=True)]
        updates, mean, square = build(us), build(ms), build(vs)
        return updates, Moments(count, mean, square)

    return Optimizer(init, update)


@door
def hidden_matrices(path: str, leaf: Tensor) -> bool:
    """True for the matrices inside layers, which Muon is for: neither embedding nor head, neither norms nor biases."""
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
    """Momentum whose singular values are all set to about one, for matrices; another optimizer for the rest.

        u = momentum u + (1 - momentum) g        p = p (1 - rate weight_decay) - rate s orthogonal(lerp(g, u, momentum))

    Args:
        learning_rate: of the matrices: a number, a tensor (), or a schedule.
        steps: Newton-Schulz iterations.
        match: True scales by s = 0.2 sqrt(max(out, in)), which gives updates the size of AdamW's, so that its learning rate and
            decay serve; False by s = sqrt(max(1, out / in)), as in the original.
        where: f(path, leaf), True for the matrices.
        rest: the optimizer of all other leaves; None is `adamw(learning_rate)` where match, `adamw(3e-4)` where not.
        dtype: that the iterations run in.
        specs: on a mesh, how params are cut, as in `norm`: none of the matrices may be.

    Law: steps are those of torch.optim.Muon (test_optimizers.py::test_an_optimizer_takes_the_steps_of_torch).
    Source: Jordan et al., Muon, kellerjordan.github.io/posts/muon, 2024; Liu et al., Muon is scalable for LLM training,
        arXiv:2502.16982, section 2.2.
    """
    check_rate("muon", learning_rate)
    _share("muon", "momentum", momentum)
    _positive("muon", "weight_decay", weight_decay)
    if not isinstance(steps, int) or not 1 <= steps < 100:
        _checks.fail("muon", "steps", "in 1..99", steps, "Five are enough.")
    others = rest if rest is not None else adamw(learning_rate if match else 3e-4)

    def init(params: Tree) -> tuple[Momentum, Any]:
        mine, theirs = tree.partition(params, where)
        wrong = [path for path, leaf in tree.items(mine) if leaf.dim() != 2]
        if wrong:
            _checks.fail("muon", "where", "true of matrices only", f"true of {wrong[0]}", "Test leaf.dim() == 2 too.")
        return Momentum(_zero(params), tree.map(torch.zeros_like, mine)), others.init(theirs)

    def update(gradients: Tree, state: tuple[Momentum, Any], params: Tree) -> tuple[Tree, tuple[Momentum, Any]]:
        if any(cut_axes("muon", params, specs)):
            remedy = "Use adamw, or keep params whole: sharding.replicated()."
            _checks.fail("muon", "params", "whole on every device", "matrices that are cut, of which none has the whole", remedy)
        mine, theirs = tree.partition(params, where)
        chosen = {path for path, leaf in tree.items(params) if where(path, leaf)}
        gradient, rest_gradient = tree.partition(gradients, lambda path, _: path in chosen)
        rate = _scalar(at(learning_rate, state[0].count))

        def move(g: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            u = torch.lerp(u, g, 1 - momentum)
            out, inner = p.shape[-2:]
            size = 0.2 * max(out, inner) ** 0.5 if match else max(1, out / inner) ** 0.5
            turned = orthogonal(torch.lerp(g, u, momentum) if nesterov else u, steps=steps, dtype=dtype).to(p.dtype)
            return _scaled(turned, -rate * size) - _scaled(p, rate * weight_decay), u

        updates, velocity = _unzip(2, move, gradient, state[0].velocity, mine)
        rest_updates, rest_state = others.update(rest_gradient, state[1], theirs)
        return tree.combine(updates, rest_updates), (Momentum(state[0].count + 1, velocity), rest_state)

    return Optimizer(init, update)


@door
def orthogonal(x: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U V^T of x = U S V^T, about: after five steps the singular values lie in 0.5..1.5, with the signs and the order of x.

    A quintic p(x) = 3.4445 x - 4.775 x^3 + 2.0315 x^5, applied to singular values by products of matrices alone.
    """
    y = x.to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.mT if tall else y


@door
@printed
def clip(max_norm: float, *, specs: Tree = None) -> Optimizer:
    """Gradients no longer than max_norm: g min(1, max_norm / |g|), the norm taken over the whole tree.

    Args:
        max_norm: the longest norm.
        specs: on a mesh, how gradients are cut, which is how params are; see `norm`.

    Source: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, arXiv:1211.5063.
    """
    _positive("clip", "max_norm", max_norm)

    def update(gradients: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        length = norm(gradients, specs=specs) + 1e-6  # torch's small number, so that steps agree
        share = _scalar((max_norm / length).clamp(max=1.0))
        return tree.map(lambda g: _scaled(g, share), gradients), ABSENT

    return Optimizer(lambda params: ABSENT, update)


@printed
def chain(*optimizers: Optimizer) -> Optimizer:
    """Optimizers one after the other: each takes for gradients what the one before gave. The state is the tuple of theirs."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            got = f"a {type(optimizer).__name__}"
            _checks.fail("chain", "optimizers", "Optimizers", got, "Call them first: chain(clip(1.0), adamw(3e-4)).", TypeError)

    def update(gradients: Tree, state: tuple[Any, ...], params: Tree) -> tuple[Tree, tuple[Any, ...]]:
        after = []
        for optimizer, own in zip(optimizers, state, strict=True):
            gradients, own = optimizer.update(gradients, own, params)
            after.append(own)
        return gradients, tuple(after)

    return Optimizer(lambda params: tuple(optimizer.init(params) for optimizer in optimizers), update)


@door
@printed
def accumulate(n: int, optimizer: Optimizer) -> Optimizer:
    """Update once every n gradients, by their mean; the updates between are zero.

    Branch-free, so that it compiles and maps: the optimizer within is asked each time, and its answer is kept every nth time. To
    spread one batch over several passes without this state, use `step(..., micro_batches=n)`.

    Law: n gradients do what their mean does (test_optimizers.py::test_accumulated_gradients_act_by_their_mean).
    """
    if not isinstance(n, int) or n < 1:
        _checks.fail("accumulate", "n", "1 or more", n, "It is the number of gradients in one update.")

    def init(params: Tree) -> Accumulated:
        return Accumulated(_zero(params), tree.map(torch.zeros_like, params), optimizer.init(params))

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


# What they share.


def _scalar(x: Tensor) -> Tensor:
    """The same scalar, which a compiled kernel reads, and does not compute again for every element that it scales.

    Inductor writes the powers of a bias correction into each loop over weights: 5 ms of a step of 800,000 weights. A reduction it
    computes once, unless it is of so few elements that it unrolls it.
    """
    return x.expand(16).amax() if torch.compiler.is_compiling() else x


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar tensor, in the dtype of x: a mapped scalar has an axis, and would widen the product."""
    return x * factor.to(x.dtype)


def _zero(params: Tree) -> Tensor:
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def _unzip(n: int, f: Callable[..., tuple[Tensor, ...]], *trees: Tree) -> list[Tree]:
    """n trees of one structure, from f at every leaf, which gives n tensors."""
    *columns, build = _columns(*trees)
    results = [f(*row) for row in zip(*columns, strict=True)]
    return [build([row[i] for row in results]) for i in range(n)]


def _columns(*trees: Tree) -> list[Any]:
    """The leaves of each tree, and what makes a tree of such leaves."""
    columns, structures = zip(*map(optree.tree_flatten, trees), strict=True)
    if any(structure != structures[0] for structure in structures):
        _checks.fail("update", "gradients, state and params", "trees of one structure", "two", "Give the state of these params.")
    return [*columns, lambda leaves: optree.tree_unflatten(structures[0], leaves)]


def _share(function: str, argument: str, x: float) -> None:
    if not isinstance(x, int | float) or not 0 <= x < 1:
        _checks.fail(function, argument, "in [0, 1)", x, "It is the share of the past that is kept.")


def _positive(function: str, argument: str, x: float) -> None:
    if not isinstance(x, int | float) or not 0 <= x < float("inf"):
        _checks.fail(function, argument, "a number, 0 or more", x, "Choose such a one.")
