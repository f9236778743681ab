"""Everything follows its inputs: nothing is made where they are not. And what fits a GPU is chosen
for one.

Inputs lie on the CPU while torch's default device is another one, `meta`, whose tensors mix with no
others: what makes a tensor of its own without saying where fails, or comes out there, as it would
beside inputs on a GPU. That needs no GPU.
"""

import os
import subprocess
import sys

import far
import pytest
import torch
from places import ROOT, TESTS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import masks, sampling, training
from funcattn.native import building

CONFIG = fa.Config(
    vocabulary=32, width=32, layers=2, heads=4, kv_heads=2, head_size=8, feed_forward=64, context=64
)
MODEL = fa.decoder(CONFIG)
PARAMS = MODEL.init(fa.key(0))
TOKENS = fa.random.randint(fa.key(1), (12,), 0, 32)
TEXT = fa.random.randint(fa.key(4), (64,), 0, 32)
KEY, KEYS = fa.key(2), fa.split(fa.key(3))
Q, K, V = (fa.random.normal(fa.key(i), (2, heads, 20, 8)) for i, heads in enumerate((4, 2, 2)))
CAUSAL = masks.causal(20)
SINKS = CAUSAL & (masks.window(20, 5) | masks.sinks(20, 2))
IDS = torch.arange(20) // 7
PAST = MODEL.apply(PARAMS, TOKENS, MODEL.cache(40))[1]
EMPTY = {
    kind.__name__: MODEL.cache(40, kind=kind)
    for kind in (fa.Cache, fa.Ring, fa.Pages, fa.QuantizedCache)
}
SCHEMES = {"int8": fa.int8, "int4": fa.int4, "w8a8": fa.w8a8, "nf4": fa.nf4(group=32)}
SMALL = {name: fa.quantize(scheme)(PARAMS) for name, scheme in SCHEMES.items()}
WRITES = sampling.chain(
    sampling.repetition_penalty(1.2),
    sampling.frequency_penalty(0.3),
    sampling.dry(0.8),
    sampling.no_repeat_ngram(2),
    sampling.logit_bias({3: 1.0}),
    sampling.temperature(0.9),
    sampling.top_k(9),
    sampling.top_p(0.9),
)


def attend(kernel, mask):
    """Value, gradient, hvp and a vmapped gradient."""
    loss = lambda q, k, v: fa.attention(q, k, v, mask, kernel=kernel).sum()
    return (
        fa.attend(Q, K, V, mask, kernel=kernel),
        grad(loss, (0, 1, 2))(Q, K, V),
        jvp(grad(loss, (0, 1, 2)), (Q, K, V), (Q, K, V)),
        vmap(grad(loss))(Q, K, V),
        fa.attention(Q, K, V, mask, kernel=kernel, dropout=0.2, key=KEY),
    )


def remember(past):
    """Read, write all, and write a part."""
    logits, past = MODEL.apply(PARAMS, TOKENS, past)
    logits, delta = MODEL.extend(PARAMS, TOKENS[:3], past)
    return logits, fa.commit(past, delta, 2)


def train(optimizer):
    """Two updates."""
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(
            grad(lambda p: fa.loss(MODEL, p, TOKENS))(PARAMS), state, PARAMS
        )
    return updates, state


def serve():
    """Two slots, one of them entered, and a step of both."""
    slots = fa.serving.idle(MODEL, PARAMS, EMPTY["Cache"], 2, sampler=WRITES)
    slots = fa.serving.enter(KEY, MODEL, PARAMS, TOKENS, slots, 0, steps=4, sampler=WRITES)
    return fa.serving.step(MODEL, PARAMS, slots, sampler=WRITES)


PROGRAMS = {
    **{f"attention {kernel}, {name}": lambda kernel=kernel, mask=mask: attend(kernel, mask)
       for kernel in ("flash", "reference") for name, mask in (("none", None), ("sinks", SINKS), ("booleans", CAUSAL.dense(20)))},
    "sdpa": lambda: fa.attention(Q, K, V, CAUSAL),
    "weights": lambda: fa.attention_weights(Q, K, CAUSAL),
    "a score": lambda: fa.kernels.attention_with_score(Q, K, V, lambda s, b, h, i, j: s + (i - j), SINKS),
    "masks": lambda: (~(CAUSAL & SINKS | CAUSAL), masks.segments(IDS), masks.padding(5, IDS), masks.causal(5, offset=IDS)),
    "frequencies": lambda: fa.layers.frequencies(8, base=1e4, scaling=fa.layers.RopeScaling("dynamic", 2.0), length=IDS),
    "a picture": lambda: (masks.picture(SINKS), SINKS),
    "keys": lambda: (fa.split(KEY, 3), fa.fold_in(KEY, 3), fa.random.permutation(KEY, 9), fa.random.randint(KEY, (3,), 0, 9)),
    "draws": lambda: [f(KEY, (3,)) for f in (fa.random.uniform, fa.random.normal, fa.random.gumbel, fa.random.exponential)],
    "categories": lambda: (fa.random.categorical(KEY, Q), fa.random.bernoulli(KEY, 0.3, (3,))),
    "hidden": lambda: MODEL.hidden(PARAMS, TOKENS),
    "compiled": lambda: torch.compile(MODEL.apply, fullgraph=True, backend="eager")(PARAMS, TOKENS, PAST),
    "gradient": lambda: grad(lambda p: fa.loss(MODEL, p, TOKENS))(PARAMS),
    **{f"past {name}": lambda past=past: remember(past) for name, past in EMPTY.items()},
    **{f"quantized {name}": lambda small=small: (MODEL.hidden(small, TOKENS), MODEL.hidden(small, TOKENS[:1]), fa.dequantize(small))
       for name, small in SMALL.items()},
    "quantize": lambda: fa.quantize(fa.int4)(PARAMS),
    "gptq": lambda: fa.gptq(MODEL, TEXT, fa.int4)(PARAMS),
    "lora": lambda: (lambda adapted: (MODEL.hidden(adapted, TOKENS), fa.merge_lora(adapted)))(fa.lora(2)(KEY, PARAMS)),
    "generate": lambda: fa.generate(KEY, MODEL, PARAMS, TOKENS, steps=4, sampler=WRITES),
    "futures": lambda: vmap(lambda key: fa.generate(key, MODEL, PARAMS, TOKENS[:1], PAST, steps=3, sampler=WRITES))(KEYS),
    "speculate": lambda: fa.speculate(KEY, MODEL, PARAMS, fa.drafters.model(MODEL, PARAMS), TOKENS, steps=5, sampler=WRITES),
    "lookup": lambda: fa.speculate(KEY, MODEL, PARAMS, fa.drafters.prompt_lookup(), TOKENS, steps=5),
    "beams": lambda: fa.beam_search(MODEL, PARAMS, TOKENS, steps=3, beams=2),
    "serving": serve,
    "scores": lambda: (fa.score(MODEL, PARAMS, TOKENS), fa.perplexity(MODEL, PARAMS, TOKENS)),
    "adamw": lambda: train(training.chain(training.clip(1.0), training.adamw(training.cosine(1e-2, 9, warmup=2)))),
    "muon": lambda: train(training.muon(0.1)),
    "remat": lambda: grad(lambda p: fa.remat(lambda p: MODEL.hidden(p, TOKENS)[0].sum())(p))(PARAMS),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_made_where_the_inputs_are_not(program):
    with torch.device("meta"):
        found = PROGRAMS[program]()
    leaves = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
    assert leaves
    assert {x.device for x in leaves} == {TOKENS.device}


# The same without a list of programs: the tests themselves on a device that is pretended (far.py).
# Here a part of them, which takes seconds; `make test-device` runs all.


@pytest.mark.slow  # `make test-device` runs all of them
@pytest.mark.cpu("it starts tests on another device")
def test_tests_pass_where_tensors_of_two_devices_do_not_mix():
    try:
        far.built()
    except building.Missing as reason:
        pytest.skip(str(reason))
    files = [str(TESTS / f"test_{name}.py") for name in ("devices", "masks")]
    environment = {
        **os.environ,
        "FUNCATTN_DEVICE": "far",
        "FUNCATTN_DEFAULT": "cpu",
        "HYPOTHESIS_PROFILE": "brief",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture
def x():
    if torch.get_default_device().type != "far":
        pytest.skip("of the pretended device")
    return torch.arange(6.0).reshape(2, 3)


MIXED = {
    "a sum": lambda x: x + torch.ones(3, device="cpu"),
    "an index": lambda x: x[torch.tensor([0], device="cpu")],
    "rows": lambda x: torch.embedding(x, torch.tensor(0, device="cpu")),
    "one of several": lambda x: torch.cat([x, torch.ones(1, 3, device="cpu")]),
    "numpy": lambda x: x.numpy(),
    "a generator": lambda x: torch.rand(3, generator=torch.Generator()),
    "a product of integers": lambda x: x.int() @ x.int().mT,
    "a kernel of the CPU": lambda x: torch.ops.aten._convert_weight_to_int4pack_for_cpu(x.int(), 2),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_what_cuda_refuses_the_pretended_device_refuses(mixed, x):
    with pytest.raises((RuntimeError, TypeError), match=r"device|as on CUDA"):
        mixed(x)


def test_the_pretended_device_computes_as_the_cpu(x):
    assert x.device.type == "far"
    assert type(x) is torch.Tensor
    assert x.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert torch.equal(
        (x + torch.tensor(2.0, device="cpu") * 2).cpu(),
        torch.arange(4.0, 10.0, device="cpu").reshape(2, 3),
    )
    x.mT[0] = 7.0  # a view is of the same memory
    x[:, 1:].copy_(torch.ones(2, 2, device="cpu"))
    assert x.tolist() == [[7.0, 1.0, 1.0], [7.0, 1.0, 1.0]]
    assert x.resize_(3, 3)[:2].tolist() == x.tolist()[:2]
    out = torch.empty(0)
    assert torch.add(x[:2], 1, out=out) is out
    assert out.sum() == x[:2].sum() + 6
    assert jvp(lambda x: torch.ones(3), (x,), (x,))[1].tolist() == [0.0] * 3
    y = x[:2].clone().requires_grad_()
    (y * y).sum().backward()
    assert torch.equal(y.grad, 2 * x[:2])


# What is chosen on a GPU, told from fake tensors, which have a device and no numbers.


@pytest.fixture
def on_gpu(monkeypatch):
    """Queries, keys and values, and a mask, on a GPU that is not there."""
    monkeypatch.setattr(fa.kernels.closed.entry, "TRITON", True)
    with FakeTensorMode(), torch.device("cuda"):
        yield torch.empty(4, 20, 8), torch.empty(2, 20, 8), masks.causal(20)


def test_triton_is_chosen_on_a_gpu_where_it_can_run(on_gpu):
    q, k, mask = on_gpu
    assert fa.explain(q, k, k, mask).chosen == "triton"
    assert fa.explain(q, k, k, mask.dense(20)).chosen != "triton"
    assert fa.explain(q.double(), k.double(), k.double(), masks.window(20, 3)).chosen == "flash"
    # a decode step is dense
    assert fa.explain(q.narrow(1, 0, 1), k, k, masks.window(1, 3)).chosen == "reference"
    out, lse = fa.attend(q, k, k, mask)
    assert (out.device.type, lse.device.type) == ("cuda", "cuda")


def test_the_values_of_a_mask_on_a_gpu_are_not_waited_for(on_gpu, monkeypatch):
    q, k, mask = on_gpu
    monkeypatch.setattr(fa.core.errors, "value", lambda x: pytest.fail("it was looked at"))
    fa.attention(q, k, k, mask)


def test_masks_of_a_gpu_stay_there_under_every_kernel(on_gpu):
    q, k, mask = on_gpu
    for kernel in ("flash", "triton", "sdpa"):
        assert fa.attention(q, k, k, mask, kernel=kernel).device.type == "cuda"
        pushed = jvp(
            lambda q, kernel=kernel: fa.attention(q, k, k, mask, kernel=kernel), (q,), (q,)
        )[1]
        assert pushed.device.type == "cuda"
