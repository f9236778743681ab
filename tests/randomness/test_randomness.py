"""Draws are jax.random's, are pure functions of their key, and have the laws they claim.

tests/data/jax_random.json holds what JAX 0.10.2 gives (its threefry2x32, partitionable); floats are
exact hexadecimals.
"""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import TESTS
from torch.func import grad, vmap

from funcattn import randomness as rng

GOLDEN = json.loads((TESTS / "data" / "jax_random.json").read_text())
FURTHER = GOLDEN["further"]
# erfinv and log differ from XLA's by single roundings; the values stay below 8, where a float32
# rounding is 2.4e-7
LAST_BITS = {torch.float32: 2e-6, torch.float64: 4e-15}

cases = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["seed"]))
further = pytest.mark.parametrize("case", FURTHER["cases"], ids=lambda case: str(case["seed"]))
seeds = st.integers(0, 2**63 - 1)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)

DRAWS = {
    "split": lambda key: rng.split(key, (2, 3)),
    "fold_in": lambda key: rng.fold_in(key, 5),
    "bits": lambda key: rng.bits(key, (5,)),
    "uniform": lambda key: rng.uniform(key, (5,)),
    "uniform float64": lambda key: rng.uniform(key, (5,), torch.float64, -1.0, torch.tensor(2.0)),
    "normal": lambda key: rng.normal(key, (5,)),
    "gumbel": lambda key: rng.gumbel(key, (5,), torch.float16),
    "exponential": lambda key: rng.exponential(key, (5,)),
    "bernoulli": lambda key: rng.bernoulli(key, 0.3, (5,)),
    "categorical": lambda key: rng.categorical(
        key, torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
    ),
    "randint": lambda key: rng.randint(key, (5,), torch.tensor(-3), 10),
    "permutation": lambda key: rng.permutation(key, torch.arange(6.0).reshape(3, 2)),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def exact(numbers, dtype=torch.float32):
    return torch.tensor([float.fromhex(number) for number in numbers], dtype=torch.float64).to(
        dtype
    )


def chi_square(observed, expected):
    """Pearson's statistic, and the value that its law exceeds once in a million (Wilson and
    Hilferty's approximation).
    """
    observed, expected = (
        torch.as_tensor(observed, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
    )
    freedom = len(expected) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((observed - expected).square() / expected).sum().item(), bound


# Reference: JAX


@cases
def test_keys_are_those_of_jax(case):
    key = rng.key(case["seed"])
    assert key.tolist() == case["key"]
    assert key.dtype == torch.int64
    assert rng.split(key).tolist() == case["split2"]
    assert rng.split(key, 5).tolist() == case["split5"]
    assert rng.split(key, (2, 3)).tolist() == case["split_2x3"]
    for data, folded in case["fold_in"].items():
        assert rng.fold_in(key, int(data)).tolist() == folded
        assert rng.fold_in(key, torch.tensor(int(data))).tolist() == folded


@cases
def test_exact_draws_are_those_of_jax(case):
    key = rng.key(case["seed"])
    assert rng.bits(key, (7,)).tolist() == case["bits_7"]
    assert rng.bits(key, (3, 5)).tolist() == case["bits_3x5"]
    assert torch.equal(rng.uniform(key, (6,)), exact(case["uniform_6"]))
    assert torch.equal(
        rng.uniform(key, (6,), torch.float32, -1.0, 3.0), exact(case["uniform_m1_3"])
    )
    assert rng.bernoulli(key, 0.3, (12,)).tolist() == case["bernoulli_0.3_12"]
    assert rng.randint(key, (8,), 0, 10).tolist() == case["randint_0_10_8"]
    assert rng.permutation(key, 9).tolist() == case["permutation_9"]
    logits = torch.arange(1, 9).float().log()
    each = vmap(lambda key: rng.categorical(key, logits))(rng.split(key, 16))
    assert each.tolist() == case["categorical_log1to8"]


@cases
@pytest.mark.parametrize("name", ["normal", "gumbel", "exponential"])
def test_draws_through_logarithms_are_those_of_jax_to_the_last_bits(case, name):
    got = getattr(rng, name)(rng.key(case["seed"]), (6,))
    torch.testing.assert_close(got, exact(case[f"{name}_6"]), rtol=0, atol=LAST_BITS[torch.float32])


@pytest.mark.parametrize("seed", FURTHER["keys"])
def test_seeds_of_64_bits_are_those_of_jax(seed):
    assert rng.key(int(seed)).tolist() == FURTHER["keys"][seed]
    assert rng.key(torch.tensor(int(seed))).tolist() == FURTHER["keys"][seed]


@further
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_uniform_is_that_of_jax_in_every_dtype(case, dtype):
    got = rng.uniform(rng.key(case["seed"]), (6,), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, exact(case[f"uniform_{str(dtype).removeprefix('torch.')}"], dtype))


@further
def test_draws_in_float64_are_those_of_jax(case):
    for name in ("normal", "gumbel", "exponential"):
        got = getattr(rng, name)(rng.key(case["seed"]), (6,), torch.float64)
        torch.testing.assert_close(
            got,
            exact(case[f"{name}_float64"], torch.float64),
            rtol=0,
            atol=LAST_BITS[torch.float64],
        )


@further
def test_uniform_of_a_crooked_range_is_that_of_jax_to_one_rounding(case):
    got = rng.uniform(rng.key(case["seed"]), (6,), torch.float32, 0.1, 1 / 3)
    # the values are in [1/16, 1/2)
    torch.testing.assert_close(got, exact(case["uniform_tenth_to_third"]), rtol=0, atol=2.0**-25)


@further
def test_randint_of_any_span_is_that_of_jax(case):
    key = rng.key(case["seed"])
    ranges = {
        "-5_3": (-5, 3),
        "0_70000": (0, 70000),
        "0_1e9": (0, 10**9),
        "-2e9_2e9": (-2 * 10**9, 2 * 10**9),
        "full": (-(2**31), 2**31),
    }
    for name, (minval, maxval) in ranges.items():
        wanted = case[f"randint_{name}"]
        assert rng.randint(key, (len(wanted),), minval, maxval).tolist() == wanted
        assert (
            rng.randint(key, (len(wanted),), torch.tensor(minval), torch.tensor(maxval)).tolist()
            == wanted
        )


@further
def test_shapes_of_draws_are_read_as_in_jax(case):
    key, logits = rng.key(case["seed"]), torch.tensor(FURTHER["logits"])
    assert (
        rng.categorical(key, torch.arange(1, 9).float().log(), shape=(16,)).tolist()
        == case["categorical_shape_16"]
    )
    assert rng.categorical(key, logits, 0).tolist() == case["categorical_axis0"]
    assert rng.categorical(key, logits, shape=(5, 2)).tolist() == case["categorical_5x2"]
    assert rng.categorical(key, logits, 0, (4, 3)).tolist() == case["categorical_axis0_4x3"]
    assert (
        rng.bernoulli(key, torch.tensor([0.1, 0.5, 0.9]), (4, 3)).tolist()
        == case["bernoulli_vector"]
    )
    assert rng.permutation(key, torch.arange(10).reshape(5, 2)).tolist() == case["permutation_rows"]
    # two rounds of sorting
    assert rng.permutation(key, 2000)[:12].tolist() == case["permutation_2000_first"]


# Law: keys


@given(seeds, shapes)
def test_split_gives_keys_of_the_shape_asked(seed, shape):
    keys = rng.split(rng.key(seed), shape)
    assert keys.shape == (*shape, 2)
    assert keys.dtype == torch.int64
    assert bool(((keys >= 0) & (keys < 2**32)).all())


@given(seeds, st.integers(1, 6))
def test_split_is_fold_in_of_the_index(seed, n):
    key = rng.key(seed)
    assert torch.equal(
        rng.split(key, n), torch.stack([rng.fold_in(key, index) for index in range(n)])
    )
    assert torch.equal(
        rng.split(key, n), vmap(lambda index: rng.fold_in(key, index))(torch.arange(n))
    )


@given(seeds, st.sets(st.integers(0, 2**32 - 1), min_size=2, max_size=8))
def test_fold_in_of_distinct_data_gives_distinct_keys(seed, numbers):
    folded = {tuple(rng.fold_in(rng.key(seed), number).tolist()) for number in numbers}
    assert len(folded) == len(numbers)


@given(seeds, st.integers(0, 5), st.integers(0, 5))
def test_a_longer_draw_begins_with_the_shorter(seed, n, more):
    key = rng.key(seed)
    assert torch.equal(rng.bits(key, (n + more,))[:n], rng.bits(key, (n,)))


# Law: purity and transforms


@draws
def test_a_draw_depends_on_its_key_alone(draw):
    key = rng.key(7)
    before = key.clone()
    first = draw(key)
    global_state = torch.get_rng_state()
    torch.manual_seed(1)
    rng.normal(rng.key(8), (3,))
    assert torch.equal(draw(key), first)
    assert torch.equal(key, before)
    torch.set_rng_state(global_state)
    draw(key)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(draw(rng.key(9)), first)


@draws
def test_vmap_over_keys_is_the_loop(draw):
    keys = rng.split(rng.key(3), 4)
    together, apart = vmap(draw)(keys), torch.stack([draw(key) for key in keys])
    assert together.dtype == apart.dtype
    assert torch.equal(together, apart)


def test_vmap_nests_and_maps_over_parameters():
    keys = rng.split(rng.key(3), (2, 3))
    nested = vmap(vmap(lambda key: rng.uniform(key, (4,))))(keys)
    assert torch.equal(nested[1, 2], rng.uniform(keys[1, 2], (4,)))
    tops = torch.tensor([1.0, 2.0, 5.0])
    scaled = vmap(lambda key, top: rng.uniform(key, (4,), torch.float32, 0.0, top))(keys[0], tops)
    assert torch.equal(scaled[2], rng.uniform(keys[0, 2], (4,), torch.float32, 0.0, 5.0))


@pytest.mark.parametrize("name", ["fold_in", "uniform float64", "categorical", "permutation"])
def test_a_traced_draw_is_the_eager_one(name):
    key = rng.key(5)
    traced = torch.compile(DRAWS[name], fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(key), DRAWS[name](key))
    many = torch.compile(vmap(DRAWS[name]), fullgraph=True, backend="aot_eager")
    assert torch.equal(many(rng.split(key)), vmap(DRAWS[name])(rng.split(key)))


@pytest.mark.real("Inductor compiles for it")
def test_compiled_bits_are_the_eager_ones():
    """Inductor's own integer code, whose overflow has to wrap around too; 1003 leaves a tail beside
    the vector registers.
    """
    compiled = torch.compile(lambda key: rng.bits(key, (1003,)), fullgraph=True)
    for key in rng.split(rng.key(0), 3):
        assert torch.equal(compiled(key), rng.bits(key, (1003,)))


def test_draws_differentiate_in_their_parameters():
    key = rng.key(0)
    slope = grad(lambda top: rng.uniform(key, (3,), torch.float32, 0.0, top).sum())(
        torch.tensor(2.0)
    )
    torch.testing.assert_close(slope, rng.uniform(key, (3,)).sum())
    weights = torch.tensor([1.0, 10.0, 100.0])
    by_row = grad(lambda x: (rng.permutation(key, x) * weights).sum())(torch.zeros(3))
    assert torch.equal(by_row[rng.permutation(key, 3)], weights)


def test_keys_follow_the_default_device_and_draws_follow_their_key():
    with torch.device("meta"):
        key = rng.key(0)
    assert key.device.type == "meta"
    assert rng.normal(key, (2,)).device.type == "meta"
    assert rng.split(key).device.type == "meta"
    with torch.device("meta"):
        assert rng.normal(rng.key(torch.tensor(0, device="cpu")), (2,)).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@draws
def test_every_device_draws_the_same(draw):
    key = rng.key(11)
    with torch.device("cuda"):  # the parameters that DRAWS makes go where the key is
        got = draw(key.cuda()).cpu()
    torch.testing.assert_close(
        got,
        draw(key),
        rtol=0,
        atol=LAST_BITS[torch.float32] if got.dtype != torch.float16 else 4e-3,
    )


# Law: distributions, with literal keys


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_uniform_fills_the_half_open_interval_evenly(dtype):
    u = rng.uniform(rng.key(1), (16000,), dtype).double()
    assert u.min() >= 0
    assert u.max() < 1
    statistic, bound = chi_square(torch.histc(u, 16, 0, 1), torch.full((16,), 1000.0))
    assert statistic < bound


def test_the_ends_of_the_unit_interval_give_finite_draws():
    """Seeds whose first word has a mantissa of all zeros, and of all ones; the values are jax's."""
    lowest, highest = rng.key(780233), rng.key(20192286)
    assert rng.uniform(lowest) == 0
    assert rng.uniform(highest) == 1 - 2.0**-23
    wanted = {
        "normal": (-5.41998291015625, 5.2201128005981445),
        "gumbel": (-4.46976900100708, 15.942384719848633),
    }
    wanted["exponential"] = (0.0, 15.942384719848633)
    for name, ends in wanted.items():
        got = torch.stack([getattr(rng, name)(key) for key in (lowest, highest)])
        torch.testing.assert_close(got, torch.tensor(ends), rtol=0, atol=LAST_BITS[torch.float32])
    assert not rng.bernoulli(lowest, 0.0)
    assert rng.bernoulli(highest, 1.0)


def test_uniform_of_an_empty_range_gives_its_lower_end():
    assert rng.uniform(
        rng.key(1), (3,), torch.float32, 2.0, torch.tensor([2.0, 1.0, -5.0])
    ).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "distribution_function"),
    [
        ("normal", lambda x: torch.special.ndtr(x)),
        ("gumbel", lambda x: torch.exp(-torch.exp(-x))),
        ("exponential", lambda x: 1 - torch.exp(-x)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_distribution_function_makes_a_draw_uniform(name, distribution_function, dtype):
    x = getattr(rng, name)(rng.key(2), (16000,), dtype)
    assert x.dtype == dtype
    assert bool(x.isfinite().all())
    u = distribution_function(x.double())
    statistic, bound = chi_square(torch.histc(u, 16, 0, 1), torch.full((16,), 1000.0))
    assert statistic < bound


def test_normal_in_bfloat16_has_the_tails_of_float32():
    x = rng.normal(rng.key(2), (16000,), torch.bfloat16)
    assert torch.equal(x, rng.normal(rng.key(2), (16000,)).bfloat16())
    assert x.abs().max() > 3  # erfinv of 7 bits would end at 2.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_categorical_follows_the_softmax_of_its_logits(dtype):
    logits = torch.tensor([0.0, -6.0, 1.0, -torch.inf, 2.0, -3.0], dtype=dtype)
    counts = rng.categorical(rng.key(4), logits, shape=(40000,)).bincount(minlength=6)
    assert counts[3] == 0
    possible = torch.tensor([0, 1, 2, 4, 5])
    statistic, bound = chi_square(counts[possible], 40000 * logits.double().softmax(-1)[possible])
    assert statistic < bound


def test_bernoulli_is_true_as_often_as_asked():
    for p in (0.01, 0.5, 0.99):
        counts = rng.bernoulli(rng.key(5), p, (20000,)).long().bincount(minlength=2)
        statistic, bound = chi_square(counts, [20000 * (1 - p), 20000 * p])
        assert statistic < bound
    assert not rng.bernoulli(rng.key(5), 0.0, (1000,)).any()
    assert rng.bernoulli(rng.key(5), 1.0, (1000,)).all()


def test_randint_reaches_every_integer_of_its_range_alike():
    x = rng.randint(rng.key(6), (14000,), -3, 11)
    statistic, bound = chi_square((x + 3).bincount(minlength=14), torch.full((14,), 1000.0))
    assert statistic < bound


def test_permutations_are_equally_likely():
    shuffled = vmap(lambda key: rng.permutation(key, 4))(rng.split(rng.key(7), 12000))
    numbers = {order: index for index, order in enumerate(itertools.permutations(range(4)))}
    counts = torch.tensor([numbers[tuple(order)] for order in shuffled.tolist()]).bincount(
        minlength=24
    )
    statistic, bound = chi_square(counts, torch.full((24,), 500.0))
    assert statistic < bound


def test_sibling_keys_draw_independently():
    first, second = (rng.bits(key, (64000,)) for key in rng.split(rng.key(8)))
    pairs = (first >> 30) * 4 + (second >> 30)
    statistic, bound = chi_square(pairs.bincount(minlength=16), torch.full((16,), 4000.0))
    assert statistic < bound


# Edges and errors


def test_draws_of_nothing_have_their_shape():
    key = rng.key(0)
    assert rng.normal(key, (0, 3)).shape == (0, 3)
    assert rng.normal(key).shape == ()
    assert rng.split(key, 0).shape == (0, 2)
    assert rng.categorical(key, torch.zeros(0, 3)).shape == (0,)
    assert rng.categorical(key, torch.zeros(3), shape=(0,)).shape == (0,)
    assert rng.permutation(key, 0).tolist() == []
    assert rng.permutation(key, 1).tolist() == [0]


def test_randint_of_an_empty_range_of_tensors_gives_its_lower_end():
    assert rng.randint(
        rng.key(0), (3,), torch.tensor([2, 5, 7]), torch.tensor([2, 1, 8])
    ).tolist() == [2, 5, 7]


NOT_ONE_KEY = {
    "a batch": rng.split(rng.key(0), 3),
    "int32": rng.key(0).int(),
    "float32": rng.key(0).float(),
    "one word": rng.key(0)[:1],
    "three words": torch.zeros(3, dtype=torch.int64),
    "a number": 0,
}


@draws
@pytest.mark.parametrize("key", NOT_ONE_KEY.values(), ids=NOT_ONE_KEY.keys())
def test_what_is_not_one_key_is_refused_with_the_word_vmap(draw, key):
    with pytest.raises(
        (TypeError, ValueError), match=r"key should be one key, int64 \(2,\), got .*vmap"
    ):
        draw(key)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda key: rng.key(0.5), TypeError, "key: seed should be an int"),
        (lambda key: rng.key(torch.arange(2)), TypeError, "key: seed .*vmap"),
        (lambda key: rng.key(2**64), ValueError, "key: seed should be an int of at most 64 bits"),
        (lambda key: rng.fold_in(key, -1), ValueError, "fold_in: data"),
        (lambda key: rng.fold_in(key, 2**32), ValueError, "fold_in: data"),
        (lambda key: rng.fold_in(key, 1.5), TypeError, "fold_in: data"),
        (lambda key: rng.fold_in(key, torch.arange(3)), TypeError, "fold_in: data .*vmap"),
        (
            lambda key: rng.uniform(key, 3),
            ValueError,
            "uniform: shape should be a tuple of sizes, got 3",
        ),
        (
            lambda key: rng.split(key, -1),
            ValueError,
            "split: n should be a number of keys, 0 or more, or a tuple of them, got -1",
        ),
        (lambda key: rng.split(key, "2"), ValueError, "split: n should be a number of keys"),
        (lambda key: rng.bits(key, (2**16, 2**15)), ValueError, "bits: shape should be fewer than"),
        (
            lambda key: rng.normal(key, (), torch.int32),
            TypeError,
            "normal: dtype should be float64",
        ),
        (
            lambda key: rng.uniform(key, (3,), torch.float32, torch.zeros(4)),
            ValueError,
            "uniform: minval and maxval",
        ),
        (
            lambda key: rng.uniform(key, (), torch.float32, torch.zeros(4)),
            ValueError,
            "uniform: minval and maxval",
        ),
        (
            lambda key: rng.bernoulli(key, torch.tensor([1, 0])),
            TypeError,
            "bernoulli: p should be float64",
        ),
        (lambda key: rng.bernoulli(key, torch.full((3,), 0.5), (4,)), ValueError, "bernoulli: p"),
        (
            lambda key: rng.categorical(key, torch.arange(3)),
            TypeError,
            "categorical: logits should be float64",
        ),
        (
            lambda key: rng.categorical(key, torch.zeros(2, 3), axis=2),
            ValueError,
            "categorical: logits should be categories along axis 2",
        ),
        (
            lambda key: rng.categorical(key, torch.zeros(2, 0)),
            ValueError,
            "categorical: logits should be categories",
        ),
        (
            lambda key: rng.categorical(key, torch.zeros(2, 3), shape=(3,)),
            ValueError,
            "categorical: logits less its axis",
        ),
        (lambda key: rng.randint(key, (3,), 5, 5), ValueError, "randint: maxval - minval"),
        (lambda key: rng.randint(key, (3,), 0, 2**33), ValueError, "randint: maxval - minval"),
        (lambda key: rng.randint(key, (3,), 0.0, 5), TypeError, "randint: minval"),
        (lambda key: rng.randint(key, (3,), 0, torch.arange(1, 3)), ValueError, "randint: maxval"),
        (lambda key: rng.permutation(key, torch.tensor(3)), ValueError, "permutation: x"),
    ],
)
def test_errors_name_the_function_and_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call(rng.key(0))
