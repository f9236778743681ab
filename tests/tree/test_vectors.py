"""A tree of floating leaves is a vector: its operations are those of the one flat tensor."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vmap

from funcattn import randomness as rng
from funcattn import tree
from funcattn.records import record
from funcattn.tree import vectors


@record
class Pair(NamedTuple):
    w: Any
    b: Any


shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def vector(shapes, seed, dtype=torch.float64):
    drawn = [rng.normal(rng.key(seed + n), shape, dtype) for n, shape in enumerate(shapes)]
    return {"a": drawn[0], "b": (Pair(drawn[1], ()), [drawn[2]])}


three = st.tuples(shapes, shapes, shapes)


@given(three, st.integers(0, 99))
def test_unravel_undoes_ravel(shapes, seed):
    mixed = vector(shapes, seed)
    mixed["a"] = mixed["a"].float()  # every float32 is a float64
    flat, unravel = tree.ravel(mixed)
    assert flat.dtype == torch.float64
    assert flat.shape == (tree.count(mixed),)
    assert tree.allclose(unravel(flat), mixed, 0, 0)


@given(three, st.integers(0, 99))
def test_operations_are_those_of_the_raveled_vectors(shapes, seed):
    x, y = vector(shapes, seed), vector(shapes, seed + 7)
    (a, unravel), b = tree.ravel(x), tree.ravel(y)[0]
    close = lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    close(tree.dot(x, y), a @ b)
    close(tree.norm(x), a.norm())
    assert tree.allclose(tree.axpy(0.3, x, y), unravel(0.3 * a + b), 1e-14, 1e-14)
    assert tree.allclose(tree.scale(torch.tensor(-2.0), x), unravel(-2 * a), 0, 0)


def test_an_empty_tree_is_the_vector_of_no_elements():
    assert tree.dot((), ()) == tree.norm({}) == 0
    flat, unravel = tree.ravel(())
    assert flat.shape == (0,)
    assert unravel(flat) == tree.scale(2.0, ()) == tree.axpy(1.0, (), ()) == ()
    assert tree.norm(torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_a_norm_neither_overflows_nor_underflows(size):
    x = {"a": torch.tensor([3.0, 0.0]) * size, "b": torch.tensor(4.0) * size}
    torch.testing.assert_close(tree.norm(x), torch.tensor(5.0) * size, rtol=1e-6, atol=0)


def test_a_norm_of_what_is_not_finite_is_not_finite():
    assert tree.norm(torch.tensor([1.0, float("nan")])).isnan()
    assert tree.norm(torch.tensor([1.0, float("inf")])).isinf()


def test_a_norm_has_the_derivatives_of_the_root_and_none_at_zero():
    x = vector([(2,), (), (1, 2)], 0)
    flat, unravel = tree.ravel(x)
    found = hessian(lambda flat: tree.norm(unravel(flat)))(flat)
    torch.testing.assert_close(found, hessian(torch.linalg.vector_norm)(flat))
    assert grad(tree.norm)({"a": torch.zeros(3)})["a"].tolist() == [0, 0, 0]


def test_sums_of_half_precision_are_in_single():
    ones = {"a": torch.ones(5000, dtype=torch.bfloat16)}  # 256 + 1 is 256 in bfloat16
    assert tree.dot(ones, ones) == 5000
    assert tree.dot(ones, ones).dtype == tree.norm(ones).dtype == torch.float32
    third = tree.axpy(torch.tensor(1 / 3), ones, ones)["a"]
    assert third.dtype == torch.bfloat16
    assert third[0] == torch.tensor(4 / 3).bfloat16()


def test_long_sums_are_pairwise():
    # Where float32 sums one by one, 2^24 + 1 is 2^24.
    ones = torch.ones(2**25)
    assert tree.dot(ones, ones) == 2**25
    assert tree.norm(ones) ** 2 == pytest.approx(2**25, rel=1e-6)


def test_a_vector_less_its_projection_is_orthogonal_to_the_basis():
    rows = torch.linalg.qr(rng.normal(rng.key(0), (6, 4), torch.float64))[0].mT
    basis = [{"a": row[:2], "b": (row[2:],)} for row in rows[:3]]
    x = {"a": torch.ones(2).double(), "b": (torch.arange(4.0).double(),)}
    found, flat = tree.ravel(vectors.less_projection(x, basis))[0], tree.ravel(x)[0]
    torch.testing.assert_close(found, flat - rows[:3].mT @ (rows[:3] @ flat))
    assert float((rows[:3] @ found).abs().max()) < 1e-15
    assert x["a"].tolist() == [1, 1]
    # Nearly all of it in the basis: what one pass leaves of it is as large as the result.
    near = tree.axpy(1e-12, x, basis[0])
    left = tree.ravel(vectors.less_projection(near, basis))[0]
    assert float((rows[:3] @ (left / left.norm())).abs().max()) < 1e-13
    assert vectors.less_projection(x, []) is x
    mapped = vmap(lambda x: vectors.less_projection(x, basis))(tree.stack([x, x]))
    assert tree.allclose(tree.unstack(mapped)[1], tree.ravel(x)[1](found))


def test_long_leaves_are_summed_in_chunks(monkeypatch):
    x = {"a": torch.arange(30.0).view(5, 6).mT, "b": torch.arange(3.0)}
    y = tree.map(torch.cos, x)
    whole = tree.dot(x, y), tree.norm(x), grad(tree.dot)(x, y)
    monkeypatch.setattr(vectors, "CHUNK", 4)
    assert tree.allclose((tree.dot(x, y), tree.norm(x), grad(tree.dot)(x, y)), whole)


def test_operations_go_under_transforms_and_compile():
    x, y = vector([(3,), (2, 2), (3, 1)], 0), vector([(3,), (2, 2), (3, 1)], 1)
    assert tree.allclose(grad(tree.dot)(x, y), y)
    assert tree.allclose(
        jvp(lambda a: tree.axpy(a, x, y), (torch.tensor(1.0),), (torch.tensor(2.0),))[1],
        tree.scale(2.0, x),
    )
    rows = tree.stack([x, y])
    torch.testing.assert_close(vmap(tree.norm)(rows), torch.stack([tree.norm(x), tree.norm(y)]))
    assert tree.allclose(
        vmap(lambda a: tree.ravel(a)[1](2 * tree.ravel(a)[0]))(rows), tree.scale(2.0, rows)
    )

    def f(x, y):
        return tree.axpy(tree.dot(x, y) / tree.norm(x), x, tree.scale(0.5, y))

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert tree.allclose(compiled(x, y), f(x, y))
    again = torch.compile(lambda x: tree.ravel(x)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(again(x), tree.ravel(x)[0])


one = torch.ones(2)
BAD = [
    (
        lambda: tree.dot({"n": torch.arange(2)}, {"n": one}),
        TypeError,
        "dot: a should be a tree of floating tensors, got torch.int64 at 'n'. Split off",
    ),
    (
        lambda: tree.norm({"a": one, "b": (None,)}),
        TypeError,
        "norm: a should be a tree of floating tensors, got None at 'b.0'",
    ),
    (
        lambda: tree.scale(2.0, {"a": 3.0}),
        TypeError,
        "scale: x should be a tree of floating tensors, got 3.0 at 'a'",
    ),
    (lambda: tree.ravel(one.to(torch.float8_e4m3fn)), TypeError, "got torch.float8_e4m3fn"),
    (lambda: tree.ravel(one.cfloat()), TypeError, "got torch.complex64"),
    (
        lambda: tree.dot({"a": one}, {"a": torch.ones(1)}),
        ValueError,
        "dot: b should be (2,) at 'a' as in a, got (1,)",
    ),
    (
        lambda: tree.axpy(1.0, {"a": one}, {"b": one}),
        ValueError,
        "axpy: y should be of the structure of x",
    ),
    (lambda: tree.axpy(one, one, one), ValueError, "axpy: alpha should be a scalar, got (2,)"),
    (
        lambda: tree.ravel({"a": one})[1](torch.ones(3)),
        ValueError,
        "unravel: vector should be (2,), got (3,)",
    ),
    (
        lambda: tree.scale(one.tolist(), one),
        TypeError,
        "scale: alpha should be a number or a tensor",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
