"""What is prepared of a weight: equal to it, made once, forgotten with it, made anew when it is
written into.
"""

import gc

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.core.tensor_cache import _entries
from funcattn.layers import linear, prepare
from funcattn.quantization import expand, tiles
from funcattn.quantization.packed import PackedDynamic, PackedInt4, PackedInt8

pytestmark = pytest.mark.cpu("what is prepared is for kernels of the CPU")


def matrix(seed, *sizes):
    return fa.random.normal(fa.key(seed), sizes)


def test_a_matrix_is_stored_by_rows_for_one_vector_alone():
    weight = matrix(0, 6, 4).mT.contiguous().mT
    assert prepare(weight, 1).is_contiguous()
    assert torch.equal(prepare(weight, 1), weight)
    assert prepare(weight, 2) is weight
    for other in (matrix(0, 6, 4), matrix(0, 3), matrix(0, 2, 3, 4).mT, (), "anything"):
        assert prepare(other, 1) is other


@pytest.fixture(params=[False, True], ids=["torch's kernels", "tiles"])
def tiled(request, monkeypatch):
    """Whether the operator of funcattn.native is there."""
    if request.param and tiles.missing():
        pytest.skip(tiles.missing())
    if not request.param:
        monkeypatch.setattr(tiles, "missing", lambda: "as a test wants it")
    return request.param


SCHEMES = {
    "int8": (fa.int8, PackedInt8),
    "int4": (fa.int4, PackedInt4),
    "w8a8": (fa.w8a8(group=None), PackedDynamic),
}


@pytest.mark.parametrize(("scheme", "kind"), SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rows", [2, 5, 16])
def test_what_is_prepared_multiplies_alike(scheme, kind, rows, tiled):
    weight, x = scheme.encode(matrix(0, 32, 64)), matrix(1, rows, 64)
    packed = prepare(weight, rows)
    assert isinstance(packed, tiles.Tiles if tiled and kind is not PackedDynamic else kind)
    assert torch.equal(linear(packed, x), linear(weight, x))  # both by the same kernel
    exact = x @ expand(weight).mT
    # bfloat16, or half a step of 127
    assert (linear(packed, x) - exact).norm() < 0.01 * exact.norm()
    assert linear(packed, x.bfloat16().reshape(1, rows, 64)).shape == (1, rows, 32)


@pytest.mark.parametrize(
    ("scheme", "sizes"),
    [(fa.int4, (20, 64)), (fa.int4(group=16), (32, 64)), (fa.int8(group=32), (32, 64))],
    ids=str,
)
def test_sizes_that_the_kernel_does_not_take_stay(scheme, sizes, tiled):
    weight = scheme.encode(matrix(0, *sizes))
    served = (
        tiled
        and scheme is not fa.int4(group=16)
        and (getattr(scheme, "group", None) or 32) % 32 == 0
    )
    assert (prepare(weight, 4) is weight) is not served
    assert (prepare(weight, 40) is weight) is not (served and tiles.most_rows(4) >= 40)


def test_it_is_made_once_and_forgotten_with_its_weight(tiled):
    gc.collect()
    before = len(_entries)
    weight = fa.int4.encode(matrix(0, 32, 64))
    first = prepare(weight, 1)
    assert len(_entries) == before + 1
    assert prepare(weight, 4)[0] is first[0]
    # the same codes with other scales are another matrix
    other = weight._replace(scale=weight.scale * 2)
    assert not torch.equal(
        linear(prepare(other, 4), matrix(1, 4, 64)), linear(first, matrix(1, 4, 64))
    )
    weight.scale.mul_(3.0)
    assert any(not torch.equal(a, b) for a, b in zip(prepare(weight, 1), first, strict=True))
    del weight, other
    gc.collect()
    assert len(_entries) == before


def test_a_scale_in_bfloat16_is_not_kept_alive():
    gc.collect()
    before = len(_entries)
    weight = fa.tree.cast(torch.bfloat16)(fa.int8.encode(matrix(0, 32, 64)))
    prepare(weight, 4)
    assert len(_entries) == before + 1
    del weight
    gc.collect()
    assert len(_entries) == before


@pytest.mark.parametrize("rows", [1, 3])
def test_rounded_activations_keep_their_derivative(rows):
    """That of the identity, where torch's product of bytes has none and rounding would give
    zeros.
    """
    weight, x = fa.w8a8(group=None).encode(matrix(0, 32, 64)), matrix(1, rows, 64)
    packed, dense = PackedDynamic(*weight), expand(weight)
    torch.testing.assert_close(
        jvp(lambda x: linear(packed, x), (x,), (x,))[1], x @ dense.mT, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        vmap(grad(lambda row: linear(packed, row).sum()))(x),
        dense.sum(0).expand(rows, 64),
        rtol=1e-5,
        atol=1e-5,
    )
