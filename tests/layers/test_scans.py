"""Scans in chunks against loops over tokens in float64: values, states, every nesting of transforms,
decays that vanish, padding, and what a step costs.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funcattn as fa
from funcattn import layers
from funcattn.testing import check_transforms

close = torch.testing.assert_close
BOUND = {"atol": 1e-10, "rtol": 1e-10}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor


def inputs(seed, T, *lead, K=1, H=2, Dk=2, Dv=3, features=1):
    keys = fa.split(fa.key(seed), 6)
    normal = lambda i, *shape: fa.random.normal(keys[i], (*lead, *shape), torch.float64)
    uniform = lambda i, *shape: fa.random.uniform(keys[i], (*lead, *shape), torch.float64)
    return Inputs(
        normal(0, K, T, Dk),
        normal(1, K, T, Dk),
        normal(2, H, T, Dv),
        -2 * uniform(3, H, T, features),
        uniform(4, H, T),
        normal(5, H, Dk, Dv),
    )


def loop(delta, x):
    """The recurrence, token by token: outputs and all states."""
    G = x.v.shape[-3] // x.k.shape[-3]
    q, k = x.q.repeat_interleave(G, -3), x.k.repeat_interleave(G, -3)
    s, out, states = x.state, [], []
    for t in range(x.v.shape[-2]):
        s = x.g[..., t, :].exp().unsqueeze(-1) * s
        u = x.v[..., t, :]
        if delta:
            u = x.beta[..., t, None] * (u - (s.mT @ k[..., t, :, None]).squeeze(-1))
        s = s + k[..., t, :, None] * u[..., None, :]
        states.append(s)
        out.append((s.mT @ q[..., t, :, None]).squeeze(-1) / k.shape[-1] ** 0.5)
    return torch.stack(out, -2), torch.stack(states, -3)


def scanned(delta, x, **options):
    if delta:
        return layers.gated_delta(x.q, x.k, x.v, x.g, x.beta, x.state, **options)
    return layers.linear_attention(x.q, x.k, x.v, x.g, x.state, **options)


def states_of(delta, x, **options):
    if delta:
        return layers.gated_delta_states(x.k, x.v, x.g, x.beta, x.state, **options)
    return layers.linear_attention_states(x.k, x.v, x.g, x.state, **options)


@pytest.mark.parametrize(
    ("delta", "features", "depth"),
    [
        (True, 1, 2),
        (False, 2, 2),
        pytest.param(True, 1, 3, marks=pytest.mark.slow),
        pytest.param(True, 2, 3, marks=pytest.mark.slow),
        pytest.param(False, 1, 3, marks=pytest.mark.slow),
        pytest.param(False, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_scan_is_its_loop_in_every_nesting(delta, features, depth):
    """Outputs and last states, differentiated in all arguments, over chunks of two tokens."""
    x = inputs(0, 3, features=features)

    def f(x):
        out, state = scanned(delta, x, chunk=2)
        return out.sin(), state.sin()

    def reference(x):
        out, states = loop(delta, x)
        return out.sin(), states[..., -1, :, :].sin()

    report = check_transforms(f, x, reference=reference, depth=depth, tolerance=1e-10)
    assert not report.off


@settings(max_examples=25)
@given(
    st.booleans(),
    st.integers(1, 11),
    st.sampled_from([1, 2, 4, 64]),
    st.booleans(),
    st.sampled_from([(1, 1), (1, 3), (2, 4)]),
    st.integers(0, 99),
)
def test_any_length_in_any_chunks_gives_the_loop(delta, T, chunk, by_feature, heads, seed):
    """Values, states after each token, and a derivative of a tangent; with gates of exactly 0 and 1
    and decays that underflow.
    """
    K, H = heads
    x = inputs(seed, T, 2, K=K, H=H, features=2 if by_feature else 1)
    x.g[0, :, T // 2] = -torch.inf
    x.g[1, :, T // 3] = -1e30
    x.g[0, 0, T // 4] = 0.0
    x.beta[0, :, T // 2], x.beta[1, :, T // 2] = 0.0, 1.0
    out, states = loop(delta, x)
    got = scanned(delta, x, chunk=chunk)
    close(got.out, out, **BOUND)
    close(got.state, states[..., -1, :, :], **BOUND)
    close(states_of(delta, x, chunk=chunk), states, **BOUND)

    total = lambda y: y[0].sin().sum() + y[1].cos().sum()
    ours = lambda x: total(scanned(delta, x, chunk=chunk))
    theirs = lambda x: total((lambda out, s: (out, s[..., -1, :, :]))(*loop(delta, x)))
    tangent = inputs(seed + 1, T, 2, K=K, H=H, features=2 if by_feature else 1)
    for a, b in zip(
        jvp(grad(ours), (x,), (tangent,))[1], jvp(grad(theirs), (x,), (tangent,))[1], strict=True
    ):
        assert a.isfinite().all()
        close(a, b, **BOUND)


@pytest.mark.parametrize("delta", [False, True])
def test_a_chunk_that_decayed_wholly_leaves_no_nan_at_any_order(delta):
    """float32, 64 tokens a chunk: sums of log decays far below the smallest exponent."""
    x = Inputs(*(y.float() for y in inputs(1, 130, features=1)))
    x = x._replace(g=x.g * 1e4)
    f = lambda x: scanned(delta, x).out.sin().sum()
    hvp = jvp(grad(f), (x,), (x,))[1]
    assert all(y.isfinite().all() for y in (*grad(f)(x), *hvp))
    out, _ = loop(delta, Inputs(*(y.double() for y in x)))
    close(scanned(delta, x).out.double(), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("delta", [False, True])
def test_the_states_after_each_token_are_those_of_shorter_scans(delta):
    """Of a shorter text, and of the whole with a mask, its count mapped: what a commit takes."""
    x = inputs(2, 7, H=4, K=2, features=2)
    states = states_of(delta, x, chunk=4)
    count = torch.arange(8)
    masked = vmap(lambda n: scanned(delta, x, mask=torch.arange(7) < n).state)(count)
    close(masked, torch.cat((x.state.unsqueeze(-3), states), -3).movedim(-3, 0), **BOUND)
    for n in range(1, 8):
        short = Inputs(*(y[..., :n, :] for y in x[:4]), x.beta[..., :n], x.state)
        close(scanned(delta, short).state, states[..., n - 1, :, :], **BOUND)


@pytest.mark.parametrize("delta", [False, True])
def test_a_masked_token_changes_nothing_even_if_it_is_nan(delta):
    """Wherever it stands: the others give what they give without it."""
    x, mask = inputs(3, 6, 2), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()
    wrong = lambda y: y.masked_fill(~mask.reshape(2, 1, 6, *(1,) * (y.dim() - 3)), torch.nan)
    marred = Inputs(*map(wrong, x[:5]), x.state)
    got = scanned(delta, marred, mask=mask, chunk=4)
    for i in range(2):
        kept = mask[i]
        alone = Inputs(*(y[i][:, kept] for y in x[:5]), x.state[i])
        want = scanned(delta, alone)
        close(got.out[i][:, kept], want.out, **BOUND)
        close(got.state[i], want.state, **BOUND)
        assert not got.out[i][:, ~kept].any()


@pytest.mark.parametrize("delta", [False, True])
def test_two_scans_with_the_state_between_are_one(delta):
    x = inputs(4, 9, features=2)
    whole = scanned(delta, x, chunk=4)
    for n in (0, 1, 4, 9):
        cut = lambda y: (y[..., :n, :], y[..., n:, :])
        firsts, seconds = zip(*map(cut, x[:4]), strict=True)
        a = scanned(delta, Inputs(*firsts, x.beta[..., :n], x.state))
        b = scanned(delta, Inputs(*seconds, x.beta[..., n:], a.state))
        close(torch.cat((a.out, b.out), -2), whole.out, **BOUND)
        close(b.state, whole.state, **BOUND)


def test_leading_axes_broadcast_and_vmap_of_a_state_alone_is_a_batch_of_states():
    x = inputs(5, 5)
    many = inputs(6, 5, 3).state
    want = torch.stack([scanned(True, x._replace(state=s)).out for s in many])
    close(scanned(True, x._replace(state=many)).out, want)
    close(vmap(lambda s: scanned(True, x._replace(state=s)).out)(many), want)
    wide = x._replace(beta=x.beta.expand(3, -1, -1) * torch.ones(3, 1, 1).double())
    assert scanned(True, wide).out.shape == (3, 2, 5, 3)


def test_bfloat16_is_summed_in_float32():
    """The output is that of float32 arithmetic on the rounded inputs, rounded once; under autocast
    too.
    """
    x = inputs(7, 70, Dk=8, Dv=8)
    x = x._replace(k=torch.nn.functional.normalize(x.k, dim=-1))
    low = Inputs(*(y.bfloat16() for y in x))
    want = scanned(True, Inputs(*(y.float() for y in low)))
    got = scanned(True, low)
    assert (got.out.dtype, got.state.dtype) == (torch.bfloat16, torch.float32)
    close(got.out, want.out.bfloat16(), atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        close(scanned(True, Inputs(*(y.float() for y in low))).out, want.out, atol=0, rtol=0)


def test_normalized_queries_and_keys_have_norm_one():
    x = inputs(8, 5)
    unit = lambda y: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    got = layers.gated_delta(*x[:5], normalized=True)
    want = layers.gated_delta(unit(x.q), unit(x.k), *x[2:5])
    close(got.out, want.out)
    close(layers.gated_delta_states(*x[1:5], normalized=True)[..., -1, :, :], want.state)


def state_loop(x, dt, A, B, C, D):
    s, out = torch.zeros(x.shape[0], B.shape[-1], x.shape[-1], dtype=x.dtype), []
    G = x.shape[0] // B.shape[0]
    B, C = B.repeat_interleave(G, 0), C.repeat_interleave(G, 0)
    for t in range(x.shape[1]):
        s = (dt[:, t] * A).exp()[:, None, None] * s
        s = s + B[:, t, :, None] * (dt[:, t, None] * x[:, t])[:, None]
        out.append((s.mT @ C[:, t, :, None]).squeeze(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1), s


def test_the_state_space_is_its_loop_with_groups_and_a_skip():
    keys = fa.split(fa.key(9), 6)
    normal = lambda i, *shape: fa.random.normal(keys[i], shape, torch.float64)
    given = (
        normal(0, 4, 7, 3),
        normal(1, 4, 7).exp(),
        -normal(2, 4).exp(),
        normal(3, 2, 7, 5),
        normal(4, 2, 7, 5),
        normal(5, 4),
    )
    for got, want in zip(layers.state_space(*given, chunk=4), state_loop(*given), strict=True):
        close(got, want, **BOUND)
    f = lambda scan: lambda given: scan(*given)[0].sin().sum()
    ours, theirs = (
        jvp(grad(f(s)), (given,), (given,))[1] for s in (layers.state_space, state_loop)
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, **BOUND)


def test_no_tokens_leave_the_state():
    x = inputs(10, 0)
    for delta in (False, True):
        got = scanned(delta, x)
        assert got.out.shape == (2, 0, 3)
        assert states_of(delta, x).shape == (2, 0, 2, 3)
        assert torch.equal(got.state, x.state)


class Written(TorchDispatchMode):
    """Counts the numbers in new memory that each operation returns, views left out."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers += sum(y.numel() for y in tree_leaves(out) if isinstance(y, Tensor))
        return out


@pytest.mark.parametrize("delta", [False, True])
def test_work_and_memory_are_linear_in_the_length(delta):
    """Numbers written by a derivative of a tangent, and bytes kept for a backward pass."""

    def cost(T):
        x = inputs(11, T, Dk=4, Dv=4)
        f = lambda x: scanned(delta, x, chunk=8).out.sin().sum()
        with Written() as written:
            jvp(grad(f), (x,), (x,))
        kept = {}  # each storage once, held so that its address is not used again

        def pack(y):
            kept[y.untyped_storage().data_ptr()] = y
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            f(Inputs(*(y.requires_grad_() for y in x)))
        return written.numbers, sum(y.untyped_storage().nbytes() for y in kept.values())

    small, middle, great = (torch.tensor(cost(T)) for T in (64, 128, 192))
    assert (middle > small).all()
    assert torch.equal(great - middle, middle - small)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"v": torch.ones(3)}, "v should be"),
        ({"k": torch.ones(3, 5, 2)}, "k should be"),
        ({"q": torch.ones(1, 4, 2)}, "q should be"),
        ({"g": torch.ones(2, 5)}, "log_decay should be"),
        ({"beta": torch.ones(2, 5, 1)}, "beta should be"),
        ({"state": torch.ones(2, 3, 2)}, "state should be"),
    ],
)
def test_a_wrong_shape_is_one_error_that_names_it(change, name):
    with pytest.raises(ValueError, match=f"gated_delta: {name}"):
        scanned(True, inputs(12, 5)._replace(**change))


def test_wrong_kinds_and_options_are_errors():
    x = inputs(13, 5)
    for wrong in (torch.ones(5), torch.ones(4).bool(), "causal"):
        with pytest.raises(ValueError, match="mask should be bool"):
            scanned(True, x, mask=wrong)
    for wrong in (3, 0, True, 2.0):
        with pytest.raises(ValueError, match="chunk should be a power of two"):
            scanned(True, x, chunk=wrong)
    with pytest.raises(TypeError, match="k should be floating"):
        scanned(True, x._replace(k=x.k.long()))
    with pytest.raises(TypeError, match="beta should be a tensor"):
        scanned(True, x._replace(beta=0.5))
    for wrong in ((), None):  # which would be another recurrence
        with pytest.raises(TypeError, match="beta should be a tensor, got"):
            scanned(True, x._replace(beta=wrong))
        with pytest.raises(TypeError, match="gated_delta_states: beta should be a tensor, got"):
            states_of(True, x._replace(beta=wrong))
    with pytest.raises(TypeError, match=r"state should be a tensor, or \(\), got a NoneType"):
        scanned(False, x._replace(state=None))
    with pytest.raises(ValueError, match="at least one head and feature"):
        scanned(True, x._replace(q=x.q[..., :0], k=x.k[..., :0]))
    with pytest.raises(ValueError, match="leading axes should be those that broadcast"):
        scanned(True, x._replace(v=x.v.expand(3, 2, 5, 3), g=x.g.expand(2, 2, 5, 1)))
    with pytest.raises(ValueError, match="tensors should be on one device"):
        scanned(True, x._replace(g=x.g.to("meta")))
    with pytest.raises(TypeError, match="state_space: A should be a floating tensor"):
        layers.state_space(x.v, x.beta, [1.0], x.k, x.q)
    with pytest.raises(ValueError, match="state_space: dt should be"):
        layers.state_space(x.v, x.g, x.v[:, 0, 0], x.k, x.q)
    with pytest.raises(ValueError, match="state_space: A should be"):
        layers.state_space(x.v, x.beta, torch.ones(3), x.k, x.q)
