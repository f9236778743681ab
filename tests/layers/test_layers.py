"""Layers against their equations, written out in float64, and rotary angles against
transformers'.
"""

import math
from typing import NamedTuple

import pytest
import torch
import transformers
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn import layers
from funcattn.layers import RopeScaling


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, torch.float64)


def test_rms_norm_is_its_equation():
    x, weight = normal(0, 2, 3, 5), normal(1, 5)
    rows = [
        [row / math.sqrt(sum(a * a for a in row.tolist()) / 5 + 0.1) * weight for row in rows]
        for rows in x
    ]
    wanted = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(layers.rms_norm(x, weight, epsilon=0.1), wanted)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_is_its_equation(has_bias):
    x, weight = normal(0, 3, 5), normal(1, 5)
    bias = normal(2, 5) if has_bias else ()
    centred = x - x.mean(-1, keepdim=True)
    wanted = centred / ((centred**2).mean(-1, keepdim=True) + 0.1).sqrt() * weight
    wanted = wanted + bias if has_bias else wanted
    torch.testing.assert_close(layers.layer_norm(x, weight, bias, epsilon=0.1), wanted)


NAIVE = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_gates_are_their_equations(activation):
    gate, up = normal(0, 7), normal(1, 7)
    wanted = torch.tensor([NAIVE[activation](x) for x in gate.tolist()], dtype=torch.float64) * up
    torch.testing.assert_close(layers.gated(gate, up, activation), wanted)


def peer(kind, head_size, base, **scaling):
    """The angles per position that transformers would use."""
    config = transformers.LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        head_dim=head_size,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": base, **scaling},
    )
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("scaling", "kind", "theirs"),
    [
        (None, "default", {}),
        (RopeScaling("linear", factor=4.0), "linear", {"factor": 4.0}),
        (RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, context=64), "llama3", LLAMA3),
    ],
)
def test_frequencies_are_those_of_transformers(scaling, kind, theirs):
    torch.testing.assert_close(
        layers.frequencies(16, base=1e4, scaling=scaling), peer(kind, 16, 1e4, **theirs)
    )


def test_llama3_scaling_has_slow_blended_and_fast_planes():
    plain = layers.frequencies(16, base=1e4)
    scaled = layers.frequencies(
        16, base=1e4, scaling=RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, context=64)
    )
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1) & (ratio < 8)).any()


def turned(x, positions, base=1e4):
    """Turn plane (i, i + D / 2) by position * base^(-2 i / D), one number at a time."""
    out, D = x.clone(), x.shape[-1]
    for h, t, i in torch.cartesian_prod(
        *(torch.arange(n) for n in (x.shape[0], x.shape[1], D // 2))
    ).tolist():
        angle = positions[t] * base ** (-2 * i / D)
        a, b = x[h, t, i].item(), x[h, t, i + D // 2].item()
        out[h, t, i] = a * math.cos(angle) - b * math.sin(angle)
        out[h, t, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotation_turns_each_plane_by_its_angle():
    x, positions = normal(0, 2, 3, 8), [0, 5, 40]
    rotation = layers.rope(torch.tensor(positions), layers.frequencies(8, base=1e4), torch.float64)
    # angles are float32 and as large as 40 radians
    slack = 2 * 40 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(layers.rotate(x, rotation), turned(x, positions), rtol=0, atol=slack)


def test_rotation_is_that_of_transformers():
    x, positions = normal(0, 1, 2, 5, 8).float(), torch.arange(3, 8)
    angle = torch.cat([positions.unsqueeze(-1) * peer("default", 8, 1e4)] * 2, -1)
    half = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    wanted, _ = half(x, x, angle.cos().unsqueeze(0), angle.sin().unsqueeze(0))
    rotation = layers.rope(positions, layers.frequencies(8, base=1e4), torch.float32)
    torch.testing.assert_close(layers.rotate(x, rotation), wanted)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = normal(0, 1, 1, 8), normal(1, 1, 1, 8)
    turn = layers.frequencies(8, base=100.0).double()
    at = lambda x, place: layers.rotate(x, layers.rope(torch.tensor([place]), turn, torch.float64))
    torch.testing.assert_close((at(q, 7) * at(k, 3)).sum(), (at(q, 104) * at(k, 100)).sum())


def test_rotation_is_alike_in_every_head_and_mapped_by_vmap():
    x, positions = normal(0, 2, 4, 3, 8), torch.tensor([[0, 1, 2], [7, 8, 9]])
    turn = layers.frequencies(8, base=1e4)
    f = lambda x, positions: layers.rotate(x, layers.rope(positions, turn, torch.float64))
    whole = f(x, positions)
    assert torch.equal(vmap(f)(x, positions), whole)
    assert torch.equal(f(x[:, 1:2], positions), whole[:, 1:2])


class Doubled(NamedTuple):
    """A user's record: a weight stored at half its size."""

    half: torch.Tensor


@layers.linear.register
def _(weight: Doubled, x: torch.Tensor) -> torch.Tensor:
    return 2 * (x @ weight.half.mT)


@layers.embed.register
def _(weight: Doubled, ids: torch.Tensor) -> torch.Tensor:
    return 2 * weight.half[ids]


def test_linear_and_embed_take_a_tensor_or_the_record_of_a_user():
    W, x, ids = normal(0, 5, 3), normal(1, 2, 3), torch.tensor([4, 0])
    for weight in (W, Doubled(W / 2)):
        torch.testing.assert_close(layers.linear(weight, x), x @ W.mT)
        assert torch.equal(layers.embed(weight, ids), W[ids])


@pytest.mark.parametrize("scheme", [None, fa.int8, fa.int4(group=2), fa.nf4(group=2), fa.fp8])
def test_a_dense_matrix_is_that_of_the_product(scheme):
    """Of a tensor, a quantized record, an adaptation of one, and a record that only multiplies."""
    x = fa.random.normal(fa.key(1), (3, 8))
    plain = {"q": fa.random.normal(fa.key(0), (6, 8))}
    weight = plain["q"] if scheme is None else fa.quantize(scheme, "q")(plain)["q"]
    adapted = fa.lora(2, "q")(fa.key(2), {"q": weight})["q"]._replace(b=torch.ones(6, 2))
    for one in (weight, adapted, Doubled(plain["q"] / 2)):
        dense = layers.dense(one, 8, x)
        assert dense.dtype == x.dtype
        torch.testing.assert_close(x @ dense.mT, layers.linear(one, x), rtol=0, atol=1e-5)
    assert layers.dense(adapted, 8, x.double()).dtype == torch.float64
    ways = [
        grad(lambda scale, f=f: f(adapted._replace(scale=scale)).square().sum())(adapted.scale)
        for f in (lambda w: x @ layers.dense(w, 8, x).mT, lambda w: layers.linear(w, x))
    ]
    torch.testing.assert_close(*ways, rtol=1e-5, atol=0)


def test_several_weights_times_the_same_vectors_are_each_of_them(monkeypatch):
    several, x, calls = (
        [normal(0, 5, 3), Doubled(normal(1, 4, 3)), normal(2, 2, 3)],
        normal(3, 2, 3),
        [],
    )
    each = [layers.linear(weight, x) for weight in several]
    assert all(
        torch.equal(found, one) for found, one in zip(layers.linears(several, x), each, strict=True)
    )
    monkeypatch.setitem(
        layers.together,
        Doubled,
        lambda weights, x: calls.append(weights) or tuple(x for _ in weights),
    )
    assert layers.linears([several[1], several[1]], x)[1] is x
    assert len(calls) == 1
    # of two kinds
    assert all(
        torch.equal(found, one) for found, one in zip(layers.linears(several, x), each, strict=True)
    )
    assert len(calls) == 1


def test_a_decoder_runs_on_the_record_of_a_user():
    model = fa.decoder(fa.Config(layers=1))
    params = model.init(fa.key(0))
    first = params.layers[0]
    stored = params._replace(
        embedding=Doubled(params.embedding / 2), layers=(first._replace(q=Doubled(first.q / 2)),)
    )
    loss = lambda params: (
        model.logits(params, model.hidden(params, torch.tensor([1, 2, 3]))[0]).square().sum()
    )
    torch.testing.assert_close(loss(stored), loss(params))
    torch.testing.assert_close(
        grad(loss)(stored).layers[0].q.half, 2 * grad(loss)(params).layers[0].q
    )


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: layers.linear([1.0], torch.ones(1)),
            TypeError,
            r"linear: weight .* got a list\. Register it with @funcattn\.layers\.linear",
        ),
        (
            lambda: layers.embed("table", torch.ones(1)),
            TypeError,
            r"embed: weight .* got a str\. Register it with @funcattn\.layers\.embed",
        ),
        (
            lambda: layers.gated(torch.ones(1), torch.ones(1), "swish"),
            ValueError,
            "'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'quick_gelu', got 'swish'",
        ),
        (lambda: RopeScaling("ntk"), ValueError, "'llama3', 'longrope', 'proportional', got 'ntk'"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 4)])
def test_a_matrix_by_blocks_is_the_matrix(lead):
    weight, x = (
        fa.random.normal(key, shape, dtype=torch.float64)
        for key, shape in zip(fa.split(fa.key(0)), ((48, 7), (*lead, 7)), strict=True)
    )
    torch.testing.assert_close(fa.layers.linear(fa.layers.by_blocks(weight), x), x @ weight.mT)


@pytest.mark.parametrize("x", [-3.0, -1e-3, 0.0, 0.7, 4.0])
def test_xielu_is_its_equation_and_smooth_at_zero(x):
    weights = torch.tensor([0.2, -0.4], dtype=torch.float64)
    a, b = (math.log1p(math.exp(w)) for w in weights.tolist())
    wanted = a * x * x + x / 2 if x > 0 else (math.expm1(x) - x) * (b + 0.5) + x / 2
    at = torch.tensor(x, dtype=torch.float64)
    # the exponent is clamped at -1e-6
    torch.testing.assert_close(layers.xielu(at, weights).item(), wanted, atol=2e-6, rtol=0)
    slope = 2 * a * x + 0.5 if x > 0 else (math.exp(x) - 1) * (b + 0.5) + 0.5
    got = grad(layers.xielu)(at, weights).item()
    # in that interval its derivative lacks the exponential, which is b there
    assert got == pytest.approx(slope, abs=2e-6) or -1e-6 <= x <= 0


def test_a_jvp_of_a_product_is_two_products():
    """torch takes a third, with a tangent of zeros for the weight."""
    x, weight = normal(0, 3, 5), normal(1, 4, 5)
    with FlopCounterMode(display=False) as counter:
        jvp(lambda x: layers.linear(weight, x), (x,), (x,))
    assert counter.get_total_flops() == 2 * 2 * x.numel() * len(weight)
