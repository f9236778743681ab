"""The arithmetic of quantization: packing loses nothing, rounding stays within half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcattn as fa
from funcattn.quantization import packing
from funcattn.testing import strategies

U16 = 2.0**-11  # what rounding to float16 changes, of the number
# rounding in float32 and of the scale, generously below a thousandth of a step
SLACK = 1 + 2.0**-10


@st.composite
def grouped(draw):
    """A matrix (N, groups * size) of any magnitude and offset, some groups all zero, and the size
    of a group.
    """
    size, count, N = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    key = draw(strategies.keys())
    w = fa.random.normal(key, (N, count, size)) * 10.0 ** draw(st.integers(-12, 4)) + draw(
        st.sampled_from([0.0, 0.0, 3.0])
    )
    silent = fa.random.randint(fa.fold_in(key, 1), (N, count, 1), 0, 4) == 0
    return torch.where(silent, 0, w).flatten(1), size


def error(codes, size, scale, zero, w):
    """|codes * scale + zero - w| by groups, in float64."""
    approximation = packing.groups(codes, size).double() * scale.double().unsqueeze(-1)
    return (
        (
            approximation
            + (0 if zero is None else zero.double().unsqueeze(-1))
            - packing.groups(w, size).double()
        )
        .abs()
        .amax(-1)
    )


@given(grouped(), st.sampled_from([1, 7, 127]))
def test_symmetric_codes_are_within_half_a_step(case, largest):
    w, size = case
    codes, scale = packing.symmetric(w, size, largest)
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert codes.abs().max() <= largest
    assert (error(codes, size, scale, None, w) <= scale.double() / 2 * SLACK).all()
    assert (codes[packing.spread(scale, w.shape[1]) == 0] == 0).all()


@given(grouped(), st.sampled_from([2, 4, 16]))
def test_affine_codes_are_within_half_a_step(case, levels):
    w, size = case
    codes, scale, zero = packing.affine(w, size, levels)
    assert codes.dtype == torch.uint8
    assert codes.max() < levels
    rounding = U16 * (zero.double().abs() + (levels - 1) * scale.double()) * SLACK
    assert (error(codes, size, scale, zero, w) <= scale.double() / 2 * SLACK + rounding).all()


@given(grouped())
def test_what_is_on_the_grid_stays(case):
    """Symmetric rounding of what it gave is the identity: the greatest code is the largest one."""
    w, size = case
    codes, scale = packing.symmetric(w, size, 127)
    again, same = packing.symmetric(
        codes.float() * packing.spread(scale.float(), w.shape[1]), size, 127
    )
    assert torch.equal(again, codes)
    assert torch.equal(same.float(), scale.float())


@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 4), (6, 4), (32, 4), (4, 2), (12, 2), (64, 2)]),
    st.integers(1, 3),
)
def test_unpack_undoes_pack(seed, form, count):
    size, bits = form
    codes = fa.random.randint(fa.key(seed), (3, count * size), 0, 2**bits).to(torch.uint8)
    packed = packing.pack(codes, size, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, count * size * bits // 8)
    assert torch.equal(packing.unpack(packed, count, bits), codes)


def test_the_first_half_of_a_group_is_in_the_low_nibbles():
    """As in the blocks of GGUF."""
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert packing.pack(codes, 4, 4).tolist() == [[1 + 16 * 3, 2 + 16 * 4]]


@given(strategies.keys())
def test_the_nearest_level_is_the_nearest(key):
    w, levels = fa.random.normal(key, (3, 8)), torch.tensor(packing.NF4)
    chosen = packing.nearest_level(w, levels)
    assert torch.equal((w - levels[chosen.long()]).abs(), (w.unsqueeze(-1) - levels).abs().amin(-1))


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [([0.0, 1.0], torch.float16), ([1e-6], torch.float32), ([1e5], torch.float32)],
    ids=str,
)
def test_scales_are_halves_where_those_hold_them(numbers, dtype):
    assert packing.narrow(torch.tensor(numbers)).dtype == dtype
