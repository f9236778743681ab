"""One table says how each weight is cut: specs and what a device computes with are both made of
it.
"""

import math

import pytest
import torch
from family_models import of_family

import funcattn as fa
from funcattn import tree
from funcattn.checkpoints.families.catalogue import FAMILIES
from funcattn.checkpoints.families.config_json import read_config
from funcattn.sharding import Grid, P, fsdp, shard_map, specs, tensor_parallel
from funcattn.transformer import Layer, Params, of_layer, parallel, partition, shapes
from funcattn.transformer.partition import CUTS, Cut, division

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    name: read_config({"model_type": name, **of_family(name), "vocab_size": 64})
    for name in FAMILIES
}
CONFIGS["a bias of the head"] = fa.Config(vocabulary=64, head_bias=True, tied=False)
# Those after them have no other weights than these together.
FAST = {*list(FAMILIES)[:18], "qwen2_moe", "glm4_moe", "youtu", "afmoe", "apertus"}
FAST |= {"lfm2", "qwen3_next", "gemma4_text"}
CONFIGS["cohere, norms of heads"] = read_config(
    {"model_type": "cohere", "use_qk_norm": True, "attention_bias": True, **SMALL}
)


EACH = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in FAMILIES and name not in FAST))
    for name in CONFIGS
]


def numbered(config):
    """Weights of which every number is another."""
    params, begun = fa.decoder(config).init(fa.key(0)), [0]

    def number(x):
        begun[0] += x.numel()
        return torch.arange(begun[0] - x.numel(), begun[0], dtype=torch.float64).view(x.shape)

    return tree.map(number, params)


def computed_with(config, mesh, rules):
    """The layers that each device along "tensor" computes with."""
    whole = numbered(config)
    f = lambda params: tree.map(
        lambda x: x.unsqueeze(0),
        tuple(parallel.layer(config, i, layer) for i, layer in enumerate(params.layers)),
    )
    stacked = shard_map(f, mesh, (specs(whole, mesh, rules),), P("tensor"))(whole)
    return whole, [tree.map(lambda x, i=i: x[i], stacked) for i in range(dict(mesh.axes)["tensor"])]


@pytest.mark.parametrize("name", EACH)
def test_a_device_takes_the_parts_that_the_specs_give_it(name):
    """Of every weight, over "tensor", and gathered over "data"; a spec that cuts otherwise is an
    error of the decoder.
    """
    config = CONFIGS[name]
    for n in (2, 4):
        for mesh, rules in ((Grid(tensor=n), tensor_parallel), (Grid(data=2, tensor=n), fsdp)):
            whole, devices = computed_with(config, mesh, rules(config, size=n))
            for device, layers in enumerate(devices):
                for i, layer in enumerate(layers):
                    one = of_layer(config, config.layer_spec(i))
                    for field, got, x in zip(Layer._fields, layer, whole.layers[i], strict=True):
                        if not isinstance(x, torch.Tensor):
                            continue
                        cut = division(one, field, x.dim(), n, experts=config.layer_spec(i).experts)
                        wanted = x if cut.tensor is None else x.tensor_split(n, cut.tensor)[device]
                        if cut.replicated:
                            wanted = x.unflatten(0, (one.kv_heads, -1))[device * one.kv_heads // n]
                        if cut.once and device:
                            wanted = torch.zeros_like(x)
                        assert torch.equal(got, wanted.reshape(got.shape)), (field, n)


@pytest.mark.parametrize("name", EACH)
def test_what_is_outside_of_the_layers_lies_as_the_specs_say(name):
    config = CONFIGS[name]
    whole, mesh = numbered(config), Grid(data=2, tensor=2)
    cuts = specs(whole, mesh, fsdp(config, size=2))
    ids, eye = torch.arange(config.vocabulary), torch.eye(config.width, dtype=torch.float64)
    table = whole.embedding if config.tied else whole.head

    def f(params):
        found = parallel.embed(config, params.embedding, ids)
        head = params.embedding if config.tied else params.head
        positions = parallel.vector("positions", params.positions, (config.context, config.width))
        return found, parallel.head(config, head, eye), positions

    found, head, positions = shard_map(f, mesh, (cuts,), (P(), P(None, "tensor"), P()))(whole)
    assert torch.equal(found, whole.embedding)
    assert torch.equal(head, table.T)
    assert tree.allclose(positions, whole.positions, rtol=0, atol=0)


def test_the_table_names_every_weight():
    assert set(CUTS) == {*Layer._fields, *Params._fields} - {"layers"}
    assert set(partition.OF_EXPERTS) <= set(CUTS)
    with pytest.raises(
        ValueError, match="decoder: filter should be a weight of the table in funcattn"
    ):
        division(CONFIGS["llama"], "filter", 2, 2)


@pytest.mark.parametrize(
    ("field", "cut", "spec", "part"),
    [
        ("gate", Cut(-1, -2), P(None, "tensor"), (48, 16)),
        ("attention_norm", Cut(-1), P("tensor"), (16,)),
        ("o", Cut(), P(None, None), (32, 32)),
    ],
)
def test_another_entry_changes_the_spec_and_what_a_device_takes(
    field, cut, spec, part, monkeypatch
):
    config, mesh = CONFIGS["llama"], Grid(tensor=2)
    before = specs(numbered(config), mesh, tensor_parallel(config, size=2))
    monkeypatch.setitem(CUTS, field, cut)
    rules = tensor_parallel(config, size=2)
    assert getattr(specs(numbered(config), mesh, rules).layers[1], field) == spec
    _, devices = computed_with(config, mesh, rules)
    assert tuple(getattr(devices[1][1], field).shape) == part
    f = lambda params: parallel.layer(config, 1, params.layers[1]).attention_norm
    with pytest.raises(ValueError, match=rf"decoder: layers\.1\.{field} should be a part"):
        shard_map(f, mesh, (before,), P("tensor"))(numbered(config))


def test_every_part_that_is_cut_is_a_share_of_the_whole():
    """On as many devices as there are heads, a layer of the parts has the numbers of a layer, and
    none twice.
    """
    config = CONFIGS["gpt2"]
    for name, shape in zip(Layer._fields, shapes(config).layers[0], strict=True):
        cut = division(config, name, len(shape), 4) if shape else None
        if cut is not None and cut.tensor is not None:
            assert 4 * math.prod(cut.over_tensor(shape, 4)) == math.prod(shape)
            assert shape[cut.tensor] % (4 * cut.block) == 0
