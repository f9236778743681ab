"""Models of transformers inside `closed`, with their own attention: masks under vmap."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import funcattn as fa
from funcattn.interop import closed

transformers = pytest.importorskip("transformers")

# transformers computes norms in float32, whatever the model: some ten roundings of numbers up to 5
ROUNDED = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.tensor([[1, 5, 2, 7, 3, 3], [4, 4, 2, 1, 8, 0], [9, 2, 6, 5, 5, 1]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]])


def build(attention, **options):
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        **options,
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return net.double()


def loss_of(net):
    def loss(params, ids, mask, positions=None):
        given = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        if positions is not None:
            given = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        return functional_call(net, params, (), given).logits.sin().sum()

    return loss


def rows(f, *x):
    out = [f(*row) for row in zip(*x, strict=True)]
    return {name: torch.stack([o[name] for o in out]) for name in out[0]}


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("packed", [False, True], ids=["padding", "packed documents"])
def test_gradients_of_each_row_are_those_of_a_loop(attention, packed):
    net, eager = build(attention).eval(), build("eager").eval()
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = (IDS, PADDING, POSITIONS) if packed else (IDS, PADDING)
    of = lambda net: lambda *x: grad(loss_of(net))(params, *x)
    with closed():
        found = vmap(of(net))(*x)
    torch.testing.assert_close(found, rows(of(eager), *x), **ROUNDED)


def test_checkpoints_of_a_model_nest():
    net, eager = build("sdpa").train(), build("eager").train()
    net.activation_checkpointing_enable()
    params = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {
        name: fa.random.normal(fa.key(n), p.shape) for n, (name, p) in enumerate(params.items())
    }
    tangents = {name: t.double() for name, t in tangents.items()}
    hvp = lambda net: lambda *x: jvp(grad(lambda p: loss_of(net)(p, *x)), (params,), (tangents,))[1]
    with closed():
        found = vmap(hvp(net))(IDS, PADDING)
    # norms in float32 again: second derivatives reach 400
    torch.testing.assert_close(found, rows(hvp(eager), IDS, PADDING), atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_reads_masks_as_before():
    net = build("sdpa").eval()
    torch._dynamo.reset()
    wanted = net(IDS, attention_mask=PADDING, use_cache=False).logits
    with closed():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        found = compiled(IDS, attention_mask=PADDING, use_cache=False).logits
    seen = PADDING.bool()
    torch.testing.assert_close(found[seen], wanted[seen], **ROUNDED)
