"""Attention over parts: the past and the new tokens, in the ways a decode step meets them."""

import pytest
import torch

import funcattn as fa
from funcattn.kernels import Part, attend_parts
from funcattn.records import Attended


def normal(number: int, *shape: int) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape)


def test_parts_without_any_key_give_zero():
    q, none = normal(0, 4, 1, 8), torch.zeros(2, 0, 8)
    assert torch.equal(attend_parts(q, [Part(none, none), Part(none, none)], scale=1.0), torch.zeros_like(q))


def test_no_new_tokens_over_an_empty_past_give_no_logits():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    logits, _ = model.extend(params, torch.zeros(0, dtype=torch.int64), model.cache(4))
    assert logits.shape == (0, 256)


def test_large_products_do_not_overflow_in_float16():
    q, k = torch.full((1, 1, 8), 300.0, dtype=torch.float16), torch.full((1, 3, 8), 300.0, dtype=torch.float16)
    v = normal(1, 1, 3, 8).half()
    for T in (1, 2):
        out = attend_parts(q.expand(1, T, 8), [Part(k, v), Part(k, v)], scale=0.5)
        assert (out - v.mean(-2)).abs().max() < 4 * torch.finfo(torch.float16).eps  # all keys alike: the mean of the values


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "reference"])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_a_forced_kernel_serves_a_cached_step_too(kernel, T):
    config = fa.Config(layers=1)
    model, forced = fa.decoder(config), fa.decoder(config, kernel=kernel)
    params = model.init(fa.key(0))
    tokens = fa.random.randint(fa.key(1), (30,), 0, 256)
    _, past = model.apply(params, tokens[:9], model.cache(40))
    wanted = model.extend(params, tokens[9 : 9 + T], past)[0]
    error = (forced.extend(params, tokens[9 : 9 + T], past)[0] - wanted).abs().max().item()
    with fa.kernels.use(kernel):
        error = max(error, (model.extend(params, tokens[9 : 9 + T], past)[0] - wanted).abs().max().item())
    assert error < 1e-5  # float32 logits of order one


def test_merge_names_both_shapes_of_what_does_not_fit():
    a = Attended(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"lse \(2, 3\) as in a, got out \(2, 3, 4\) and lse \(2, 5\)"):
        fa.merge(a, Attended(a.out, torch.zeros(2, 5)))
    with pytest.raises(ValueError, match="merge: b should be"):
        fa.merge(Attended(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3)), Attended(torch.zeros(3, 2, 3, 4), torch.zeros(3, 2, 3)))


def test_a_cached_step_runs_under_autocast():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, past = model.apply(params, torch.arange(5), model.cache(8, dtype=torch.bfloat16))
        logits, past = model.apply(params, torch.arange(1), past)
    assert int(past.length) == 6
    assert logits.isfinite().all()
