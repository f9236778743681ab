"""Random trees: documented bits, the dtypes and devices of what they are like."""

import pytest
import torch
from torch.func import vmap

from funcattn import randomness as rng
from funcattn import tree

LIKE = {"b": torch.zeros(3), "a": (torch.zeros(2, 2, dtype=torch.float64), (), torch.zeros(()))}
DRAWS = {"normal": rng.normal_like, "rademacher": rng.rademacher_like}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def test_each_leaf_is_a_draw_of_its_own_key():
    key = rng.key(5)
    normal = tree.leaves(rng.normal_like(key, LIKE))
    signs = tree.leaves(rng.rademacher_like(key, LIKE))
    for n, (leaf, x, sign) in enumerate(zip(tree.leaves(LIKE), normal, signs, strict=True)):
        assert torch.equal(x, rng.normal(rng.fold_in(key, n), leaf.shape, leaf.dtype))
        bits = rng.bernoulli(rng.fold_in(key, n), 0.5, leaf.shape)
        assert torch.equal(sign, (2.0 * bits - 1).to(leaf.dtype))


@draws
def test_a_draw_has_the_shapes_dtypes_and_structure_of_what_it_is_like(draw):
    found = draw(rng.key(0), LIKE)
    assert tree.allclose(tree.scale(0.0, found), LIKE)
    assert draw(rng.key(0), ()) == ()


@draws
def test_a_draw_is_the_same_under_vmap(draw):
    keys = rng.split(rng.key(1), 3)
    rows = vmap(lambda key: draw(key, LIKE))(keys)
    alone = tree.stack([draw(key, LIKE) for key in keys])
    assert tree.allclose(rows, alone, 0, 0)


def test_signs_are_signs_with_mean_zero():
    signs = rng.rademacher_like(rng.key(2), torch.zeros(10000))
    assert set(signs.tolist()) == {-1, 1}
    assert abs(float(signs.mean())) < 0.05  # five standard deviations


@draws
def test_a_mistake_is_one_clear_error(draw):
    with pytest.raises(TypeError, match=r"_like: tree should be a tree of floating tensors, got "):
        draw(rng.key(0), {"n": torch.arange(2)})
    with pytest.raises(TypeError, match=r"_like: key should be one key, int64 \(2,\), got 0"):
        draw(0, LIKE)
