"""The registry of kernels, and a kernel of one's own wherever a name is taken."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.kernels import Kernel, dispatch
from funcattn.records import Attended

CONFIG = fa.Config(layers=2)
TOKENS = torch.arange(20)


def recording(name="mine", why_not=lambda r: ""):
    """A kernel that is the reference, and the numbers of queries that it was called with."""
    calls = []

    def run(r):
        calls.append(r.q.shape[-2])
        return fa.attend(r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias, kernel="reference")

    return Kernel(name, "the reference, counted", why_not, run), calls


def qkv(T=20):
    return fa.random.normal(fa.key(0), (3, 2, T, 8), torch.float64)


@pytest.mark.parametrize("how", [pytest.param("kernel=", marks=pytest.mark.slow), "use"])
def test_a_kernel_of_ones_own_runs_inside_a_decoder(how):
    """Whole, behind a past, generating, compiled and differentiated: it is called, and the numbers
    are those of the library.
    """
    mine, calls = recording()
    theirs = fa.decoder(CONFIG)
    model = fa.decoder(CONFIG, kernel=mine) if how == "kernel=" else theirs
    params = theirs.init(fa.key(0))
    logits = lambda m: m.logits(params, m.hidden(params, TOKENS)[0])
    slope = lambda m: grad(lambda p: fa.loss(m, p, TOKENS))(params).layers[0].q
    text = lambda m: fa.generate(fa.key(1), m, params, TOKENS, steps=3)[0]
    for verb, exact in (
        (logits, False),
        (slope, False),
        (text, True),
        (lambda m: text(fa.compile(m)), True),
    ):
        wanted, before = verb(theirs), len(calls)
        if how == "use":
            with fa.kernels.use(mine):
                got = verb(model)
        else:
            got = verb(model)
        torch.testing.assert_close(
            got, wanted, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5})
        )
        assert len(calls) > before


def test_a_kernel_of_ones_own_goes_through_transforms_and_compile():
    mine, calls = recording()
    q, k, v = qkv()
    f = lambda q: fa.attention(q, k, v, fa.masks.causal(20), kernel=mine)
    wanted = lambda q: fa.attention(q, k, v, fa.masks.causal(20), kernel="reference")
    for rule in (lambda f: jvp(f, (q,), (q,))[1], lambda f: vmap(f)(torch.stack([q, k]))):
        torch.testing.assert_close(rule(f), rule(wanted))
    assert calls
    before = len(calls)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), wanted(q))
    assert len(calls) > before


def test_a_kernel_may_ask_what_is_recorded_in_compiled_code_too():
    """There it is taken for granted, since transforms cannot be seen."""
    mine, _ = recording(why_not=lambda r: "has no derivative" if r.recorded else "")
    q, k, v = qkv()
    f = lambda q: fa.attention(q, k, v, kernel=mine)
    torch.testing.assert_close(f(q), fa.attention(q, k, v))
    with pytest.raises(ValueError, match="has no derivative"):
        grad(lambda q: f(q).sum())(q)
    with pytest.raises(Exception, match="has no derivative"):
        torch.compile(f, backend="eager", fullgraph=True)(q)


def test_what_a_kernel_returns_is_checked_as_far_as_it_is_read():
    q, k, v = qkv()
    right = fa.attention(q, k, v)
    without = Kernel("mine", "no lse", lambda r: "", lambda r: Attended(right, None))
    torch.testing.assert_close(fa.attention(q, k, v, kernel=without), right)
    with pytest.raises(ValueError, match="should be lse"):
        fa.attend(q, k, v, kernel=without)
    narrow = Kernel("mine", "float32", lambda r: "", lambda r: Attended(right.float(), None))
    with pytest.raises(
        TypeError, match=r"should be out in torch\.float64 as v is, got torch\.float32"
    ):
        fa.attention(q, k, v, kernel=narrow)


def test_attention_inside_of_a_forced_kernel_is_not_that_kernel_again():
    mine = Kernel(
        "mine",
        "the default",
        lambda r: "",
        lambda r: fa.attend(r.q, r.k, r.v, r.mask, scale=r.scale),
    )
    with fa.kernels.use(mine):
        torch.testing.assert_close(fa.attention(*qkv()), fa.attention(*qkv(), kernel="reference"))
        assert fa.explain(*qkv()).chosen == "mine"


def test_a_kernel_prints_as_its_name_and_what_it_is():
    assert repr(recording()[0]) == "Kernel('mine', 'the reference, counted')"


def test_an_explanation_lists_a_kernel_of_ones_own_and_what_it_cannot():
    mine, _ = recording(why_not=lambda r: "draws no dropout" if r.dropout else "")
    explained = fa.explain(*qkv(), kernel=mine)
    assert explained.chosen == "mine"
    assert "-> mine" in repr(explained)
    assert [verdict.kernel for verdict in explained.verdicts[1:]] == [
        kernel.name for kernel in dispatch.REGISTRY
    ]
    with pytest.raises(
        ValueError, match="one that can run on these inputs, got 'mine': draws no dropout"
    ):
        fa.attention(*qkv(), dropout=0.5, key=fa.key(0), kernel=mine)


def test_a_name_that_is_not_listed_lists_the_registry():
    names = ", ".join(repr(kernel.name) for kernel in dispatch.REGISTRY)
    with pytest.raises(
        ValueError, match=f"kernel should be None or one of {names}, or a Kernel, got 'flex'"
    ):
        fa.attention(*qkv(), kernel="flex")
    with (
        pytest.raises(ValueError, match=f"kernels.use: kernel should be one of {names}"),
        fa.kernels.use("flex"),
    ):
        pass


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda r: r.q, "Attended\\(out, lse\\), got a Tensor"),
        (lambda r: Attended(r.q[..., :3], r.q[..., 0]), "out \\(2, 20, 8\\), got \\(2, 20, 3\\)"),
        (
            lambda r: Attended(r.q, r.q),
            "lse \\(2, 20\\), got \\(2, 20, 8\\)\\. .*expand to r\\.lead",
        ),
    ],
)
def test_what_a_kernel_of_ones_own_returns_is_checked(run, message):
    wrong = Kernel("wrong", "of other shapes", lambda r: "", run)
    with pytest.raises(
        (TypeError, ValueError), match=f"what kernel 'wrong' returns should be {message}"
    ):
        fa.attend(*qkv(), kernel=wrong)


def test_the_first_of_the_registry_that_can_and_is_not_passed_over_is_chosen():
    for T in (4, 20):
        explained = fa.explain(*qkv(T))
        can = [verdict.kernel for verdict in explained.verdicts if not verdict.why_not]
        assert can[0] == explained.chosen
    q = qkv(65)[0].requires_grad_()
    assert fa.explain(q, q, q).chosen == "flash"
    assert fa.explain(q[:, :4], q, q).chosen == "reference"


def test_a_small_problem_is_dense_unless_something_is_masked_or_expanded():
    """Where a derivative may follow; T <= 64 costs about what dense operations cost."""
    q = qkv(64)[0].requires_grad_()
    assert fa.explain(q, q, q).chosen == "reference"
    assert fa.explain(q, q, q, fa.masks.causal(64)).chosen == "flash"
    assert fa.explain(q, q, q, bias=torch.zeros(64, 64)).chosen == "flash"
    assert fa.explain(torch.cat([q, q]), q, q).chosen == "flash"
    assert fa.explain(torch.stack([q, q]), q, q).chosen == "flash"


@pytest.mark.parametrize("scheme", [None, fa.int8], ids=["float", "int8"])
@pytest.mark.parametrize("how", ["kernel=", "use"])
def test_a_compiled_step_runs_the_kernel_that_is_forced(how, scheme):
    """One that gives other numbers, after a step without it: neither the operator in C++ nor code
    traced before may stand in.
    """

    def run(r):
        return fa.attend(0 * r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias, kernel="reference")

    flat = Kernel("flat", "the mean of the values", lambda r: "", run)
    config = fa.Config(vocabulary=16, width=64, feed_forward=64, heads=2, kv_heads=2, head_size=32)
    plain, forced = fa.decoder(config), fa.decoder(config, kernel=flat)
    params = fa.tree.map(lambda x: 5 * x if x.dim() > 1 else x, plain.init(fa.key(0)))
    params = params if scheme is None else fa.quantize(scheme)(params)
    past, token = plain.apply(params, TOKENS[:5], plain.cache(16))[1], TOKENS[3:4]
    step = lambda model: model.extend(params, token, past)[0]
    with torch.no_grad():
        wanted = step(forced)
        assert (step(plain) - wanted).abs().max() > 0.1
        if how == "use":
            fast = fa.compile(plain, backend="eager")
            torch.testing.assert_close(step(fast), step(plain), rtol=1e-3, atol=1e-3)
            with fa.kernels.use(flat):
                got, said = step(fast), fast.explain(params)
            torch.testing.assert_close(step(fast), step(plain), rtol=1e-3, atol=1e-3)
        else:
            fast = fa.compile(forced, backend="eager")
            got, said = step(fast), fast.explain(params)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert "the kernel 'flat' is forced" in said
