"""Rows that are written where lengths are not concrete, out of place and in place."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.caches import rows

x, y = fa.random.normal(fa.key(0), (2, 3, 2, 6, 4))  # (B, K, S, D) of keys and of values
new = fa.random.normal(fa.key(1), (2, 3, 2, 6, 4))


@settings(max_examples=40)
@given(
    st.lists(st.integers(-7, 8), min_size=3, max_size=3),
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
    st.integers(1, 6),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_rows_are_overwritten_as_written(at, n, T, axis, twice):
    """Of each row of a batch, behind any mapped axis, under vmap of vmap too; NaN stays where it
    is.
    """
    at, n, some = torch.tensor(at), torch.tensor(n).clamp(max=T), new[:, :, :, :T]
    held = [each.clone() for each in (x, y)]
    for each in held:
        each[:, :, 3] = torch.nan
    wanted = [vmap(rows.written)(each, more, at, n) for each, more in zip(held, some, strict=True)]
    moved = [each.movedim(0, axis).contiguous() for each in held]
    write = lambda x, y, a, b, at, n: tuple(rows.overwritten(((x, a), (y, b)), at, n))
    if twice:
        moved = [each[None].expand(2, *each.shape).clone() for each in moved]
        inner = vmap(write, (axis, axis, 0, 0, 0, 0))
        got = vmap(inner, (0, 0, None, None, None, None))(*moved, *some, at, n)
        got, moved = [each[1] for each in got], [each[1] for each in moved]
    else:
        got = vmap(write, (axis, axis, 0, 0, 0, 0))(*moved, *some, at, n)
    for each, value, exact in zip(moved, got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(each.movedim(axis, 0), exact, rtol=0, atol=0, equal_nan=True)


def test_what_has_other_users_is_not_overwritten():
    """Outside of vmap, in other transforms, for memory in common, and for more rows than there are."""
    before, at = x.clone(), torch.tensor([0, 1, 2])
    refused = []

    def write(x, new, at):
        refused.append(rows.overwritten(((x, new),), at, 1) is None)
        return x.sum()

    write(x, new[0], 0)
    vmap(write, (None, 0, 0))(x[0], new[0], at)
    vmap(write, (0, 0, None))(x[:1].expand(3, 2, 6, 4), new[0], 0)
    vmap(write)(x, torch.cat([new[0], new[0]], -2), at)
    grad(lambda scale: vmap(write)(x, scale * new[0], at).sum())(torch.tensor(1.0))
    jvp(lambda some: vmap(write)(x, some, at), (new[0],), (new[1],))
    tracked = new[0].clone().requires_grad_()
    vmap(write)(x, tracked, at)
    assert refused == [True] * 7
    assert torch.equal(x, before)
    vmap(write)(x.clone(), new[0], at)
    assert not refused[-1]
