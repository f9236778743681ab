"""Rows that are written where lengths are not concrete, out of place and in place."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
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


def test_parts_of_one_tensor_are_joined_without_a_copy():
    base = torch.arange(24.0).view(1, 3, 2, 4)
    parts = base[0].unbind(0)
    assert rows.joined(parts).data_ptr() == base.data_ptr()
    assert torch.equal(rows.joined(parts), torch.stack(parts))
    sliced, turned = torch.arange(48.0).view(4, 3, 4), torch.arange(24.0).view(3, 4, 2)
    for other in (
        (parts[1], parts[0], parts[2]),
        parts[:2],
        parts[1:],
        (parts[0], parts[1], parts[1]),
        (parts[0], parts[1], parts[2].clone()),
        (parts[0], parts[1], base[0, 2].reshape(2, 4).mT.reshape(2, 4)),
        tuple(part.view(torch.int32) for part in parts),
        sliced[:, 1].unsqueeze(1).unbind(0),
        turned.mT.unbind(0),
        (torch.ones(2, 4),),
    ):
        assert torch.equal(rows.joined(other), torch.stack(other))
        assert rows.joined(other).dtype == other[0].dtype


def test_parts_with_a_derivative_are_stacked():
    base = torch.randn(2, 3, requires_grad=True) * 1
    parts = base.unbind(0)
    (found,) = torch.autograd.grad(rows.joined(parts).sum(), parts[1])
    assert torch.equal(found, torch.ones(3))
    own = torch.zeros(2, 3).unbind(0)
    own[1].requires_grad_()  # and its base does not
    (found,) = torch.autograd.grad(rows.joined(own).sum(), own[1])
    assert torch.equal(found, torch.ones(3))
    given = torch.randn(2, 3)
    moved = jvp(lambda x: rows.joined(x.unbind(0)), (given,), (torch.ones(2, 3),))[1]
    assert torch.equal(moved, torch.ones(2, 3))
    with forward_ad.dual_level():
        first, second = given.unbind(0)
        pair = first, forward_ad.make_dual(second, torch.ones(3))
        assert torch.equal(forward_ad.unpack_dual(rows.joined(pair)).tangent[1], torch.ones(3))
