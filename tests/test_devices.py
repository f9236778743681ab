"""Everything follows its inputs: nothing is made where they are not. And what fits a GPU is chosen for one.

Inputs lie on the CPU while torch's default device is another one, `meta`, whose tensors mix with no others: what makes a tensor of
its own without saying where fails, or comes out there, as it would beside inputs on a GPU. That needs no GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import masks, sampling, training

CONFIG = fa.Config(vocabulary=32, width=32, layers=2, heads=4, kv_heads=2, head_size=8, feed_forward=64, context=64)
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
EMPTY = {kind.__name__: MODEL.cache(40, kind=kind) for kind in (fa.Cache, fa.Ring, fa.Pages, fa.QuantizedCache)}
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
        updates, state = optimizer.update(grad(lambda p: fa.loss(MODEL, p, TOKENS))(PARAMS), state, PARAMS)
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


# What is chosen on a GPU, told from fake tensors, which have a device and no numbers.


@pytest.fixture
def on_gpu(monkeypatch):
    """Queries, keys and values, and a mask, on a GPU that is not there."""
    monkeypatch.setattr(fa.kernels.choice, "TRITON", True)
    with FakeTensorMode(), torch.device("cuda"):
        yield torch.empty(4, 20, 8), torch.empty(2, 20, 8), masks.causal(20)


def test_triton_is_chosen_on_a_gpu_where_it_can_run(on_gpu):
    q, k, mask = on_gpu
    assert fa.explain(q, k, k, mask).chosen == "triton"
    assert fa.explain(q, k, k, mask.dense(20)).chosen != "triton"
    assert fa.explain(q.double(), k.double(), k.double(), masks.window(20, 3)).chosen == "flash"
    assert fa.explain(q.narrow(1, 0, 1), k, k, masks.window(1, 3)).chosen == "reference"  # a decode step is dense
    out, lse = fa.attend(q, k, k, mask)
    assert (out.device.type, lse.device.type) == ("cuda", "cuda")


def test_the_values_of_a_mask_on_a_gpu_are_not_waited_for(on_gpu, monkeypatch):
    q, k, mask = on_gpu
    monkeypatch.setattr(fa._checks, "value", lambda x: pytest.fail("it was looked at"))
    fa.attention(q, k, k, mask)


def test_masks_of_a_gpu_stay_there_under_every_kernel(on_gpu):
    q, k, mask = on_gpu
    for kernel in ("flash", "triton", "sdpa"):
        assert fa.attention(q, k, k, mask, kernel=kernel).device.type == "cuda"
        pushed = jvp(lambda q, kernel=kernel: fa.attention(q, k, k, mask, kernel="flash"), (q,), (q,))[1]
        assert pushed.device.type == "cuda"
