"""Draws of many numbers: in parts, with the bits of the whole."""

import pytest
import torch

import funcattn as fa
from funcattn import native
from funcattn.randomness import threefry

DRAWS = {
    "bits": fa.random.bits,
    "split": lambda key, shape: fa.split(key, shape),
    **{
        f"{f.__name__} {dtype}": lambda key, shape, f=f, dtype=dtype: f(key, shape, dtype)
        for f in (fa.random.uniform, fa.random.normal, fa.random.gumbel, fa.random.exponential)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    },
    "uniform within": lambda key, shape: fa.random.uniform(
        key, shape, minval=-2.0, maxval=torch.tensor(3.0)
    ),
    "bernoulli": lambda key, shape: fa.random.bernoulli(key, 0.3, shape),
    "randint": lambda key, shape: fa.random.randint(key, shape, 0, 7),
}


@pytest.mark.cpu("parts are made on the CPU alone")
@pytest.mark.parametrize("name", DRAWS)
def test_a_large_draw_is_that_of_its_parts(name, monkeypatch):
    """Of a whole number of parts, of some more, of several axes; and mapped and traced, where there
    are no parts.
    """
    draw, key = DRAWS[name], fa.key(11)
    for shape in ((3 * 64,), (3 * 64 + 21,), (3, 5, 41)):
        whole = draw(key, shape)
        with monkeypatch.context() as patch:
            patch.setattr(threefry, "PART", 64)
            parts = draw(key, shape)
            mapped = torch.vmap(lambda key: draw(key, shape))(torch.stack([key, key]))
        assert (parts.dtype, parts.shape) == (whole.dtype, whole.shape)
        assert torch.equal(parts, whole)
        assert torch.equal(mapped[1], whole)


@pytest.mark.cpu("the operator funcattn::words is for the CPU")
@pytest.mark.parametrize("name", DRAWS)
def test_the_operator_has_the_bits_of_the_cipher(name, monkeypatch):
    """Alone and mapped, once and twice, in one part and several, with both sets of instructions."""
    if reason := native.load():
        pytest.skip(reason)
    draw, keys = DRAWS[name], fa.split(fa.key(3), (2, 3))
    each = lambda shape: [draw(key, shape) for key in keys.flatten(0, 1)]
    for shape in ((), (0,), (7,), (3, 1700)):
        with monkeypatch.context() as patch:
            patch.setattr(native, "is_loaded", lambda: False)
            wanted = each(shape)
        for instructions in (1, 2):
            try:
                torch.ops.funcattn.instructions(instructions)
                mapped = torch.vmap(torch.vmap(lambda key, shape=shape: draw(key, shape)))(keys)
                assert torch.equal(mapped.flatten(0, 1), torch.stack(wanted))
                assert all(map(torch.equal, each(shape), wanted))
            finally:
                torch.ops.funcattn.instructions(-1)
    last = torch.tensor([2**32 - 1, 2**31])  # words that are negative as int32
    x, y = torch.ops.funcattn.words(last[None], 5, 40)
    assert list(
        map(
            torch.equal,
            threefry.encipher(last, torch.arange(5, 45, dtype=torch.int32)),
            (x[0], y[0]),
        )
    ) == [True, True]


@pytest.mark.cpu("parts are made on the CPU alone")
def test_a_large_draw_inside_of_a_derivative_and_a_trace_is_the_same(monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    draw = lambda key: fa.random.normal(key, (200,))
    whole = draw(fa.key(0))
    monkeypatch.setattr(threefry, "PART", 64)
    scaled = lambda x: x * draw(fa.key(0))
    one = torch.tensor(1.0)
    assert torch.equal(torch.func.jvp(scaled, (one,), (one,))[1], whole)
    assert torch.equal(torch.func.jacrev(scaled)(one), whole)
    assert torch.equal(make_fx(draw)(fa.key(0))(fa.key(0)), whole)
    assert draw(fa.key(0).to("meta")).shape == (200,)
    assert torch.equal(draw(fa.key(0)), whole)
