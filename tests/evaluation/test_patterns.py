"""Attention patterns against what the layers mix."""

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn.evaluation import attention_pattern

BASE = {"vocabulary": 40, "width": 8, "heads": 4, "kv_heads": 2, "head_size": 4, "feed_forward": 8}
TOKENS = fa.random.randint(fa.key(1), (9,), 0, 40)


@pytest.mark.parametrize(
    "config",
    [{}, {"window": 3}, {"attention_cap": 2.0}, {"sinks": True}, {"attention_scale": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("layer", [0, -1])
def test_a_pattern_mixes_the_values_as_the_layer_does(config, layer):
    model = fa.decoder(fa.Config(**BASE, **config))
    params = fa.tree.map(lambda x: (10 * x).double(), model.init(fa.key(0)))
    if "sinks" in config:
        params = params._replace(
            layers=tuple(x._replace(sinks=torch.arange(4).double()) for x in params.layers)
        )
    pattern = attention_pattern(model, params, TOKENS, layer)
    _, seen = fa.trace(model, params, TOKENS)
    name = f"layers.{layer % 2}.attention"
    v = seen[f"{name}.v"].repeat_interleave(2, 0)
    mixed = (pattern @ v).transpose(0, 1).flatten(-2)
    torch.testing.assert_close(mixed, seen[f"{name}.mixed"], rtol=1e-10, atol=1e-11)
    assert (pattern.triu(1) == 0).all()
    sums = pattern.sum(-1)
    if "sinks" in config:
        assert (sums < 1 + 1e-12).all()
        assert sums.min() < 0.9
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_patterns_of_many_texts_are_vmap():
    model = fa.decoder(fa.Config(**BASE))
    params = model.init(fa.key(0))
    rows = torch.stack([TOKENS, TOKENS.flip(0)])
    f = lambda row: attention_pattern(model, params, row, 1)
    torch.testing.assert_close(vmap(f)(rows), torch.stack([f(row) for row in rows]))
    torch.testing.assert_close(f(rows), vmap(f)(rows))


@pytest.mark.parametrize(
    ("layer", "message"), [(2, "one of 2 layers"), (-3, "one of 2 layers"), (True, "one of 2")]
)
def test_a_layer_that_does_not_exist_is_an_error(layer, message):
    model = fa.decoder(fa.Config(**BASE))
    with pytest.raises(ValueError, match=message):
        attention_pattern(model, model.init(fa.key(0)), TOKENS, layer)
    nameless = fa.Model(model.init, model.cache, model.hidden, model.logits)
    with pytest.raises(ValueError, match=r"should be from fa\.decoder"):
        attention_pattern(nameless, model.init(fa.key(0)), TOKENS, 0)
