"""Laws of ALiBi as columns of queries and keys."""

import pytest
import torch

import funcattn as fa
from funcattn.layers import key_columns, query_columns
from funcattn.layers.alibi import slopes

H, K, T, D = 6, 3, 9, 4


def bias(positions):
    """(H, T, T), by the definition."""
    away = (positions.unsqueeze(0) - positions.unsqueeze(1)).double()
    return torch.tensor(slopes(H)).double()[:, None, None] * away


@pytest.mark.parametrize("start", [0, 250, 65000])
def test_columns_are_the_bias(start):
    q, k, v = (
        fa.random.normal(key, (n, T, D), dtype=torch.float64)
        for key, n in zip(fa.split(fa.key(0), 3), (H, K, K), strict=True)
    )
    positions = start + torch.arange(T)
    scale, mask = 0.3, fa.masks.causal(T)
    slope = torch.tensor(slopes(H)).double()
    more = query_columns(positions, slope, scale, torch.float64)
    longer = key_columns(positions, torch.float64).expand(K, T, -1)
    got = fa.attention(torch.cat([q, more], -1), torch.cat([k, longer], -1), v, mask, scale=scale)
    want = fa.attention(q, k, v, mask, scale=scale, bias=bias(positions))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_digits_of_positions_are_exact_in_bfloat16():
    positions = torch.tensor([0, 255, 256, 4097, 65535])
    high, low, one = key_columns(positions, torch.bfloat16).squeeze(0).double().unbind(-1)
    assert torch.equal(256 * high + low, positions.double())
    assert bool((one == 1).all())


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 40])
def test_slopes_fall_by_one_factor_among_the_first_power_of_two(heads):
    """And those beyond it are between two of them, each once."""
    each = slopes(heads)
    known = 1 << heads.bit_length() - 1
    assert each[:known] == pytest.approx([2 ** (-8 * (h + 1) / known) for h in range(known)])
    assert len(set(each)) == heads
    assert all(0 < slope < 1 for slope in each)
