"""Steps of a compiled model over a past in codes: one call of the operator, as near to the exact
decoder over what the codes stand for as that of floats is.
"""

import dataclasses

import operated
import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn.caches import Branch, quantized
from funcattn.compilation import fused

pytestmark = operated.MARKS

CONFIG = dataclasses.replace(operated.CONFIG, head_size=32)
MODEL = fa.decoder(CONFIG)
PARAMS = operated.weights(CONFIG)
TOKENS = fa.random.randint(fa.key(1), (300,), 0, 48)


def remembering(n, config=CONFIG, **options):
    model = fa.decoder(config)
    kind = quantized(**{"block": 64, "recent": 20, **options})
    return model.apply(PARAMS, TOKENS[:n], model.cache(330, kind=kind))[1]


@pytest.fixture
def calls(monkeypatch):
    """The codes of each call of the operator."""
    seen, run = [], fused.run
    monkeypatch.setattr(fused, "run", lambda *args: seen.append(args[-1]) or run(*args))
    return seen


def check(got, wanted):
    """As test_fused.py's bound: 8 times what floats are off, here of two ways of adding floats."""
    for a, b in zip(
        (got[0], *got[1].k, *got[1].v), (wanted[0], *wanted[1].k, *wanted[1].v), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2.0**-17 * float(wanted[0].abs().max()))


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_reads_the_codes(calls, bits, instructions):
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    try:
        fast = fa.compile(MODEL, backend="eager")
        for n, T, sinks in ((3, 1, 4), (120, 1, 0), (290, 5, 4), (290, 17, 3)):
            past, new = remembering(n, bits=bits, sinks=sinks), TOKENS[:T]
            check(fast.extend(PARAMS, new, past), MODEL.extend(PARAMS, new, past))
            assert len(calls[-1].tensors) == 6 * max(0, (n - sinks - 20) // 64)
            branch = fa.commit(Branch(past, MODEL.cache(9)), MODEL.extend(PARAMS, new, past)[1], 1)
            check(fast.extend(PARAMS, new, branch), MODEL.extend(PARAMS, new, branch))
        assert len(calls) == 8
    finally:
        torch.ops.funcattn.instructions(-1)


def test_a_tree_of_drafts_sees_all_codes(calls):
    fast, past = fa.compile(MODEL, backend="eager"), remembering(200, bits=4)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    options = {"mask": mask, "positions": past.length + torch.tensor([0, 1, 1])}
    check(
        fast.extend(PARAMS, TOKENS[:3], past, **options),
        MODEL.extend(PARAMS, TOKENS[:3], past, **options),
    )
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, {"block": 16}),
        (dataclasses.replace(CONFIG, window=50), {}),
        (dataclasses.replace(CONFIG, attention_cap=5.0), {}),
    ],
    ids=["other blocks", "a window", "a cap"],
)
def test_what_the_operator_does_not_read_runs_as_the_model_does(calls, config, options):
    past, model = remembering(200, config, **options), fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    check(fast.extend(PARAMS, TOKENS[:2], past), model.extend(PARAMS, TOKENS[:2], past))
    assert not calls


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_batch_read_codes_in_common_once(calls, bits):
    """Behind a past that is not mapped, or tails of their own behind it; vmap of vmap too."""
    fast, past = fa.compile(MODEL, backend="eager"), remembering(200, bits=bits)
    tokens = TOKENS[:12].reshape(2, 3, 2)
    step = lambda model: vmap(lambda tokens: model.extend(PARAMS, tokens, past))(tokens[0])
    check(step(fast), step(MODEL))
    grow = lambda tokens: fa.commit(
        Branch(past, MODEL.cache(9)), MODEL.extend(PARAMS, tokens, past)[1], tokens[0] % 3
    )
    branches = vmap(vmap(grow))(tokens).tail
    step = lambda model: vmap(
        vmap(lambda tokens, tail: model.extend(PARAMS, tokens, Branch(past, tail)))
    )(tokens, branches)
    check(step(fast), step(MODEL))
    assert [len(codes.tensors) for codes in calls] == [12, 12]


def test_rows_of_a_batch_with_codes_of_their_own_run_as_the_model_does(calls):
    fast = fa.compile(MODEL, backend="eager")
    pasts = [remembering(n, bits=4) for n in (200, 130)]
    pasts = fa.tree.map(lambda *leaves: torch.stack(leaves), *pasts)
    tokens = TOKENS[:4].reshape(2, 2)
    step = lambda model: vmap(lambda tokens, past: model.extend(PARAMS, tokens, past))(
        tokens, pasts
    )
    check(step(fast), step(MODEL))
    assert not calls


def test_futures_of_a_past_in_codes_are_each_alone(calls):
    """Until a block fills, whose codes are those of a future, the operator runs; as the model does
    behind it.
    """
    fast, past = fa.compile(MODEL, backend="eager"), remembering(130, bits=4)
    write = lambda model: (
        lambda key: fa.generate(
            *(key, model, PARAMS, TOKENS[:1], past), steps=30, sampler=fa.sampling.temperature(1.0)
        )
    )
    keys = fa.split(fa.key(3), 3)
    got, after = vmap(write(fast))(keys)
    run = len(calls)
    assert 0 < run < 30
    assert after.length.tolist() == [160] * 3
    for i, key in enumerate(keys):
        assert torch.equal(got[i], write(MODEL)(key)[0])


def test_a_compiled_model_writes_what_the_model_writes():
    fast = fa.compile(MODEL, backend="eager")
    write = lambda model: fa.generate(
        fa.key(0), model, PARAMS, TOKENS[:5], remembering(100, bits=4), steps=90
    )
    (ours, after), (theirs, _) = write(fast), write(MODEL)
    assert torch.equal(ours, theirs)
    assert int(after.length) == 100 + 5 + 89
