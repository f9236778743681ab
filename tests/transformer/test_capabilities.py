"""A fast path says what it computes, field by field: a field of Config that it does not name makes
it decline.
"""

import dataclasses

import pytest
import torch

import funcattn as fa
from funcattn import transformer
from funcattn.collectives import bindings
from funcattn.compilation import fused
from funcattn.compilation.stack import Stack
from funcattn.quantization import tiles
from funcattn.quantization.calibration import smoothquant
from funcattn.transformer import LayerSpec, capabilities, why_not

CONFIG = fa.Config(
    vocabulary=16, width=64, layers=2, heads=4, kv_heads=2, head_size=16, feed_forward=32
)
NAMES = {field.name for field in dataclasses.fields(fa.Config)}


@dataclasses.dataclass(frozen=True)
class Twisted(fa.Config):
    """A Config with a field that was made up."""

    twist: float = 0.0


TWISTED = Twisted(**vars(CONFIG))


@pytest.mark.parametrize(
    "table", [capabilities.FIELDS, fused.COMPUTES], ids=["layers as written", "the operator in C++"]
)
def test_a_table_names_every_field_and_no_other(table):
    assert set(table) == NAMES
    assert not why_not(CONFIG, table)
    assert why_not(TWISTED, table) == "it knows no twist, and this is 0.0"


@pytest.mark.parametrize(
    "table",
    [capabilities.OF_LAYERS, fused.OF_LAYERS],
    ids=["layers as written", "the operator in C++"],
)
def test_a_table_names_every_field_of_a_layer(table):
    assert set(table) == set(LayerSpec._fields)


@pytest.mark.parametrize(
    "table", [capabilities.FIELDS, fused.COMPUTES], ids=["layers as written", "the operator in C++"]
)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_field_that_is_taken_out_of_a_table_is_one_that_it_does_not_know(table, name):
    fewer = {field: values for field, values in table.items() if field != name}
    assert why_not(CONFIG, fewer).startswith(f"it knows no {name}, and this is")


def test_a_field_of_a_layer_that_is_not_known_is_named():
    fewer = {"window": (None,), "rotary": capabilities.ANY, "local": (False,)}
    assert why_not(CONFIG, of_layers=fewer) == "it knows no layers.0.experts, and this is False"
    near = dataclasses.replace(CONFIG, window=4, window_layers=(False, True))
    assert (
        why_not(near, of_layers=fused.OF_LAYERS)
        == "it knows layers.1.window = None only, and this is 4"
    )


def test_every_fast_path_declines_a_field_that_was_made_up():
    model = fa.decoder(TWISTED)
    params = fa.quantize(fa.int8)(model.init(fa.key(0)))
    past, fast = (
        model.apply(params, torch.arange(5), model.cache(9))[1],
        fa.compile(model, backend="eager"),
    )
    assert (
        fast.explain(params)
        == "2 layers: as the model itself runs them, nothing compiled: it knows no twist, and this "
        "is 0.0"
    )
    for T in (1, 2):
        assert torch.equal(
            fast.extend(params, torch.arange(T), past)[0],
            model.extend(params, torch.arange(T), past)[0],
        )
    assert not model.code
    assert not fast.stack.held  # nothing was prepared either
    assert "no twist" in fused.why_not(TWISTED, params)
    whole = fa.decoder(CONFIG).init(fa.key(0)).layers[0]
    assert [*smoothquant.sites(CONFIG, CONFIG.layer_spec(0), whole)]
    assert not [*smoothquant.sites(TWISTED, TWISTED.layer_spec(0), whole)]


@pytest.mark.skipif(bool(tiles.missing()), reason=tiles.missing())
@pytest.mark.cpu("the operator funcattn::layers is for the CPU")
def test_the_operator_reads_no_other_weight_of_a_layer():
    params = fa.quantize(fa.int8)(fa.decoder(CONFIG).init(fa.key(0)))
    forms = lambda layer: layer._replace(
        **{name: fa.layers.prepare(getattr(layer, name), 1) for name in fused.MATRICES}
    )
    first, second = map(forms, params.layers)
    assert not fused.why_not(CONFIG, params._replace(layers=(first, second)))
    for name in set(transformer.Layer._fields) - {*fused.WEIGHTS}:
        more = first, second._replace(**{name: torch.ones(4)})
        assert f"layers.1.{name}" in fused.why_not(CONFIG, params._replace(layers=more))


def test_a_device_that_computes_with_other_weights_than_it_holds_is_not_compiled():
    """Heads that all devices hold and each selects from, and the bias of experts that one device
    adds for all.
    """
    mixture = {"experts": 2, "experts_per_token": 1, "expert_size": 16}
    one_head = dataclasses.replace(CONFIG, kv_heads=1)
    with_bias = dataclasses.replace(CONFIG, **mixture, feed_forward_bias=True)
    for config, differs in (
        (CONFIG, False),
        (dataclasses.replace(CONFIG, **mixture), False),
        (one_head, True),
        (with_bias, True),
    ):
        model = fa.decoder(config)
        params, cache, token = model.init(fa.key(0)), model.cache(4), torch.tensor([1])
        stack = Stack(config, None, None, "eager", {})
        assert stack.forms(params, token, cache) is not None
        with bindings.binding(bindings.Axis("tensor", 2, group="of two")):
            assert (stack.forms(params, token, cache) is None) == differs
