"""Axes and memory of what kernels are given: attention of a view is attention of its copy, whatever
its strides.
"""

import pytest
import torch

import funcattn as fa
from funcattn.kernels.backends import layout
from funcattn.kernels.merging import KVSegment, attend_segments

EXACT = 1e-12  # float64: sums of 64 products, twice


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


def spoil_the_allocator():
    """What is freed here holds NaN, so that memory which nothing wrote is not right by chance."""
    for _ in range(2):
        [torch.full((2**n,), torch.nan) for n in range(4, 18) for _ in range(4)]


VIEWS = {  # (2, 2, T, 64), of memory that is laid out otherwise
    "sliding windows": lambda T: normal(1, 2, 2, T + 63).unfold(-1, 64, 1),
    "windows two apart": lambda T: normal(1, 2, 2, 2 * T + 62).unfold(-1, 64, 2),
    "one row repeated": lambda T: normal(1, 2, 2, 1, 64).expand(2, 2, T, 64),
    "one head repeated": lambda T: normal(1, 1, 1, T, 64).expand(2, 2, T, 64),
    "rows backwards in steps": lambda T: normal(1, 2, 2, T * 128).as_strided(
        (2, 2, T, 64), (T * 256, T * 128, 64, 2)
    ),
    "columns": lambda T: normal(1, 2, 2, 64, T).mT,
    "one number repeated": lambda T: normal(1, 2, 2, T, 1).expand(2, 2, T, 64),
    "a negative view": lambda T: torch._neg_view(normal(1, 2, 2, T, 64)),
    "an imaginary part": lambda T: (
        torch.complex(normal(1, 2, 2, T, 64), normal(2, 2, 2, T, 64)).conj().imag
    ),
    "windows over heads": lambda T: (
        normal(1, 2, T * 64 + 1).unfold(-1, T * 64, 1).unflatten(-1, (T, 64))
    ),
    "windows over examples": lambda T: (
        normal(1, 2 * T * 64 + 1).unfold(-1, 2 * T * 64, 1).unflatten(-1, (2, T, 64))
    ),
}


@pytest.mark.parametrize("kernel", [None, "flash", "reference", "sdpa", "sdpa:flash", "sdpa:math"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_attention_of_a_view_is_attention_of_its_copy(view, kernel):
    for T, S in ((2, 2), (1, 20), (20, 40)):
        plain = [
            normal(3, 2, 2, T, 64),
            normal(4, 2, 2, S, 64),
            normal(5, 2, 2, S, 64),
            normal(6, 2, 2, T, 64),
        ]
        for places in ((0,), (1, 2), (3,), (0, 1, 2, 3)):
            given = [view(x.shape[-2]) if n in places else x for n, x in enumerate(plain)]

            def gradients(q, k, v, g):
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                with torch.no_grad():
                    value = fa.attention(q, k, v, kernel=kernel)
                return value, *torch.autograd.grad(fa.attention(*leaves, kernel=kernel), leaves, g)

            wanted = gradients(
                *[x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in given]
            )
            spoil_the_allocator()
            for found, right in zip(gradients(*given), wanted, strict=True):
                torch.testing.assert_close(found, right, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_decode_step_over_views_is_that_over_their_copies(view):
    views = [view(20)[0], view(20)[1]]
    copies = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in views]
    step = lambda q, k, v: attend_segments(
        q[:, :1], [KVSegment(k, v), KVSegment(k[:, 1:3], v[:, :2])], scale=0.1
    )
    wanted = step(copies[0], *copies)
    spoil_the_allocator()
    torch.testing.assert_close(step(views[0], *views), wanted, atol=EXACT, rtol=EXACT)


def test_compiled_attention_of_windows_is_that_of_their_copy():
    q = VIEWS["sliding windows"](2)
    wanted = fa.attention(q.contiguous(), q, q, kernel="reference")
    for kernel in ("flash", "sdpa"):
        f = torch.compile(
            lambda q, kernel=kernel: fa.attention(q, q, q, kernel=kernel),
            backend="aot_eager",
            fullgraph=True,
        )
        spoil_the_allocator()
        with torch.no_grad():
            torch.testing.assert_close(f(q), wanted, atol=EXACT, rtol=EXACT)


def test_rows_that_lie_whole_and_apart_are_not_copied():
    x = normal(1, 2, 3, 4, 8)
    for same in (x, x.transpose(1, 2), x[..., ::2, :], x[:, :1].expand(2, 3, 4, 8)):
        assert layout.in_rows(same) is same
    # contiguous to torch, whose BLAS refuses its row stride
    odd = torch.zeros(8).as_strided((1, 1, 8), (1, 1, 1))
    assert odd.is_contiguous()
    assert layout.in_rows(odd).stride() == (8, 8, 1)
