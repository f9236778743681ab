"""Codes of rows: a rotation that changes no score, and groups that lose half a step at most."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import funcattn as fa
from funcattn.caches import codes

SIZES = st.sampled_from([1, 3, 4, 12, 64, 80])


@given(SIZES, st.sampled_from([torch.float64, torch.float32]), st.integers(0, 9))
def test_a_rotation_is_its_own_inverse_and_keeps_dot_products(D, dtype, seed):
    q, k = fa.random.normal(fa.key(seed), (2, 5, D), dtype)
    turned = codes.rotate(q), codes.rotate(k)
    # n products and sums, whose terms are 1 / sqrt(n) each
    bound = 4 * D**0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(codes.rotate(turned[0]), q, rtol=0, atol=bound * float(q.norm()))
    size = float(q.norm() * k.norm())
    torch.testing.assert_close(turned[0] @ turned[1].mT, q @ k.mT, rtol=0, atol=bound * size)


def test_a_rotation_divides_a_large_feature_among_all():
    x = torch.zeros(80)
    x[17] = 4.0
    turned = codes.rotate(x)
    assert turned[16:32].abs().tolist() == [1.0] * 16  # 80 = 5 * 16
    assert not turned[:16].any()
    assert not turned[32:].any()


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([(8, 8), (8, 4), (9, 3), (5, 5), (1, 1)]),
    st.integers(-3, 3),
    st.integers(0, 9),
)
def test_a_decoded_number_is_within_half_a_step(bits, dtype, sizes, exponent, seed):
    N, group = sizes
    x = (fa.random.normal(fa.key(seed), (2, 5, N), torch.float64) * 10.0**exponent).to(dtype)
    x[0, 0] = x[0, 0, 0]  # a group without a spread
    coded = codes.encode(x, group, bits)
    assert coded.codes.dtype == torch.uint8
    assert coded.codes.shape == (2, 5, N if bits == 8 else N // group * -(-group // 2))
    assert coded.scale.shape == coded.low.shape == (2, N // group, 5)
    got = codes.decode(coded, N, group)
    # Half a step; the step itself is rounded, which is 2^bits eps / 2 steps at the far end; and
    # the sum is.
    epsilon, scale = torch.finfo(dtype).eps, coded.scale.mT.repeat_interleave(group, -1)
    bound = scale.double() * (0.5 + 2**bits * epsilon) + 4 * epsilon * x.abs().amax().double()
    assert ((got.double() - x.double()).abs() <= bound).all()
    again = codes.encode(got, group, bits)
    assert ((codes.decode(again, N, group) - got).abs() <= bound).all()


@given(st.sampled_from([4, 8]), st.integers(1, 70), SIZES, st.integers(0, 9))
def test_keys_and_values_come_back_within_the_norm_of_their_rounding(bits, R, D, seed):
    """A rotation keeps norms, and no code is off by more than half of the step of its group."""
    x = fa.random.normal(fa.key(seed), (2, R, D), torch.float64)
    turned = codes.rotate(x)
    for encode, decode, size, axis in (
        (codes.encode_keys, codes.decode_keys, R, -2),
        (codes.encode_values, codes.decode_values, D, -1),
    ):
        coded = encode(x, bits)
        group = size // coded.scale.shape[-2]
        off = (decode(coded, size) - x).norm()
        spread = turned.unflatten(axis, (-1, group)).movedim(axis, -1)
        steps = (spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)
        rounding = 8 * torch.finfo(x.dtype).eps * D**0.5 * x.norm()  # of both rotations
        assert off <= (steps.square().sum() * group).sqrt() / 2 + rounding
