"""The closed family against the dense float64 reference: every kind of input, every nesting of
transforms, exact.
"""

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import funcattn as fa
from funcattn import masks
from funcattn.kernels.backends import torch_blocks
from funcattn.kernels.closed import operators

EXACT = 1e-11  # float64: sums of some hundred products, at up to three orders of derivative

T, S, D = 5, 7, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that tiny inputs cross several of them."""
    monkeypatch.setattr(torch_blocks, "ELEMENTS", 64)
    monkeypatch.setattr(torch_blocks, "KEYS", 4)
    monkeypatch.setattr(torch_blocks, "ROWS", 4)


@pytest.fixture(params=["two passes", "one pass"])
def passes(request, monkeypatch):
    """A jvp by a contraction after the value, and with the value, as where one kernel makes both,
    and the tangents of a contraction likewise; passes() is the number of values with tangents.
    """
    count, attend_jvp = [], operators.attend_jvp
    if request.param == "one pass":
        monkeypatch.setattr(operators, "has_attend_jvp", lambda spec, tensors: not spec.biased)
        monkeypatch.setattr(operators, "has_attend_vjp", lambda spec, tensors: False)
        monkeypatch.setattr(operators, "joins_tangents", lambda kernel: True)
        monkeypatch.setattr(
            operators, "attend_jvp", lambda *x: (count.append(1), attend_jvp(*x))[1]
        )
    return lambda: len(count)


def normal(number: int, *shape: int) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape, dtype=torch.float64)


def inputs(
    H: int = 4, K: int = 2, lead: tuple[int, ...] = (2,), Dv: int = D
) -> tuple[torch.Tensor, ...]:
    return normal(1, *lead, H, T, D), normal(2, *lead, K, S, D), normal(3, *lead, K, S, Dv)


def empty_first_row(m: masks.Mask) -> masks.Mask:
    row = torch.arange(T).unsqueeze(-1) == 0
    return masks.Mask(torch.where(row, 0, m.start), torch.where(row, 0, m.stop))


OPTIONS = {
    "plain": {},
    "causal": {"mask": masks.causal(T, S)},
    "window with an empty row": {
        "mask": empty_first_row(masks.causal(T, S) & masks.window(T, 3) | masks.sinks(T, 1))
    },
    "a mask for each example": {"mask": masks.padding(T, torch.tensor([3, 0]))},
    "booleans": {"mask": fa.random.bernoulli(fa.key(4), 0.6, (T, S))},
    "booleans for each head": {"mask": fa.random.bernoulli(fa.key(5), 0.6, (2, 4, T, S))},
    "bias": {"bias": normal(6, 2, 4, T, S)},
    "bias for all heads": {"bias": normal(7, T, S)},
    "bias along keys": {"bias": normal(8, 4, 1, S)},
    "mask and bias": {"mask": masks.causal(T, S), "bias": normal(9, 4, T, S)},
    "scale": {"scale": torch.tensor(0.3, dtype=torch.float64)},
    "dropout": {"dropout": 0.3, "key": fa.key(10), "mask": masks.causal(T, S)},
}


def close(found, wanted, tolerance: float = EXACT) -> None:
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        infinite = torch.isinf(y)
        assert torch.equal(infinite, torch.isinf(x))
        assert not x.isnan().any()
        size = y[~infinite].abs().max().item() if (~infinite).any() else 0.0
        assert (
            (x - y)[~infinite].abs().max().item() <= tolerance * max(size, 1.0)
            if (~infinite).any()
            else True
        )


def both(kind: str, f):
    """f(attention) under the family and under the reference must agree."""
    options = OPTIONS[kind]

    def under(kernel):
        return lambda q, k, v, **more: fa.attention(q, k, v, kernel=kernel, **(options | more))

    close(f(under("flash")), f(under("reference")))


def loss(attention):
    return lambda q, k, v: attention(q, k, v).sin().sum()


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    ("H", "K", "lead", "Dv"), [(4, 2, (2,), 5), (4, 1, (2,), D), (4, 4, (2,), D)]
)
def test_value_gradient_jvp_and_hvp_are_those_of_the_reference(kind, H, K, lead, Dv, passes):
    primal = inputs(H, K, lead, Dv)
    tangent = tuple(x.cos() for x in primal)
    both(kind, lambda f: f(*primal))
    both(kind, lambda f: grad(loss(f), (0, 1, 2))(*primal))
    both(kind, lambda f: jvp(f, primal, tangent)[1])
    both(kind, lambda f: jvp(grad(loss(f), (0, 1, 2)), primal, tangent)[1])


NESTINGS = {
    "grad of jvp": lambda f, x, t: grad(lambda *y: jvp(loss(f), y, t)[1], (0, 1, 2))(*x),
    "grad of grad": lambda f, x, t: grad(
        lambda *y: sum(g.sin().sum() for g in grad(loss(f), (0, 1, 2))(*y)), (0, 1, 2)
    )(*x),
    "jvp of jvp": lambda f, x, t: jvp(lambda *y: jvp(f, y, t)[1], x, t)[1],
    "jvp of jvp of jvp": lambda f, x, t: jvp(
        lambda *y: jvp(lambda *z: jvp(f, z, t)[1], y, t)[1], x, t
    )[1],
    "grad of jvp of grad": lambda f, x, t: grad(
        lambda *y: sum(g.sin().sum() for g in jvp(grad(loss(f), (0, 1, 2)), y, t)[1]), (0, 1, 2)
    )(*x),
    "vmap of grad over queries": lambda f, x, t: vmap(grad(loss(f), (0, 1, 2)), (0, None, None))(
        several(x[0]), x[1], x[2]
    ),
    "grad of vmap over queries": lambda f, x, t: grad(
        lambda q, k, v: vmap(loss(f), (0, None, None))(several(q), k, v).square().sum(), (0, 1, 2)
    )(*x),
    "vmap of vmap over queries and values": lambda f, x, t: vmap(
        vmap(f, (0, None, None)), (None, None, 0)
    )(several(x[0]), x[1], several(x[2])),
    "vmap of jvp of grad over queries and keys": lambda f, x, t: vmap(
        lambda q, k: jvp(grad(loss(f), (0, 1, 2)), (q, k, x[2]), t)[1]
    )(several(x[0]), several(x[1])),
    "jvp of vmap of grad of jvp": lambda f, x, t: jvp(
        lambda q: vmap(
            lambda k: grad(lambda q: jvp(lambda q: loss(f)(q, k, x[2]), (q,), (t[0],))[1])(q)
        )(several(x[1])),
        x[:1],
        t[:1],
    )[1],
    "jacrev": lambda f, x, t: jacrev(lambda q: f(q, x[1], x[2])[0, 0, 1:])(x[0]),
    "jacfwd in keys": lambda f, x, t: jacfwd(lambda k: f(x[0], k, x[2])[0, 0, 1:])(x[1]),
    "hessian": lambda f, x, t: hessian(lambda k: loss(f)(x[0], k, x[2]))(x[1]),
    "vjp of a jvp with a cotangent": lambda f, x, t: vjp(lambda *y: jvp(f, y, t)[1], *x)[1](f(*x)),
}


def several(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x.sin(), x.cos()])


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "window with an empty row",
        "a mask for each example",
        "bias for all heads",
        "dropout",
    ],
)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_is_exact(kind, nesting, passes):
    primal = inputs()
    tangent = tuple(x.cos() for x in primal)
    both(kind, lambda f: NESTINGS[nesting](f, primal, tangent))


# of a function of q, k and v under both kernels: what is moved, and by how many passes of value and
# tangent together
MOVES = {
    "all": (1, lambda f, q, k, v: jvp(f, (q, k, v), (q.sin(), k.sin(), v.sin()))),
    "queries": (1, lambda f, q, k, v: jvp(lambda q: f(q, k, v), (q,), (q.sin(),))),
    "keys": (1, lambda f, q, k, v: jvp(lambda k: f(q, k, v), (k,), (k.sin(),))),
    "values": (1, lambda f, q, k, v: jvp(lambda v: f(q, k, v), (v,), (v.sin(),))),
    "gradient in the queries of a jvp in the values": (
        1,
        lambda f, q, k, v: grad(
            lambda q: jvp(lambda v: f(q, k, v), (v,), (v.sin(),))[1].sin().sum()
        )(q),
    ),
    "jvp in the queries of a jvp in the values": (
        1,
        lambda f, q, k, v: jvp(
            lambda q: jvp(lambda v: f(q, k, v), (v,), (v.sin(),)), (q,), (q.sin(),)
        ),
    ),
    "a batch inside": (1, lambda f, q, k, v: jvp(vmap(f), (q, k, v), (q.sin(), k.sin(), v.sin()))),
    "a batch outside": (
        1,
        vmap(lambda f, *x: jvp(f, x, tuple(y.sin() for y in x)), (None, 0, 0, 0)),
    ),
    "many tangents of one value": (
        0,
        lambda f, q, k, v: vmap(lambda t: jvp(f, (q, k, v), (t, k, v)))(several(q)),
    ),
    "nothing": (0, lambda f, q, k, v: jvp(lambda x: (f(q, k, v), x), (q,), (q,))),
    "a gradient": (
        1,
        lambda f, q, k, v: jvp(grad(lambda q: f(q, k, v).sin().sum()), (q,), (q.sin(),)),
    ),
    "a gradient of a batch": (
        1,
        lambda f, q, k, v: jvp(
            lambda q: vmap(grad(lambda q, k: f(q, k, v).sin().sum()), (None, 0))(q, several(k)),
            (q,),
            (q.sin(),),
        ),
    ),
    "a gradient of a gradient": (
        1,
        lambda f, q, k, v: jvp(
            grad(lambda q: grad(lambda k: f(q, k, v).sin().sum())(k).sin().sum()), (q,), (q.sin(),)
        ),
    ),
    "a gradient, many tangents": (
        0,
        lambda f, q, k, v: vmap(lambda t: jvp(grad(lambda q: f(q, k, v).sin().sum()), (q,), (t,)))(
            several(q)
        ),
    ),
}


@pytest.mark.parametrize("passes", ["one pass"], indirect=True)
@pytest.mark.parametrize("moved", MOVES)
def test_value_and_tangent_may_come_from_one_pass(moved, passes):
    wanted, program = MOVES[moved]
    both("causal", lambda f: program(f, *inputs()))
    assert passes() == wanted


# of a function of q, k and v: how many passes make its second derivatives beside that of the value
# and its tangent
SECOND = {
    "jvp of grad": (1, lambda f, x, t: jvp(grad(loss(f), (0, 1, 2)), x, t)),
    "grad of jvp": (1, lambda f, x, t: NESTINGS["grad of jvp"](f, x, t)),
    # the gradient once; the tangents of the value and of the gradient for each
    "jvp of grad, many tangents": (
        3,
        lambda f, x, t: vmap(lambda t: jvp(grad(lambda q: loss(f)(q, *x[1:])), x[:1], (t,)))(
            several(t[0])
        ),
    ),
}


@pytest.mark.parametrize("passes", ["one pass"], indirect=True)
@pytest.mark.parametrize("nesting", SECOND)
def test_a_second_derivative_is_one_pass_more(nesting, passes, monkeypatch):
    wanted, program = SECOND[nesting]
    primal, sizes, contract = inputs(), list[tuple[int, ...]](), operators.contract
    monkeypatch.setattr(
        operators,
        "contract",
        lambda spec, x: (sizes.append(tuple(o.shape for o in spec.likes)), contract(spec, x))[1],
    )
    program(lambda *x: fa.attention(*x, kernel="flash"), primal, tuple(x.cos() for x in primal))
    assert len(sizes) == wanted
    if wanted == 3:
        batched = [any(shape[0] == 3 and len(shape) > 4 for shape in shapes) for shapes in sizes]
        assert sorted(batched) == [False, True, True]


@pytest.mark.parametrize("passes", ["one pass"], indirect=True)
def test_forward_mode_of_autograd_gives_value_and_tangent_in_one_pass(passes):
    q, k, v = inputs()
    f = lambda kernel: lambda q: fa.attention(q, k, v, kernel=kernel)
    t = q.sin().requires_grad_()
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(q, t)
        value, tangent = forward_ad.unpack_dual(f("flash")(moving))
        with forward_ad._set_fwd_grad_enabled(False):
            still = f("flash")(moving)
        assert forward_ad.unpack_dual(still).tangent is None
    close((value, tangent), jvp(f("reference"), (q,), (t,)))
    close(
        torch.autograd.grad(tangent.sin().sum(), t),
        vjp(lambda t: jvp(f("reference"), (q,), (t,))[1].sin().sum(), t)[1](torch.ones(())),
    )
    assert passes() == 1


@pytest.mark.parametrize("passes", ["one pass"], indirect=True)
def test_a_gradient_that_autograd_records_has_a_tangent_in_forward_mode(passes):
    """Forward over reverse in one level of autograd: the gradient must not be that of a primal
    without its tangent.
    """
    q, k, v = inputs()
    f = lambda kernel: lambda q: fa.attention(q, k, v, kernel=kernel).sin().sum()
    x = q.clone().requires_grad_()
    with forward_ad.dual_level():
        y = forward_ad.make_dual(x, q.sin())
        found = forward_ad.unpack_dual(
            torch.autograd.grad(f("flash")(y), y, create_graph=True)[0]
        ).tangent
    close(found, jvp(grad(f("reference")), (q,), (q.sin(),))[1])
    assert passes() == 0


@pytest.mark.parametrize("kind", ["bias", "bias for all heads", "bias along keys", "mask and bias"])
def test_derivatives_in_the_bias_are_exact(kind):
    q, k, v = inputs()
    bias = OPTIONS[kind]["bias"]
    of_bias = lambda f: lambda b: f(q, k, v, bias=b).sin().sum()
    both(kind, lambda f: grad(of_bias(f))(bias))
    both(kind, lambda f: jvp(of_bias(f), (bias,), (bias.cos(),))[1])
    both(kind, lambda f: jvp(grad(of_bias(f)), (bias,), (bias.cos(),))[1])
    both(kind, lambda f: grad(lambda b: jvp(of_bias(f), (b,), (bias.cos(),))[1])(bias))
    both(
        kind,
        lambda f: grad(lambda q: grad(lambda b: f(q, k, v, bias=b).sin().sum())(bias).sin().sum())(
            q
        ),
    )


def test_derivatives_in_the_scale_are_exact():
    primal = inputs()
    scale = torch.tensor(0.7, dtype=torch.float64)
    of_scale = lambda f: lambda s: f(*primal, scale=s).sin().sum()
    both("plain", lambda f: hessian(of_scale(f))(scale))
    both(
        "plain",
        lambda f: grad(lambda q: grad(lambda s: f(q, *primal[1:], scale=s).sin().sum())(scale))(
            primal[0]
        ),
    )


def test_the_log_sum_exp_is_differentiable_at_every_order(passes):
    primal = inputs()
    m = OPTIONS["window with an empty row"]["mask"]

    def f(kernel):
        def value(q):
            out, lse = fa.attend(q, *primal[1:], m, kernel=kernel)
            return (lse[..., 1:].sin().sum() + out.cos().sum()) ** 2

        return value, hessian(value)(primal[0]), fa.attend(*primal, m, kernel=kernel)

    for found, wanted in zip(f("flash")[1:], f("reference")[1:], strict=True):
        close(found, wanted)


def test_leading_axes_broadcast_in_any_pattern(passes):
    q, k, v = normal(1, 3, 1, 4, T, D), normal(2, 2, 2, S, D), normal(3, 1, 1, 2, S, D)
    both(
        "plain",
        lambda f: (
            f(q, k, v),
            grad(loss(f), (0, 1, 2))(q, k, v),
            jvp(grad(loss(f), (0, 1, 2)), (q, k, v), (q, k, v))[1],
        ),
    )


@pytest.mark.parametrize(
    "nesting",
    [
        "grad of jvp",
        "grad of grad",
        "jvp of jvp",
        "grad of jvp of grad",
        "vjp of a jvp with a cotangent",
    ],
)
def test_an_axis_of_the_values_alone_is_counted_once(nesting, passes):
    """Sums over an axis that P lacks: a term without it must not be counted once for each."""
    primal = normal(1, 2, T, D), normal(2, 2, S, D), normal(3, 3, 2, S, D)
    tangent = tuple(x.cos() for x in primal)
    both("plain", lambda f: NESTINGS[nesting](f, primal, tangent))
    for kernel in ("flash", "reference"):
        assert fa.attend(*primal, kernel=kernel).lse.shape == (3, 2, T)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_both_outputs_of_attend_have_right_derivatives_where_one_input_is_mapped(mapped, passes):
    primal = normal(1, 2, T, D), normal(2, 2, S, D), normal(3, 2, S, D)
    tangent = tuple(x.cos() for x in primal)
    batch = tuple(several(x) if d == 0 else x for x, d in zip(primal, mapped, strict=True))

    def value(kernel):
        return lambda *x: sum(y.sin().sum() for y in fa.attend(*x, kernel=kernel))

    for program in (
        lambda f: vmap(lambda *x: jvp(f, x, tangent)[1], mapped)(*batch),
        lambda f: vmap(grad(f, (0, 1, 2)), mapped)(*batch),
        lambda f: grad(lambda *x: vmap(f, mapped)(*x).square().sum(), (0, 1, 2))(*batch),
        lambda f: vmap(lambda *x: jvp(grad(f, (0, 1, 2)), x, tangent)[1], mapped)(*batch),
        lambda f: grad(
            lambda *x: vmap(lambda *y: jvp(f, y, tangent)[1], mapped)(*x).square().sum(), (0, 1, 2)
        )(*batch),
    ):
        close(program(value("flash")), program(value("reference")))


def mapped_with_values(f, q, k, v, tq, tk, tv):
    """A jvp mapped over values and tangents: the log-sum-exp lacks the axis that its tangent
    has.
    """
    return vmap(lambda v, tq, tv: jvp(f, (q, k, v), (tq, tk, tv)))(
        several(v), several(tq), several(tv)
    )


def mapped_twice(f, q, k, v, tq, tk, tv):
    """The same within a map over tangents alone."""
    return vmap(lambda tq: mapped_with_values(f, q, k, v, tq, tk, tv))(several(tq))


@pytest.mark.parametrize("mapped", [mapped_with_values, mapped_twice])
def test_tangents_may_have_axes_that_the_log_sum_exp_lacks(mapped, passes):
    """Each derivative of a jvp in one pass, with both outputs used, in what was given and in the
    tangents.
    """
    x = (
        normal(1, 2, T, D),
        normal(2, 2, S, D),
        normal(3, 2, S, D),
        *(normal(n, 2, rows, D) for n, rows in ((4, T), (5, S), (6, S))),
    )

    def programs(kernel):
        f = lambda *x: tuple(fa.attend(*x, kernel=kernel))
        total = lambda *x: sum(y.sin().sum() for y in tree_leaves(mapped(f, *x)))
        return (
            mapped(f, *x),
            grad(total, tuple(range(6)))(*x),
            jvp(lambda *x: mapped(f, *x), x, tuple(y.cos() for y in x)),
        )

    close(programs("flash"), programs("reference"))


@pytest.mark.parametrize("passes", ["one pass"], indirect=True)
def test_a_gradient_of_another_level_keeps_the_one_pass(passes):
    """What requires a gradient outside of a jvp is constant in it."""
    q, k, v = inputs(4, 4)
    f = lambda kernel: (
        lambda q: (
            jvp(lambda v: fa.attention(q, k, v, kernel=kernel), (v,), (v.sin(),))[1].sin().sum()
        )
    )
    wanted = grad(f("reference"))(q)
    close(grad(f("flash"))(q), wanted)
    assert passes() == 1
    leaf = q.clone().requires_grad_()
    close(torch.autograd.grad(f("flash")(leaf), leaf)[0], wanted)
    assert passes() == 2


def test_no_keys_at_all_have_zero_value_and_zero_derivatives():
    q, k, v = normal(1, 2, T, D), normal(2, 2, 0, D), normal(3, 2, 0, D)
    out, lse = fa.attend(q, k, v, kernel="flash")
    assert torch.equal(out, torch.zeros_like(q))
    assert (lse == -math.inf).all()
    value = lambda q: fa.attention(q, k, v, kernel="flash").sin().sum()
    assert torch.equal(grad(value)(q), torch.zeros_like(q))
    assert torch.equal(jvp(grad(value), (q,), (q,))[1], torch.zeros_like(q))


@pytest.mark.parametrize(("lead", "T", "S"), [(2, 0, S), (2, 0, 0), (2, T, 0), (0, T, S)])
def test_nothing_to_attend_has_every_derivative(lead, T, S, passes):
    primal = normal(1, lead, 4, T, D), normal(2, lead, 2, S, D), normal(3, lead, 2, S, D)
    tangent = tuple(x.cos() for x in primal)
    for nesting in ("grad of jvp", "grad of grad", "jvp of jvp", "grad of jvp of grad"):
        both("plain", lambda f, nesting=nesting: NESTINGS[nesting](f, primal, tangent))


def test_dropout_is_the_same_under_vmap_grad_and_any_block_size(monkeypatch):
    q, k, v = inputs(lead=())
    drop = lambda q: fa.attention(q, k, v, dropout=0.4, key=fa.key(3), kernel="flash")
    alone = drop(q)
    close(vmap(drop)(several(q)), torch.stack([drop(x) for x in several(q)]))
    monkeypatch.setattr(torch_blocks, "ELEMENTS", 2**17)
    monkeypatch.setattr(torch_blocks, "KEYS", 256)
    close(drop(q), alone)


def test_dropout_keeps_the_promised_share_and_the_mean():
    q, k, v = torch.zeros(1, 64, 2), torch.zeros(1, 512, 2), torch.ones(1, 512, 1)
    rate, pairs = 0.25, 64 * 512
    # share of pairs kept
    kept = fa.attention(q, k, v, dropout=rate, key=fa.key(0)).mean().item() * (1 - rate)
    deviation = math.sqrt(rate * (1 - rate) / pairs)
    assert abs(kept - (1 - rate)) < 4 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_keep_statistics_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in inputs())
    out, lse = fa.attend(q, k, v, OPTIONS["causal"]["mask"], kernel="flash")
    exact = fa.attend(
        q.double(), k.double(), v.double(), OPTIONS["causal"]["mask"], kernel="reference"
    )
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(lse.double(), exact.lse, 1e-5)
    close(out.double(), exact.out, 4 * torch.finfo(dtype).eps)  # one rounding of values below 4
    first = jvp(lambda q: fa.attention(q, k, v, kernel="flash"), (q,), (q,))[1]
    assert first.dtype == dtype


def test_plain_autograd_sees_the_same_gradients_of_both_orders(passes):
    primal = [x.requires_grad_() for x in inputs(H=2, K=1, lead=())]
    f = lambda *x: fa.attention(*x, OPTIONS["causal"]["mask"], kernel="flash")
    assert torch.autograd.gradcheck(f, primal, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, primal, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_torchs_older_vmap_is_refused_with_the_remedy():
    """torch.autograd.grad(is_grads_batched=True) maps by a mechanism of its own, which cannot loop
    over our operations.
    """
    q, k, v = inputs()
    out = fa.attention(q.requires_grad_(), k, v, kernel="flash")
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.grad(out, q, torch.stack([out, out]), is_grads_batched=True)


def test_shared_keys_are_never_expanded_under_vmap():
    """64 examples of queries over one k and v of 1 MB each: nothing near 64 MB may be allocated at
    once.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    Largest.size = max(Largest.size, x.untyped_storage().nbytes())
            return out

    q, k, v = torch.zeros(64, 2, 4, 16), torch.zeros(2, 8192, 16), torch.zeros(2, 8192, 16)
    one = k.nbytes
    for kernel in ("flash", "reference"):
        Largest.size = 0
        with Largest():
            vmap(lambda q, kernel=kernel: fa.attention(q, k, v, kernel=kernel))(q)
        # the dense route holds these, and only these
        logits = 64 * 2 * 4 * 8192 * 4 if kernel == "reference" else 0
        assert Largest.size <= max(4 * one, logits)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_attention_and_its_derivatives_equal_eager(backend):
    q, k, v = normal(1, 2, 4, 20, D), normal(2, 2, 2, 20, D), normal(3, 2, 2, 20, D)
    m = masks.causal(20)
    value = lambda q, k, v, m: fa.attention(q, k, v, m).sin().sum()
    programs = [
        lambda q, k, v, m: fa.attention(q, k, v, m),
        lambda q, k, v, m: grad(value, (0, 1, 2))(q, k, v, m),
        lambda q, k, v, m: vmap(grad(lambda q, k: value(q, k, v[0], m)))(q, k),
        lambda q, k, v, m: jvp(lambda q: fa.attention(q, k, v, m), (q,), (q,))[1],
        lambda q, k, v, m: jvp(grad(lambda q: value(q, k, v, m)), (q,), (q,))[1],
        lambda q, k, v, m: fa.attention(q, k, v, masks.complement(m)),
    ]
    for program in programs:
        torch._dynamo.reset()
        close(
            torch.compile(program, fullgraph=True, backend=backend)(q, k, v, m), program(q, k, v, m)
        )


def test_second_derivatives_compile_for_every_head_size(passes):
    """With dynamic shapes the scale is a symbolic number, which no text of a contraction holds."""
    k, v = normal(2, 2, 2, 20, D), normal(3, 2, 2, 20, D)
    value = lambda q: fa.attention(q, k, v, kernel="flash").sin().sum()
    program = lambda q: jvp(grad(value), (q,), (q.cos(),))
    q = normal(1, 2, 4, 19, D)
    torch._dynamo.reset()
    close(torch.compile(program, backend="aot_eager", dynamic=True)(q), program(q))


@pytest.mark.real("Inductor compiles for it")
def test_a_compiled_training_step_equals_the_eager_one():
    q, k, v = normal(1, 4, 20, D), normal(2, 2, 20, D), normal(3, 2, 20, D)
    W = normal(4, D, D).requires_grad_()
    step = lambda W: fa.attention(q @ W, k, v, masks.causal(20)).sin().sum()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    close(torch.autograd.grad(compiled(W), W), torch.autograd.grad(step(W), W))


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_autocast_gives_the_dtype_that_torchs_attention_gives(given):
    q, k, v = (x.to(given) for x in inputs())
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        for kernel in (None, "flash", "reference"):
            out, lse = fa.attend(q, k, v, kernel=kernel)
            assert out.dtype == wanted.dtype == torch.bfloat16
            assert lse.dtype == torch.float32
            close(out.double(), wanted.double(), 4 * torch.finfo(torch.bfloat16).eps)
