"""Real processes: Gloo on loopback, against one device and against the simulator."""

import devices
import processes
import pytest
import torch

import funcattn as fa
from funcattn import sharding

TIGHT = 1e-11  # float64, sums of a few hundred terms


def test_collectives_over_processes_are_those_over_a_vmap():
    for found in processes.run(devices.verbs, 2):
        assert {name: e for name, e in found.items() if not e < 1e-12} == {}


@pytest.mark.parametrize(
    ("axes", "sharded"),
    [({"tensor": 2}, False), ({"data": 2, "tensor": 2}, False), ({"data": 2}, True)],
    ids=["tp", "dp x tp", "fsdp"],
)
def test_processes_compute_what_one_device_does(axes, sharded):
    n = 1
    for size in axes.values():
        n *= size
    for found, placed in processes.run(devices.transforms, n, axes, sharded):
        assert {
            name: e for name, e in found.items() if not e < (1e-8 if name == "step" else TIGHT)
        } == {}
        assert placed


@pytest.mark.parametrize(
    ("n", "heads"), [(2, 1), (4, 1)], ids=["tp 2", "tp 4, more than key heads"]
)
def test_processes_write_what_one_device_does(n, heads):
    for found in processes.run(devices.decoding, n):
        assert found.pop("heads") == heads
        # float32 (a matrix is expanded to it), sums of 24 terms of size 1, through two layers
        assert found.pop("quantized") < 1e-5
        assert {
            name: e
            for name, e in found.items()
            if e is not True and not (e is not False and e < 1e-6)
        } == {}


def test_a_layer_says_two_things_forward_and_two_backward():
    for forward, both, kinds in processes.run(devices.counted, 2):
        assert (forward, both) == (2, 4)
        assert set(kinds) == {"all_reduce"}


CONFIG = fa.Config(
    vocabulary=48, width=16, layers=2, heads=4, kv_heads=2, head_size=4, feed_forward=24
)


@pytest.mark.parametrize(
    ("axes", "sharded"),
    [({"tensor": 2}, False), ({"data": 2}, False), ({"data": 2}, True), ({"context": 2}, False)],
)
def test_the_cost_of_a_layer_is_what_is_counted(axes, sharded):
    """Calls, and bytes, of one more layer in a gradient."""
    told = sharding.cost(
        CONFIG, axes, tokens=8, rows=4, training=True, sharded=sharded, nbytes=8
    ).collectives
    for found in processes.run(devices.said, 2, axes, sharded):
        for kind, (calls, nbytes) in found.items():
            ours = [one for one in told if one.kind == kind]
            assert sum(one.calls for one in ours) == 2 * calls, (kind, told)
            assert sum(one.calls * one.nbytes for one in ours) == pytest.approx(2 * nbytes), (
                kind,
                told,
            )


def test_compiled_code_speaks_as_eager_code_does():
    for difference, same, calls, refused in processes.run(devices.compiled, 2, timeout=170):
        assert difference < 1e-8
        assert same
        assert calls == 6 * 3  # two of the layer and one of the embedding, each step
        assert "no compiled forward mode" in refused


def test_what_one_mesh_saved_another_loads(tmp_path):
    assert all(processes.run(devices.saved, 4, str(tmp_path)))
    assert processes.run(devices.restored, 2, str(tmp_path)) == [(True, True, True)] * 2


def test_a_process_reads_its_own_part_of_a_file(tmp_path):
    config = fa.Config(
        vocabulary=48,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=4,
        feed_forward=24,
        tied=False,
    )
    fa.save(tmp_path, config, fa.decoder(config).init(fa.key(0)))
    for same, read, mine, whole in processes.run(devices.sliced, 2, str(tmp_path)):
        assert same
        assert read == mine < 0.6 * whole


def test_what_cannot_be_is_refused():
    wanted = {
        "grad outside": "TypeError: shard_map: the call should be outside of grad, vjp, jvp and "
        "vmap, got one inside. "
        "shard_map is the outermost: write shard_map(grad(f), ...), not grad(shard_map(f, ...))",
        "vmap outside": "TypeError: shard_map: the call should be outside",
        "grad of a model": "TypeError: shard_map: the call should be outside",
        "gather inside": "TypeError: gather: the call should be outside",
        "shard inside": "TypeError: shard: the call should be outside",
        "sharded otherwise": "TypeError: shard: tree should be of whole tensors",
        "specs of another cut": "ValueError: shard_map: a DTensor should be cut as in_specs says",
        "autograd follows": "TypeError: shard_map: a DTensor should be one that autograd does not "
        "follow",
        "heads that are cut": "ValueError: decoder: config should be such that the 2 devices",
        "quantize in parts": "TypeError: quantize: embedding should be of tensors of this process",
        "results that differ": "ValueError: shard_map: a result that out_specs does not cut should "
        "be the same on every device",
        "dequantize in parts": "TypeError: dequantize: params should be of tensors of this "
        "process, got a DTensor",
        "save in parts": "TypeError: save: params should be of tensors of this process, got a "
        "DTensor",
        "no names": "TypeError: sharding: mesh should be a DeviceMesh with mesh_dim_names",
        "a whole tree on a mesh": "ValueError: decoder: layers.0.q should be a part (8, 16)",
    }
    for told in processes.run(devices.refusals, 2):
        assert {
            name: text for name, text in told.items() if not text.startswith(wanted[name])
        } == {}


def test_a_dead_process_ends_the_others_with_an_error():
    with pytest.raises(AssertionError, match="rank 1 ended without a word"):
        processes.run(devices.dies, 2, timeout=20)


def test_the_real_model_on_three_processes_writes_what_one_writes(smollm2, tmp_path):
    config, params, tokenizer = smollm2
    prompt = torch.tensor(tokenizer.encode("The capital of France is"))
    with torch.no_grad():
        expected = fa.generate(fa.key(0), fa.decoder(config), params, prompt, steps=64)[0].tolist()
    fa.save(tmp_path, config, params)
    for tokens, counts, nbytes in processes.run(devices.greedy, 3, str(tmp_path), prompt, 64):
        assert tokens == expected
        # two a layer, and one for the embedding
        assert counts["all_reduce"]["calls"] == 64 * (2 * config.layers + 1)
        # the likeliest token of each: its logit and its id
        assert counts["all_gather"]["calls"] == 64 * 2
        assert nbytes < 0.35 * fa.tree.nbytes(params)
