"""override_sdpa and functional: other people's modules against what torch computes, and against its
dense route under transforms.

Equal numbers alone prove nothing, for torch computes them too: where a call must be ours, calls of
our attention are counted.
"""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import funcattn as fa
from funcattn.interop import functional, override_sdpa, sdpa

EXACT = 1e-11  # float64: sums of some hundred products, at up to two orders of derivative
B, T, E = 2, 5, 8


@pytest.fixture
def calls(monkeypatch):
    """How often our attention was called, one entry a call."""
    seen = []
    ours = sdpa.attention
    monkeypatch.setattr(
        sdpa, "attention", lambda *args, **options: seen.append(args) or ours(*args, **options)
    )
    return seen


def normal(number: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape, dtype=dtype)


def close(found, wanted, tolerance=EXACT) -> None:
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    assert len(found) == len(wanted) > 0
    for x, y in zip(found, wanted, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert not x.numel() or (x - y).abs().max() <= tolerance * (1 + y.abs().max())


# The signature.

HIDDEN = fa.random.bernoulli(fa.key(5), 0.6, (3, 5))
HIDDEN[0] = True
SIGNATURE = {
    "two axes": (((3, 8), (5, 8), (5, 8)), {}),
    "three axes": (((4, 3, 8), (4, 5, 8), (4, 5, 8)), {}),
    "four axes": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {}),
    "five axes": (((2, 1, 4, 3, 8), (3, 4, 5, 8), (4, 5, 8)), {}),
    "queries without a batch": (((4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {}),
    "one head of keys": (((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8)), {}),
    "one head of queries": (((2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {}),
    "wider values": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 9)), {}),
    "causal": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"is_causal": True}),
    "causal, two axes, fewer keys": (((5, 8), (3, 8), (3, 8)), {"is_causal": True}),
    "booleans": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"attn_mask": HIDDEN}),
    "booleans for each example": (
        ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
        {"attn_mask": HIDDEN.expand(2, 1, 3, 5)},
    ),
    "booleans where heads broadcast": (
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
        {"attn_mask": HIDDEN.expand(2, 1, 3, 5)},
    ),
    "numbers": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"attn_mask": normal(6, 4, 3, 5)}),
    "numbers, two axes": (((3, 8), (5, 8), (5, 8)), {"attn_mask": normal(7, 3, 5)}),
    "a mask along keys": (((4, 3, 8), (4, 5, 8), (4, 5, 8)), {"attn_mask": HIDDEN[0]}),
    "causal upper left": (
        ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
        {"attn_mask": bias.causal_upper_left(3, 5)},
    ),
    "causal lower right": (
        ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
        {"attn_mask": bias.causal_lower_right(3, 5)},
    ),
    "scale": (((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"scale": 0.1}),
    "grouped": (((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"enable_gqa": True}),
    "grouped, causal, three axes": (
        ((4, 3, 8), (2, 5, 8), (2, 5, 8)),
        {"enable_gqa": True, "is_causal": True},
    ),
    "grouped, values in other groups": (
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 1, 5, 8)),
        {"enable_gqa": True},
    ),
    "no keys": (((2, 4, 3, 8), (2, 4, 0, 8), (2, 4, 0, 8)), {}),
}


@pytest.mark.parametrize(("shapes", "options"), SIGNATURE.values(), ids=SIGNATURE)
def test_every_argument_means_what_it_means_in_torch(shapes, options, calls):
    inputs = tuple(normal(number, *shape) for number, shape in enumerate(shapes))
    tangents = tuple(normal(10 + number, *shape) for number, shape in enumerate(shapes))
    f = lambda *inputs: F.scaled_dot_product_attention(*inputs, **options)
    loss = lambda *inputs: f(*inputs).sin().sum()
    every = lambda: (
        f(*inputs),
        jvp(f, inputs, tangents),
        jvp(grad(loss, (0, 1, 2)), inputs, tangents),
    )
    with sdpa_kernel(SDPBackend.MATH):
        wanted = every()
    with override_sdpa():
        found = every()
    close(found, wanted)
    assert len(calls) == 3


def test_a_query_that_sees_no_key_gives_zeros():
    q = k = v = normal(1, 2, 3, 4)
    with override_sdpa():
        out, tangent = jvp(
            lambda q: F.scaled_dot_product_attention(q, k, v, HIDDEN[:, :3] & False), (q,), (q,)
        )
    assert not torch.stack([out, tangent]).any()


ERRORS = {
    "a causal bias and is_causal": (
        ValueError,
        "with a CausalBias",
        {"attn_mask": bias.causal_upper_left(3, 5), "is_causal": True},
    ),
    "another size of bias": (
        ValueError,
        r"causal_lower_right\(3, 5\), got \(3, 6\)",
        {"attn_mask": bias.causal_lower_right(3, 6)},
    ),
    "a mask of integers": (
        TypeError,
        "mask should be boolean",
        {"attn_mask": torch.ones(3, 5, dtype=torch.int64)},
    ),
    "a mask of another length": (
        ValueError,
        "mask should be such that it broadcasts",
        {"attn_mask": HIDDEN[:, :4]},
    ),
    "dropout without a key": (ValueError, r"override_sdpa\(key=fa.key\(0\)\)", {"dropout_p": 0.5}),
}


@pytest.mark.parametrize(("kind", "message", "options"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_is_a_clear_error(kind, message, options):
    q, k, v = normal(1, 2, 4, 3, 8), normal(2, 2, 4, 5, 8), normal(3, 2, 4, 5, 8)
    with override_sdpa(), pytest.raises(kind, match=message):
        F.scaled_dot_product_attention(q, k, v, **options)


def test_shapes_that_do_not_fit_are_clear_errors():
    q, k = normal(1, 2, 4, 3, 8), normal(2, 2, 3, 5, 8)
    with override_sdpa():
        with pytest.raises(ValueError, match="leading axes that broadcast"):
            F.scaled_dot_product_attention(q, k, k)
        with pytest.raises(ValueError, match="K dividing H = 4"):
            F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        with pytest.raises(ValueError, match=r"query should be \(\*lead, L, E\), got \(8,\)"):
            F.scaled_dot_product_attention(q[0, 0, 0], k, k)


@pytest.mark.parametrize(
    "given", [fa.split(fa.key(0)), torch.zeros(2), 7], ids=["a batch", "floating", "a seed"]
)
def test_the_key_is_one_key(given):
    with (
        pytest.raises(ValueError, match="override_sdpa: key should be one key"),
        override_sdpa(key=given),
    ):
        pass


# PyTorch's own samples.


# Samples lie within +-9: logits reach 9 * 9 * sqrt(8) = 229, whose rounding exp makes a relative
# error; four such errors meet.
LOGITS = 4 * 229


@pytest.fixture(scope="module")
def opinfo():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def samples(opinfo, dtype, dropping):
    found = [
        x
        for x in opinfo.sample_inputs(torch.get_default_device(), dtype, requires_grad=True)
        if (x.kwargs.get("dropout_p", 0) > 0) == dropping
    ]
    assert len(found) >= 12
    for sample in found:
        tensors = [
            sample.input,
            *sample.args,
            *(x for x in [sample.kwargs.get("attn_mask")] if x is not None),
        ]

        def f(*tensors, options=sample.kwargs):
            options = options | ({"attn_mask": tensors[3]} if len(tensors) > 3 else {})
            return opinfo(*tensors[:3], **options)

        tangents = tuple(normal(20 + n, *x.shape).to(dtype) for n, x in enumerate(tensors))
        yield f, tensors, tangents


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_samples_of_pytorch_pass_with_gradients(dtype, opinfo, calls):
    tolerance = LOGITS * torch.finfo(dtype).eps
    for number, (f, tensors, _) in enumerate(samples(opinfo, dtype, dropping=False)):
        wanted = f(*tensors)
        gradients = torch.autograd.grad(wanted.sin().sum(), tensors)
        with override_sdpa():
            found = f(*tensors)
        close(
            (found, torch.autograd.grad(found.sin().sum(), tensors)), (wanted, gradients), tolerance
        )
        assert len(calls) == number + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_samples_of_pytorch_have_the_forward_derivative_that_they_say_is_missing(dtype, opinfo):
    assert not opinfo.supports_forward_ad  # if this changed, torch closed the gap
    tolerance = LOGITS * torch.finfo(dtype).eps
    for f, tensors, tangents in samples(opinfo, dtype, dropping=False):
        primals = tuple(x.detach() for x in tensors)
        gradient = grad(lambda *x, f=f: f(*x).sin().sum(), tuple(range(len(primals))))
        both = lambda f=f, p=primals, t=tangents, g=gradient: (jvp(f, p, t), jvp(g, p, t))
        with sdpa_kernel(SDPBackend.MATH):
            wanted = both()
        with override_sdpa():
            close(both(), wanted, tolerance)


def test_the_samples_of_pytorch_with_dropout_drop_what_the_key_says(opinfo):
    for f, tensors, tangents in samples(opinfo, torch.float64, dropping=True):
        primals = tuple(x.detach() for x in tensors)
        with override_sdpa(key=fa.key(3)):
            found = jvp(f, primals, tangents)
        with fa.kernels.use("reference"), override_sdpa(key=fa.key(3)):
            close(found, jvp(f, primals, tangents))
        with override_sdpa(key=fa.key(4)):
            assert not torch.equal(f(*primals), found[0])


# Modules.


def attending(**options):
    module = nn.MultiheadAttention(E, 2, batch_first=True, **options)
    return module, lambda x, **given: module(x, x, x, need_weights=False, **given)[0]


def layer(kind=nn.TransformerEncoderLayer, **options):
    return kind(E, 2, 16, dropout=0.0, batch_first=True, **options)


UPPER = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
PADDED = torch.arange(T) >= torch.tensor([[T], [3]])  # the last two of the second example
MEMORY = normal(2, B, 7, E)


def crossing():
    module = nn.MultiheadAttention(E, 2, batch_first=True, kdim=E, vdim=E)
    return module, lambda x: module(x, MEMORY, MEMORY, need_weights=False)[0]


def sequence_first():
    module = nn.MultiheadAttention(E, 2, add_bias_kv=True, add_zero_attn=True)
    return module, lambda x: module(x, x, x, need_weights=False)[0]


def called(module, **options):
    return module, lambda x: module(x, **options)


def decoding(**options):
    module = layer(nn.TransformerDecoderLayer)
    return module, lambda x: module(x, MEMORY, **options)


def encoding():
    with warnings.catch_warnings():
        # its nested tensors are a prototype; the override does not take that path
        warnings.simplefilter("ignore")
        return called(
            nn.TransformerEncoder(layer(), 2),
            src_key_padding_mask=PADDED,
            mask=UPPER != 0,
            is_causal=True,
        )


def weighing():
    module = nn.MultiheadAttention(E, 2, batch_first=True)
    return module, lambda x: module(x, x, x, attn_mask=UPPER)


def with_options(made, **options):
    module, f = made
    return module, lambda x: f(x, **options)


MODULES = {  # how to make one, and how many calls of attention it makes
    "self-attention": (attending, 1),
    "self-attention, sequence first, with more keys": (sequence_first, 1),
    "cross-attention": (crossing, 1),
    "a key_padding_mask": (lambda: with_options(attending(), key_padding_mask=PADDED), 1),
    "an attn_mask": (lambda: with_options(attending(), attn_mask=UPPER), 1),
    "both masks": (
        lambda: with_options(attending(), attn_mask=UPPER, key_padding_mask=PADDED.double() * -9),
        1,
    ),
    "causal": (lambda: with_options(attending(), attn_mask=UPPER, is_causal=True), 1),
    "weights wanted": (weighing, 0),
    "encoder layer": (lambda: called(layer()), 1),
    "encoder layer, norm first": (
        lambda: called(layer(norm_first=True), src_mask=UPPER, is_causal=True),
        1,
    ),
    "encoder, padded and causal": (encoding, 2),
    "decoder layer": (lambda: decoding(tgt_mask=UPPER, tgt_is_causal=True), 2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "number"), MODULES.values(), ids=MODULES)
def test_modules_of_torch_become_closed(make, number, training, calls):
    torch.manual_seed(0)
    module, f = make()
    module.double().train(training)
    x, dx = normal(1, B, T, E), normal(3, B, T, E)
    keep = ~PADDED.unsqueeze(-1)  # what a padded query gives, no one reads
    out = lambda x: [y * keep if y.shape == (B, T, E) else y for y in tree_leaves(f(x))]
    gradient = grad(lambda x: sum(y.sin().sum() for y in out(x)))
    every = lambda: (out(x), jvp(out, (x,), (dx,)), jvp(gradient, (x,), (dx,)))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = every()
    with override_sdpa():
        found = every()
        assert len(calls) == 3 * number
        with torch.no_grad():
            inferred = out(x)
        assert len(calls) == 4 * number
    close(found, wanted)
    close(inferred, wanted[0])


def test_a_default_device_hides_no_attention(calls):
    module, f = attending()
    module.double()
    x, dx = normal(1, B, T, E), normal(3, B, T, E)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = jvp(f, (x,), (dx,))
    with torch.device("meta"), override_sdpa():
        found = jvp(f, (x,), (dx,))
    close(found, wanted)
    assert len(calls) == 1


def test_the_hessian_and_the_gradient_of_each_example_go_through():
    module, f = attending()
    module.double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = normal(1, B, T, E)
    loss = lambda params, x: (
        functional_call(module, params, (x, x, x), {"need_weights": False})[0].sin().sum()
    )
    every = lambda: (
        hessian(lambda x: f(x).sin().sum())(x[0]),
        vmap(grad(loss), (None, 0))(params, x),
    )
    with sdpa_kernel(SDPBackend.MATH):
        wanted = every()
    with override_sdpa():
        close(every(), wanted)


def test_a_function_of_the_user_that_holds_torchs_function_is_found_too(calls):
    held = F.scaled_dot_product_attention
    x = normal(1, T, E)
    with override_sdpa():
        close(held(query=x, key=x, value=x), held(x, x, x))
    assert len(calls) == 2


def test_a_graph_recorded_inside_is_differentiated_outside_as_often_as_one_likes():
    x = normal(1, B, T, E).requires_grad_()
    f = lambda: F.scaled_dot_product_attention(x, x, x).sin().sum()

    def third(y):
        for _ in range(3):
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
            y = gradient.pow(2).sum()
        return gradient

    with override_sdpa():
        y = f()
    with sdpa_kernel(SDPBackend.MATH):
        close(third(y), third(f()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_the_module_runs_our_attention_again(reentrant, calls):
    x = normal(1, B, T, E).requires_grad_()
    f = lambda x: F.scaled_dot_product_attention(x, x, x)
    (wanted,) = torch.autograd.grad(f(x).sin().sum(), x)
    with override_sdpa():
        checkpoint(f, x, use_reentrant=reentrant).sin().sum().backward()
        assert len(calls) == 2
        close(x.grad, wanted)
        if not reentrant:
            close(
                torch.autograd.grad(checkpoint(f, x, use_reentrant=False).sin().sum(), x), (wanted,)
            )
            assert len(calls) == 4


def test_a_checkpoint_draws_the_same_again():
    x = normal(1, B, T, E).requires_grad_()
    f = lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    with override_sdpa(key=fa.key(0)):
        (wanted,) = torch.autograd.grad(f(x).sum(), x)
    with override_sdpa(key=fa.key(0)):
        y = checkpoint(f, x, use_reentrant=False).sum()
    close(torch.autograd.grad(y, x), (wanted,))


def test_a_recomputation_that_forgets_the_count_is_refused_other_weights():
    x = normal(1, B, T, E).requires_grad_()
    f = lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    with override_sdpa(key=fa.key(0)), pytest.raises(RuntimeError, match="0 in a backward pass"):
        CheckpointFunction.apply(f, True, x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_under_autocast_the_dtype_is_that_of_torch(dtype):
    q = normal(1, B, T, E, dtype=dtype)
    module, f = attending()
    tolerance = 4 * torch.finfo(torch.bfloat16).eps  # torch rounds weights to bfloat16 on the way
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        of_module = f(q.float())
        with override_sdpa():
            close(F.scaled_dot_product_attention(q, q, q, is_causal=True), wanted, tolerance)
            close(
                jvp(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (q,), (q,))[
                    0
                ],
                wanted,
                tolerance,
            )
            close(f(q.float()), of_module, tolerance)


# Randomness.


def test_dropout_is_a_function_of_the_key_and_of_the_number_of_the_call():
    x = normal(1, B, T, E)
    f = lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    state = torch.get_rng_state()
    with override_sdpa(key=fa.key(0)):
        first, second = f(), f()
    with override_sdpa(key=fa.key(0)):
        close(f(), first, 0)
    close(first, fa.attention(x, x, x, dropout=0.5, key=fa.fold_in(fa.key(0), 0)), 0)
    close(second, fa.attention(x, x, x, dropout=0.5, key=fa.fold_in(fa.key(0), 1)), 0)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_in_a_module_keeps_the_mean():
    # every query gives the mean of the values, weighed by what was kept
    x = torch.ones(1, 1, 400, E)
    with override_sdpa(key=fa.key(0)):
        out = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)
    # 160000 weights kept with probability 3/4, each then 1/300: the mean has standard deviation
    # sqrt(1/3 / 160000) = 0.0014.
    assert abs(out.mean() - 1) < 5 * 0.0014
    assert out.std() > 0.01


# The context.


def ambient():
    return (
        _len_torch_function_stack(),
        torch.backends.mha.get_fastpath_enabled(),
        F.multi_head_attention_forward,
    )


def test_the_context_leaves_everything_as_it_was():
    before = ambient()
    with override_sdpa(), override_sdpa():
        assert ambient() != before
    assert ambient() == before
    with pytest.raises(KeyError), override_sdpa(), override_sdpa():
        raise KeyError
    assert ambient() == before


def test_what_was_switched_off_before_stays_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with override_sdpa():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_contexts_nest_and_the_innermost_has_its_own_key(calls):
    x = normal(1, B, T, E)
    f = lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    with override_sdpa(key=fa.key(0)):
        outer = f()
        with override_sdpa(key=fa.key(1)):
            inner = f()
    assert len(calls) == 2
    close(inner, fa.attention(x, x, x, dropout=0.5, key=fa.fold_in(fa.key(1), 0)), 0)
    assert not torch.equal(outer, inner)


def test_another_thread_is_left_alone(calls):
    x = normal(1, B, T, E)
    inside, outside = threading.Event(), threading.Event()

    def elsewhere():
        F.scaled_dot_product_attention(x, x, x)
        with override_sdpa():
            inside.set()
            outside.wait(10)

    with override_sdpa():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        assert inside.wait(10)
        assert not calls
    assert not torch.backends.mha.get_fastpath_enabled()  # the other thread still needs it so
    outside.set()
    thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_modes_see_what_they_saw():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = normal(1, T, E)
    with override_sdpa(), Watch():
        x.exp()
    assert torch.Tensor.exp in seen


# Compiled.


def graphs(f):
    """f compiled whole, and a list that grows by one graph for each compilation."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    return torch.compile(f, backend=backend, fullgraph=True), made


@pytest.mark.cpu("under a default device torch.compile cannot trace nn.MultiheadAttention")
def test_what_was_compiled_outside_is_compiled_anew_inside(calls):
    module, f = encoding()
    module.double().eval()
    x = normal(1, B, T, E)
    compiled, made = graphs(lambda x: f(x) * ~PADDED.unsqueeze(-1))
    with torch.no_grad():  # torch's fused inference path, which calls attention by no name
        wanted = compiled(x)
        assert not calls
        with override_sdpa():
            found = compiled(x)
        assert (len(calls), len(made)) == (2, 2)
        assert not any(
            "scaled_dot_product" in str(node.target) or "transformer" in str(node.target)
            for node in made[1].graph.nodes
        )
        compiled(x)
        assert len(made) == 2
    close(found, wanted)


@pytest.mark.cpu("under a default device torch.compile cannot trace nn.MultiheadAttention")
def test_a_training_step_compiles_whole(calls):
    module = layer().double().train()
    x = normal(1, B, T, E)
    gradients = lambda f: torch.autograd.grad(f(x).sin().sum(), tuple(module.parameters()))
    wanted = gradients(module)
    with override_sdpa():
        found = gradients(torch.compile(module, backend="aot_eager", fullgraph=True))
    close(found, wanted)
    assert calls


@pytest.mark.cpu("under a default device torch.compile cannot trace nn.MultiheadAttention")
def test_the_forward_derivative_of_a_module_compiles_whole():
    module, f = attending()
    module.double().requires_grad_(False)
    x, dx = normal(1, B, T, E), normal(2, B, T, E)
    tangent = lambda x, dx: jvp(f, (x,), (dx,))[1]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = tangent(x, dx)
    with override_sdpa():
        close(torch.compile(tangent, backend="aot_eager", fullgraph=True)(x, dx), wanted)


def test_compiled_dropout_draws_what_eager_dropout_draws():
    f = lambda x: F.scaled_dot_product_attention(
        x.unflatten(-1, (2, 4)), x.unflatten(-1, (2, 4)), x.unflatten(-1, (2, 4)), dropout_p=0.5
    )
    compiled, _ = graphs(f)
    x = normal(1, B, T, E)
    with override_sdpa(key=fa.key(0)):
        wanted = [f(x) for _ in range(3)]
    with override_sdpa(key=fa.key(0)):
        found = [compiled(x) for _ in range(3)]
    close(found, wanted)


# functional.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, ids, *, sign=1.0):
        return self.head(self.embed(ids) * sign + self.shift)


def test_functional_is_the_module_as_a_pure_function():
    module, ids = Tied(), torch.tensor([1, 4])
    before = copy.deepcopy(module.state_dict())
    apply, params = functional(module)
    close(apply(params, ids, sign=-1.0), module(ids, sign=-1.0), 0)
    moved = {name: p + 1 for name, p in params.items()}
    assert not torch.equal(apply(moved, ids), module(ids))
    assert all(not p.requires_grad for p in params.values())
    assert all(p.requires_grad for p in module.parameters())
    close(module.state_dict(), before, 0)


def test_tied_weights_are_one_entry_and_have_the_gradient_of_both_uses():
    module, ids = Tied(), torch.tensor([1, 4])
    apply, params = functional(module)
    assert set(params) == {"embed.weight"}
    module(ids).sin().sum().backward()
    close(
        grad(lambda p: apply(p, ids).sin().sum())(params)["embed.weight"],
        module.embed.weight.grad,
        1e-6,
    )
    assert apply(params, ids).shape == (2, 6)


def test_what_a_call_writes_to_buffers_is_forgotten():
    module = nn.BatchNorm1d(3).train()
    apply, params = functional(module)
    x = normal(1, 5, 3, dtype=torch.float32)
    close(apply(params, x), apply(params, x), 0)
    assert not any(buffer.any() for name, buffer in module.named_buffers() if name != "running_var")


def test_an_ensemble_of_modules_is_a_vmap_over_params():
    modules = [layer().double().eval() for _ in range(3)]
    apply, _ = functional(modules[0])
    params = [functional(module)[1] for module in modules]
    stacked = {name: torch.stack([p[name] for p in params]) for name in params[0]}
    x = normal(1, B, T, E)
    with override_sdpa():
        close(vmap(apply, (0, None))(stacked, x), torch.stack([module(x) for module in modules]))


def test_importing_the_library_does_not_import_transformers():
    script = (
        "import sys, funcattn; assert funcattn.interop.override_sdpa; assert 'transformers' not in "
        "sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
