"""The native kernel where attention is called: transforms, the compiler, tracers, threads, modules of torch, no compiler.

Laws of the family are in test_flash.py, in float64; these are the places that only the choice of this kernel reaches, in
float32 and bfloat16, beside the dense formula in float64.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn import masks, native
from funcattn.kernels.backends import native as backend
from funcattn.testing import check_transforms

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=native.load()),
    pytest.mark.real("it runs on CPUs alone"),
]
H, K, T, S, D = 4, 2, 33, 40, 8
DTYPES = [torch.float32, torch.bfloat16]
CAUSAL = masks.causal(T, S)
KERNELS = pytest.mark.parametrize("kernel", ["native", None])


def normal(number, *shape, dtype=torch.float32):
    return fa.random.normal(fa.key(number), shape, dtype=dtype)


def qkv(dtype=torch.float32, T=T, S=S):
    return tuple(
        normal(n, *shape, dtype=dtype) for n, shape in enumerate([(H, T, D), (K, S, D), (K, S, D)])
    )


def close(found, wanted, dtype=torch.float32, sums=2):
    """Within the rounding of `sums` dot products, each made of the results of the one before.

    In float32 the sum of n products is off by at most n eps / 2 of the sum of their sizes, with n
    the longest here, max(D, S) + 2: a number and its exponential are two more. In bfloat16 sums and
    statistics are in float32, and what a product reads, and what is returned, is rounded once: eps
    for each. Sizes are those of the largest number, and 1.
    """
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    assert len(found) == len(wanted) > 0
    each = (S + 2) / 2 if dtype == torch.float32 else 1
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        far = sums * each * torch.finfo(dtype).eps
        assert (x.double() - y.double()).abs().max() <= far * (1 + y.double().abs().max())


def attended(q, k, v, kernel="native", **options):
    return fa.attention(q, k, v, CAUSAL, kernel=kernel, **options).double().sin()


def loss(*x, **options):
    return attended(*x, **options).sum()


def total(f):
    return lambda *x: f(*x).sum()


def gradients(f, x):
    return grad(total(f), (0, 1, 2))(*x)


# The transform of a function, and how many dot products follow each other: logits and values; then those of a
# cotangent with values, and of its weights with keys; a second derivative has the two of its tangents besides.
RULES = {
    "value": (lambda f, x: f(*x), 2),
    "gradient": (gradients, 4),
    "tangent": (lambda f, x: jvp(f, x, x)[1], 4),
    "tangent of a gradient": (
        lambda f, x: jvp(lambda *x: gradients(f, x), x, x)[1],
        6,
    ),
    "gradient of a gradient": (
        lambda f, x: grad(
            lambda *x: sum(g.double().pow(2).sum() for g in gradients(f, x)), (0, 1, 2)
        )(*x),
        6,
    ),
}


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_each_transform_is_that_of_the_dense_formula(rule, dtype, kernel):
    transform, sums = RULES[rule]
    x = qkv(dtype)
    assert fa.explain(*x, CAUSAL, kernel=kernel).chosen == "native"
    exact = tuple(y.double() for y in x)
    for options in (
        {},
        {"bias": normal(7, H, T, S)},
        {"scale": torch.tensor(0.3)},
        {"dropout": 0.3, "key": fa.key(5)},
    ):
        wide = tree_map(
            lambda y: y.double() if torch.is_tensor(y) and y.is_floating_point() else y, options
        )
        found = transform(lambda *x, o=options: attended(*x, kernel=kernel, **o), x)
        wanted = transform(lambda *x, o=wide: attended(*x, kernel="reference", **o), exact)
        close(found, wanted, dtype, sums)


def test_jacobians_hessians_and_gradients_of_each_example_are_those_of_the_dense_formula():
    with fa.kernels.use("native"):
        q, k, v = (x[:, :3] for x in qkv())
        f = lambda kernel: (
            lambda q: fa.attention(q, k.to(q.dtype), v.to(q.dtype), masks.causal(3), kernel=kernel)
        )
        wanted = jacrev(f("reference"))(q.double())
        close(jacrev(f("native"))(q), wanted)
        close(jacfwd(f("native"))(q), wanted)
        close(
            hessian(lambda q: f("native")(q).sin().sum())(q),
            hessian(lambda q: f("reference")(q).sin().sum())(q.double()),
            sums=6,
        )
        examples = normal(9, 3, *q.shape)
        each = lambda kernel, x: vmap(grad(lambda q: f(kernel)(q).sin().sum()))(x)
        close(each("native", examples), each("reference", examples.double()))
        twice = lambda kernel, x: vmap(vmap(f(kernel)))(x)
        close(
            twice("native", examples.expand(2, *examples.shape)),
            twice("reference", examples.double().expand(2, *examples.shape)),
        )


def test_derivatives_in_bias_and_scale_are_those_of_the_dense_formula():
    q, k, v = qkv()
    f = lambda kernel, dtype: (
        lambda bias, scale: (
            fa.attention(
                *(x.to(dtype) for x in (q, k, v)), CAUSAL, bias=bias, scale=scale, kernel=kernel
            )
            .sin()
            .sum()
        )
    )
    for shape in ((H, T, S), (T, 1), (1, S), (H, 1, 1)):
        x = normal(11, *shape), torch.tensor(0.4)
        exact = tuple(y.double() for y in x)
        close(
            grad(f("native", torch.float32), (0, 1))(*x),
            grad(f("reference", torch.float64), (0, 1))(*exact),
            sums=4,
        )
        both = lambda f, x: jvp(grad(f, (0, 1)), x, x)[1]
        close(
            both(f("native", torch.float32), x),
            both(f("reference", torch.float64), exact),
            sums=6,
        )


def test_transforms_agree_with_each_other_with_a_bias_and_a_scale():
    q, k, v = (x[:, :6] for x in qkv())
    f = lambda kernel: (
        lambda q, k, v, bias, scale: fa.attention(
            q, k, v, masks.causal(6), bias=bias, scale=scale, kernel=kernel
        )
    )
    x = q, k, v, normal(12, H, 6, 6), torch.tensor(0.4)
    # As in `close`; errors are relative to a sum of all outputs with either sign, which is smaller
    # than the sum of their sizes by the root of their number, in all but one draw of a hundred
    # within a quarter of that.
    rounding = 6 * (S + 2) / 2 * torch.finfo(torch.float32).eps
    tolerance = 4 * (H * 6 * D) ** 0.5 * rounding
    check_transforms(
        f("native"), *x, reference=f("reference"), depth=2, tolerance=tolerance, hessians=False
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_flash_drops(dtype):
    q, k, _ = qkv(dtype)
    v = torch.eye(S, dtype=dtype).expand(K, S, S)  # the output is the weights
    dropped = [
        fa.attention(q, k, v, dropout=0.4, key=fa.key(3), kernel=kernel) == 0
        for kernel in ("native", "flash")
    ]
    assert torch.equal(*dropped)
    assert 0.3 < dropped[0].double().mean() < 0.5


PROGRAMS = {
    "value": (lambda q, k, v: fa.attention(q, k, v, CAUSAL), {"attend": 1}),
    "gradient": (
        lambda q, k, v: grad(loss, (0, 1, 2))(q, k, v, None),
        {"attend": 1, "contract": 1},
    ),
    "tangent": (
        lambda q, k, v: jvp(lambda q: fa.attention(q, k, v, CAUSAL), (q,), (q,))[1],
        {"attend_jvp": 1},
    ),
}


@pytest.mark.parametrize("backend", ["nodes", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_code_has_one_node_for_each_pass_and_the_same_numbers(program, dtype, backend):
    f, nodes = PROGRAMS[program]
    found: dict[str, int] = {}

    def count(graph, _):
        for node in graph.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith("funcattn."):
                name = str(node.target).split(".")[1]
                found[name] = found.get(name, 0) + 1
        return graph.forward

    x = qkv(dtype)
    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=count) if backend == "nodes" else backend
    with fa.kernels.use("native"):
        out = torch.compile(f, fullgraph=True, backend=compiler)(*x)
        for one, other in zip(tree_leaves(out), tree_leaves(f(*x)), strict=True):
            if backend == "nodes":
                assert torch.equal(one, other)
            else:  # inductor rounds the sums between the nodes in an order of its own
                close(one, other, dtype)
    assert backend != "nodes" or found == nodes


def test_tracers_counters_and_meta_tensors_see_it():
    x = qkv()
    f = lambda q, k, v: fa.attention(q, k, v, CAUSAL)
    with fa.kernels.use("native"):
        wanted = f(*x)
        assert torch.equal(make_fx(f)(*x)(*x), wanted)
        with pytest.raises(ValueError, match=r"torch\.jit traces plain"):
            torch.jit.trace(f, x, check_trace=False)
        with FlopCounterMode(display=False) as counter:
            f(*x)
        assert counter.get_total_flops() > 0
    close(torch.jit.trace(f, x, check_trace=False)(*x), wanted)
    with FlopCounterMode(display=False) as other:
        fa.attention(*x, CAUSAL, kernel="flash")
    assert counter.get_total_flops() == other.get_total_flops()
    assert fa.attention(*(y.to("meta") for y in x)).shape == wanted.shape

    class Attending(torch.nn.Module):
        def forward(self, q, k, v):
            return f(q, k, v)

    for strict in (False, True):
        torch._dynamo.reset()
        close(torch.export.export(Attending(), x, strict=strict).module()(*x), wanted)


def test_threads_of_python_do_not_disturb_each_other():
    """Value, gradient and one pass with tangents; torch's own `jvp` has one level a process."""

    def work(n):
        mask = masks.causal(20 + 9 * n, 30 + 7 * n)
        shapes = (H, 20 + 9 * n, D), (H, 30 + 7 * n, D), (H, 30 + 7 * n, D)
        x = tuple(normal(50 + n + i, *shape) for i, shape in enumerate(shapes))
        f = lambda q, k, v: fa.attention(q, k, v, mask, kernel="native").sin().sum()
        return f(*x), *grad(f, (0, 1, 2))(*x), *backend.attend_jvp(*x, x, (), 0.3)

    wanted = [work(n) for n in range(8)]
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(3):
            for found, one in zip(pool.map(work, range(8)), wanted, strict=True):
                assert all(map(torch.equal, found, one))


def test_every_number_of_threads_gives_near_numbers_and_each_the_same_bits():
    x = qkv(T=130, S=300)
    f = lambda q, k, v: fa.attention(q, k, v, kernel="native").sin().sum()
    run = lambda: (
        f(*x),
        *grad(f, (0, 1, 2))(*x),
        jvp(f, x, x)[1],
        *jvp(grad(f, (0, 1, 2)), x, x)[1],
    )
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = run()
            assert all(map(torch.equal, run(), found[threads]))
    finally:
        torch.set_num_threads(before)
    close(found[1], found[2])


WITHOUT = """
import torch, funcattn as fa
q = torch.ones(2, 40, 8)
told = fa.explain(q, q, q)
why = next(v.why_not for v in told.verdicts if v.kernel == "native")
assert told.chosen != "native" and {reason!r} in why, told
out = fa.attention(q, q, q, fa.masks.causal(40))
torch.testing.assert_close(out, q)
torch.func.grad(lambda q: fa.attention(q, q, q).sum())(q)
torch.func.jvp(lambda q: fa.attention(q, q, q), (q,), (q,))
segments = [fa.kernels.merging.KVSegment(q, q), fa.kernels.merging.KVSegment(q, q)]
torch.testing.assert_close(fa.kernels.merging.attend_segments(q[:, :1], segments, scale=1.0), q[:, :1])
with fa.kernels.use("native"):
    try:
        fa.attention(q, q, q)
    except ValueError as error:
        assert {reason!r} in str(error), error
        print("refused")
"""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"FUNCATTN_NATIVE": "0"}, "FUNCATTN_NATIVE=0 asks for none"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler"),
    ],
    ids=["asked", "no compiler"],
)
def test_without_the_library_everything_else_runs_and_the_reason_is_told(
    settings, reason, tmp_path
):
    if native.packaged() and "CXX" in settings:
        pytest.skip("a wheel brings the library")
    environment = os.environ | {"FUNCATTN_CACHE": str(tmp_path / "cache")} | settings
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(reason=reason)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "refused"


@pytest.mark.parametrize("kind", ["inference", "leaf", "parameter", "expanded", "offset"])
def test_tensors_of_every_kind_are_read_where_they_lie(kind):
    q, k, v = qkv()
    wanted = fa.attention(q.double(), k.double(), v.double(), CAUSAL, kernel="reference")
    if kind == "inference":
        with torch.inference_mode():
            x = tuple(y.clone() for y in (q, k, v))
            close(fa.attention(*x, CAUSAL, kernel="native"), wanted)
    elif kind == "leaf":
        x = tuple(y.clone().requires_grad_() for y in (q, k, v))
    elif kind == "parameter":
        x = tuple(torch.nn.Parameter(y) for y in (q, k, v))
    elif kind == "offset":
        x = tuple(torch.cat([y.flatten()[:3], y.flatten()])[3:].view(y.shape) for y in (q, k, v))
    else:
        x = q, k[:1].expand(K, S, D), v
        wanted = fa.attention(*(y.double() for y in x), CAUSAL, kernel="reference")
    close(fa.attention(*x, CAUSAL, kernel="native"), wanted)
    if kind in ("leaf", "parameter"):
        found = torch.autograd.grad(fa.attention(*x, CAUSAL, kernel="native").sin().sum(), x)
        exact = tuple(y.detach().double() for y in x)
        close(
            found,
            vjp(lambda *x: fa.attention(*x, CAUSAL, kernel="reference").sin().sum(), *exact)[1](
                torch.tensor(1.0).double()
            ),
        )
