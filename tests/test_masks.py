"""Masks against booleans: every operation and every constructor is compared with the plain loop it
stands for.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import masks
from funcattn.masks import END, Mask

S = 6  # keys that dense comparisons look at; intervals reach a little to both sides of them

EDGES = st.one_of(st.integers(-2, S + 2), st.just(END))


@st.composite
def raw_masks(draw, lead=(), T=2):
    """Any intervals: empty ones, overlapping ones, out of order, beyond the ends; n from 0 to 3."""
    n = draw(st.integers(0, 3))
    shape = (*lead, T, n)
    count = torch.Size(shape).numel()
    edges = lambda: torch.tensor(
        draw(st.lists(EDGES, min_size=count, max_size=count)), dtype=torch.int64
    ).reshape(shape)
    return Mask(edges(), edges())


def naive_canonical(intervals):
    """Sort, drop what is empty, join what overlaps or touches: on lists of pairs."""
    clamped = sorted((max(a, 0), min(b, END)) for a, b in intervals)
    found = []
    for a, b in clamped:
        if a >= b:
            continue
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


def rows(mask):
    """The intervals of each query as a list of pairs, empty ones included."""
    n = mask.start.shape[-1]
    pairs = torch.stack([mask.start, mask.stop], -1).reshape(mask.start.shape[:-1].numel(), n, 2)
    return [[tuple(pair) for pair in row] for row in pairs.tolist()]


def non_empty(mask):
    return [[pair for pair in row if pair[0] < pair[1]] for row in rows(mask)]


def assert_canonical(mask):
    for row in rows(mask):
        kept = naive_canonical(row)
        assert row == kept + [(END, END)] * (len(row) - len(kept))


@given(raw_masks(lead=(2, 1)), raw_masks(lead=(3,)))
def test_algebra_agrees_with_booleans(a, b):
    x, y = a.dense(S), b.dense(S)
    assert torch.equal((a & b).dense(S), x & y)
    assert torch.equal((a | b).dense(S), x | y)
    assert torch.equal((~a).dense(S), ~x)


@given(raw_masks(), raw_masks())
def test_every_operation_is_canonical(a, b):
    for made in (a & b, a | b, ~a):
        assert_canonical(made)


@given(raw_masks(), raw_masks())
def test_operations_keep_no_more_intervals_than_stated(a, b):
    n, m = a.start.shape[-1], b.start.shape[-1]
    assert (a & b).start.shape[-1] == (n + m - 1 if n and m else 0)
    assert (a | b).start.shape[-1] == n + m
    assert (~a).start.shape[-1] == n + 1


@given(raw_masks(), raw_masks())
def test_masks_that_show_the_same_keys_hold_the_same_intervals(a, b):
    assert non_empty(~(a & b)) == non_empty(~a | ~b)
    assert non_empty(~(a | b)) == non_empty(~a & ~b)
    assert non_empty(~~a) == non_empty(a | a) == [naive_canonical(row) for row in rows(a)]
    assert non_empty((a & b) | (a & ~b)) == non_empty(a | a)


@given(raw_masks(lead=(3,)), raw_masks(lead=(3,)))
def test_vmap_of_the_algebra_is_the_batched_algebra(a, b):
    f = lambda a, b: masks.complement(masks.intersection(a, b)) | a
    for mapped, whole in zip(vmap(f)(a, b), f(a, b), strict=True):
        assert torch.equal(mapped, whole)


def test_the_complement_of_everything_is_nothing_and_back():
    everything = masks.full(2)
    assert non_empty(~everything) == [[], []]
    assert non_empty(~~everything) == [[(0, END)]] * 2


def naive(T, S, sees):
    return torch.tensor([[bool(sees(i, j)) for j in range(S)] for i in range(T)])


@pytest.mark.parametrize(
    ("mask", "T", "sees"),
    [
        (masks.full(3), 3, lambda i, j: True),
        (masks.full(3, 4), 3, lambda i, j: j < 4),
        (masks.causal(4), 4, lambda i, j: j <= i),
        (masks.causal(4, 3), 4, lambda i, j: j <= i and j < 3),
        (masks.causal(3, 5, align="lower"), 3, lambda i, j: j <= i + 2 and j < 5),
        (masks.causal(5, 3, align="lower"), 5, lambda i, j: j <= i - 2 and j < 3),
        (masks.causal(3, offset=2), 3, lambda i, j: j <= i + 2),
        (masks.causal(3, offset=-1), 3, lambda i, j: j <= i - 1),
        (masks.window(5, 2), 5, lambda i, j: abs(i - j) < 2),
        (masks.window(3, 2, offset=3), 3, lambda i, j: abs(i + 3 - j) < 2),
        (masks.window(2, 1, offset=-5), 2, lambda i, j: False),
        (masks.prefix(2, 0), 2, lambda i, j: False),
        (masks.prefix(2, 3), 2, lambda i, j: j < 3),
        (masks.sinks(2, 1), 2, lambda i, j: j < 1),
        (masks.padding(2, torch.tensor(4)), 2, lambda i, j: j < 4),
        (
            masks.segments(torch.tensor([5, 5, 1, 7, 7])),
            5,
            lambda i, j: (i < 2) == (j < 2) and (i < 3) == (j < 3) and j < 5,
        ),
        (
            masks.causal(5) & (masks.window(5, 2) | masks.sinks(5, 1)),
            5,
            lambda i, j: j <= i and (i - j < 2 or j < 1),
        ),
    ],
)
def test_constructors_agree_with_the_loop(mask, T, sees):
    assert_canonical(mask)
    assert torch.equal(mask.dense(S), naive(T, S, sees))


def test_tensors_give_each_sequence_a_mask_of_its_own():
    n = torch.tensor([[0, 2, 5]])
    for make in (
        lambda n: masks.causal(3, offset=n),
        lambda n: masks.window(3, 2, offset=n),
        lambda n: masks.prefix(3, n),
        lambda n: masks.padding(3, n),
    ):
        one_by_one = torch.stack(
            [make(int(i) if make(n).start.dim() == 2 else i).dense(S) for i in n[0]]
        )
        assert torch.equal(make(n).dense(S)[0], one_by_one)
        assert torch.equal(vmap(make)(n[0]).dense(S), one_by_one)


def test_segments_differ_per_sequence():
    ids = torch.tensor([[0, 0, 1, 1], [4, 3, 3, 3]])
    one_by_one = torch.stack([masks.segments(row).dense(4) for row in ids])
    assert torch.equal(masks.segments(ids).dense(4), one_by_one)
    assert torch.equal(vmap(masks.segments)(ids).dense(4), one_by_one)


def test_a_mask_of_no_queries_is_a_mask():
    assert masks.segments(torch.zeros(0, dtype=torch.int64)).dense(3).shape == (0, 3)
    assert (masks.causal(0) & ~masks.window(0, 2)).dense(3).shape == (0, 3)


def test_compiled_code_builds_and_combines_masks_in_one_graph():
    def f(n):
        mask = masks.complement(masks.causal(4) & masks.window(4, 2)) | masks.prefix(4, n)
        return mask.dense(S)

    n = torch.tensor(2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(n), f(n))


def test_masks_follow_the_device_of_what_they_are_made_of():
    n = torch.tensor(2, device="meta")
    made = [
        masks.prefix(3, n),
        masks.padding(3, n),
        masks.causal(3, offset=n),
        masks.window(3, 2, offset=n),
    ]
    made += [masks.segments(torch.zeros(3, dtype=torch.int64, device="meta"))]
    with torch.device("meta"):
        made += [masks.full(3), masks.causal(3), masks.window(3, 2), masks.prefix(3, 1)]
    for mask in made:
        assert (mask & ~mask).start.device.type == "meta"
        assert mask.dense(3).device.type == "meta"


def test_a_mask_does_no_tuple_arithmetic():
    mask = masks.causal(2)
    for wrong in (lambda: mask + mask, lambda: mask * 2, lambda: bool(mask)):
        with pytest.raises(TypeError, match=r"Mask: .* has no meaning for a record"):
            wrong()


@pytest.mark.parametrize("sign", ["&", "|"])
@pytest.mark.parametrize("dense_first", [False, True])
def test_mixing_with_booleans_names_dense(sign, dense_first):
    sides = [masks.causal(2), torch.ones(2, 2, dtype=torch.bool)]
    a, b = sides[::-1] if dense_first else sides
    with pytest.raises(TypeError, match=r"\.dense\(S\)"):
        a & b if sign == "&" else a | b


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: masks.causal(2) & masks.causal(3),
            ValueError,
            "got 2 and 3. Build them with the same T",
        ),
        (
            lambda: masks.causal(2) | masks.causal(3),
            ValueError,
            "got 2 and 3. Build them with the same T",
        ),
        (
            lambda: masks.causal("5"),
            ValueError,
            "masks: T should be a number of queries, 0 or more, got '5'",
        ),
        (
            lambda: masks.window(-1, 2),
            ValueError,
            "masks: T should be a number of queries, 0 or more, got -1",
        ),
        (lambda: masks.causal(torch.ones(3, 3)), ValueError, "got a Tensor. Such as"),
        (lambda: masks.causal(2, align="left"), ValueError, '"upper" or "lower"'),
        (lambda: masks.causal(2, align="lower"), ValueError, "Pass the number of keys"),
        (lambda: masks.window(2, 0), ValueError, "at least 1"),
        (lambda: masks.padding(2, torch.tensor([1.0])), TypeError, "Pass the lengths, not a mask"),
        (lambda: masks.padding(2, 3), TypeError, "an integer tensor"),
        (lambda: masks.segments(torch.tensor([0, 1, 0])), ValueError, "an id in two runs"),
        (
            lambda: vmap(masks.segments)(torch.tensor([[0, 1, 1], [0, 1, 0]])),
            ValueError,
            "an id in two runs",
        ),
        (
            lambda: fa.attention(*[torch.ones(1, 3, 2)] * 3, masks.causal(2)),
            ValueError,
            "Build it with T = 3",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_a_picture_shows_what_the_dense_mask_shows():
    mask = masks.causal(7) & (masks.window(7, 3) | masks.sinks(7, 1))
    letters = ["".join(".#"[int(x)] for x in row) for row in mask.dense(7).int()]
    assert masks.picture(mask).splitlines() == letters
    assert str(mask).splitlines()[1:] == letters
    svg = mask._repr_html_()
    assert svg.count("fill-opacity") == int(mask.dense(7).sum())
    assert "7 queries, 7 keys, 2 intervals a query" in svg


def test_a_picture_of_a_long_mask_has_cells_that_are_seen_in_part():
    lines = masks.picture(masks.causal(320)).splitlines()
    assert len(lines) == 32
    assert lines[0] == "+" + "." * 31
    assert lines[31] == "#" * 31 + "+"


def test_a_mask_under_vmap_is_described_and_not_drawn():
    seen = []
    torch.func.vmap(
        lambda n: (seen.append((str(masks.prefix(4, n)), masks.prefix(4, n)._repr_html_())), n)[1]
    )(torch.arange(3))
    assert "#" not in seen[0][0]
    assert "<svg" not in seen[0][1]
