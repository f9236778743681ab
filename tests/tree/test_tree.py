"""Trees keep their paths, their structure and what nobody named; halves come together again, also
inside a transform.
"""

import html.parser
from collections import OrderedDict
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils import _pytree

from funcattn import tree
from funcattn.records import ABSENT, record


@record
class Codes(NamedTuple):
    codes: Any
    scale: Any


@record
class Layer(NamedTuple):
    q: Any
    bias: Any


class Params(NamedTuple):
    embed: Any
    layers: Any


def is_weight(node):
    return isinstance(node, Codes)


def params(layers=2, bias=ABSENT):
    return Params(
        torch.ones(3, 2), tuple(Layer(torch.full((2, 2), float(n)), bias) for n in range(layers))
    )


def quantized(layers=2):
    code = lambda n: Codes(torch.full((2, 2), n, dtype=torch.int8), torch.full((2,), 0.5))
    return Params(torch.ones(3, 2), tuple(Layer(code(n), ABSENT) for n in range(layers)))


leaf = st.one_of(
    st.integers(0, 3).map(lambda n: torch.arange(n + 1.0)),
    st.integers(0, 3).map(lambda n: torch.full((2,), n)),
    st.booleans().map(torch.tensor),
)
trees = st.recursive(
    st.one_of(leaf, st.just(ABSENT)),
    lambda child: st.one_of(
        st.tuples(child, child).map(lambda pair: Layer(*pair)),
        st.lists(child, max_size=3).map(tuple),
        st.lists(child, max_size=3),
        st.dictionaries(st.sampled_from(["b", "a", "0"]), child, max_size=3),
        st.dictionaries(st.sampled_from(["b", "a"]), child, max_size=2).map(OrderedDict),
    ),
    max_leaves=8,
)


def same(a, b):
    """The same structure holding the very same objects."""
    return optree.tree_structure(a) == optree.tree_structure(b) and all(
        x is y for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    )


# Paths


def test_a_path_joins_fields_keys_and_indices():
    found = tree.paths({"x": [params(1)], "a": 0})
    assert found == ["a", "x.0.embed", "x.0.layers.0.q"]
    assert tree.paths(torch.ones(1)) == [""]


@given(trees)
def test_paths_are_those_of_the_accessors_of_optree(t):
    accessors, flat, _ = optree.tree_flatten_with_accessor(t)
    named = [
        ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        for accessor in accessors
    ]
    assert tree.paths(t) == named
    assert all(x is y for x, y in zip(tree.leaves(t), flat, strict=True))
    assert all(
        path == name and x is y
        for (path, x), name, y in zip(tree.items(t), named, flat, strict=True)
    )


def test_a_weight_keeps_its_path_when_it_becomes_a_record():
    assert tree.paths(quantized(), is_leaf=is_weight) == tree.paths(params())
    assert tree.paths(quantized())[1:3] == ["layers.0.q.codes", "layers.0.q.scale"]
    assert tree.leaves(quantized(), is_leaf=is_weight)[1]._fields == ("codes", "scale")


# Map


@given(trees)
def test_map_keeps_the_structure(t):
    assert same(tree.map(lambda x: x, t), t)
    assert same(tree.map_with_path(lambda _, x: x, t), t)


def test_map_with_path_gives_each_leaf_its_own_path():
    found = tree.map_with_path(
        lambda path, x, y: f"{path} {y}", params(), tree.map(lambda x: x.ndim, params())
    )
    assert tree.leaves(found) == ["embed 2", "layers.0.q 2", "layers.1.q 2"]
    kinds = tree.map_with_path(
        lambda path, x: f"{path}: {type(x).__name__}", quantized(), is_leaf=is_weight
    )
    assert tree.leaves(kinds)[1] == "layers.0.q: Codes"


def test_map_refuses_a_tree_of_another_structure():
    for verb in (tree.map, tree.map_with_path):
        with pytest.raises(ValueError, match=r"(?i)expected|mismatch"):
            verb(lambda *x: x[-1], params(2), params(3))


def test_none_stays_where_it_is():
    assert tree.map(lambda x: x + 1, {"a": None, "b": 1}) == {"a": None, "b": 2}
    assert tree.paths({"a": None, "b": 1}) == ["b"]


# Stack, measure, compare


@given(st.integers(1, 4))
def test_unstack_undoes_stack(n):
    several = [tree.map(lambda x, n=n: x + n, params(1)) for n in range(n)]
    stacked = tree.stack(several)
    assert stacked.embed.shape == (n, 3, 2)
    assert all(
        tree.allclose(a, b, 0, 0) for a, b in zip(tree.unstack(stacked), several, strict=True)
    )


def test_a_stack_is_an_ensemble_for_vmap():
    several = [params(1), tree.map(lambda x: x * 3, params(1))]
    total = lambda p: sum(x.sum() for x in tree.leaves(p))
    assert torch.equal(vmap(total)(tree.stack(several)), torch.stack([total(p) for p in several]))


def test_stack_and_unstack_say_what_does_not_fit():
    with pytest.raises(ValueError, match="stack: trees should be at least one"):
        tree.stack([])
    with pytest.raises(ValueError, match=r"(?i)expected|mismatch"):
        tree.stack([params(1), params(2)])
    with pytest.raises(ValueError, match=r"unstack: tree .*\(2,\) at 'b'"):
        tree.unstack({"a": torch.ones(3), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="got no leaves"):
        tree.unstack(())
    with pytest.raises(ValueError, match=r"\(\) at 'b'"):
        tree.unstack({"b": torch.tensor(1.0)})


def test_sizes_count_every_tensor():
    assert tree.count(quantized(2)) == 6 + 2 * (4 + 2)
    assert tree.nbytes(quantized(2)) == 6 * 4 + 2 * (4 + 2 * 4)
    assert tree.count({"a": "word", "b": ()}) == 0


def test_allclose_looks_at_structure_shape_dtype_and_value():
    assert tree.allclose(params(), params())
    assert tree.allclose(quantized(), quantized())
    near = tree.map(lambda x: x + 1e-4, params())
    assert not tree.allclose(params(), near)
    assert tree.allclose(params(), near, atol=1e-3)
    assert not tree.allclose(params(2), params(3))
    assert not tree.allclose({"a": torch.ones(2)}, {"a": torch.ones(1, 2)})
    assert not tree.allclose({"a": torch.ones(2)}, {"a": torch.ones(2).double()})
    assert not tree.allclose({"a": torch.tensor(2)}, {"a": torch.tensor(3)}, atol=5)
    assert not tree.allclose({"a": 1}, {"a": 2})


# Update


@given(trees, st.data())
def test_update_shares_every_leaf_that_it_does_not_name(t, data):
    found = tree.items(t)
    if not found:
        return
    path, _ = data.draw(st.sampled_from(found))
    marked = tree.update(t, path, "new")
    assert optree.tree_structure(marked) == optree.tree_structure(t)
    for (name, old), (_, new) in zip(found, tree.items(marked), strict=True):
        assert new == "new" if name == path else new is old


def test_update_reaches_leaves_subtrees_and_what_is_absent():
    old = params()
    assert tree.update(old, "layers.0.q", lambda q: q + 5).layers[0].q[0, 0] == 5
    assert tree.update(old, "layers.0", ()).layers[0] == ()
    assert tree.update(old, "layers.1.bias", torch.ones(2)).layers[1].bias.shape == (2,)
    assert tree.update(quantized(), "layers.1.q", lambda weight: weight.scale).layers[
        1
    ].q.shape == (2,)
    assert tree.update(1, "", 2) == 2
    assert tree.allclose(old, params(), 0, 0)
    assert list(tree.update({"b": 1, "a": 2}, "a", 3)) == ["b", "a"]


def test_update_by_regex_replaces_every_leaf_that_matches_whole():
    changed = tree.update(params(12), r"layers\.1\.q", "new", regex=True)
    assert [n for n, layer in enumerate(changed.layers) if isinstance(layer.q, str)] == [1]
    changed = tree.update(
        quantized(), r".*\.q", lambda weight: weight.codes, regex=True, is_leaf=is_weight
    )
    assert [layer.q.dtype for layer in changed.layers] == [torch.int8, torch.int8]


def test_an_unknown_path_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"update: path .*'layers.0.k'. Near it: layers.0.q"):
        tree.update(params(), "layers.0.k", 1)
    with pytest.raises(ValueError, match=r"Near it: .*layers\.0\.q"):
        tree.update(params(), r"layers\.0", 1, regex=True)  # a subtree, not a leaf


# Partition


@given(
    trees,
    st.sampled_from(
        ["floating", "integer", lambda path, _: "a" in path, lambda *_: True, lambda *_: False]
    ),
)
def test_combine_undoes_partition(t, predicate):
    selected, rest = tree.partition(t, predicate)
    assert same(tree.combine(selected, rest), t)
    assert same(tree.combine(rest, selected), t)
    assert len(tree.leaves(selected)) + len(tree.leaves(rest)) == len(tree.leaves(t))
    # no None: torch.func takes both
    assert all(isinstance(x, torch.Tensor) for x in _pytree.tree_leaves((selected, rest)))


def test_partition_chooses_by_kind_and_by_path():
    floating, rest = tree.partition(quantized(1))
    assert tree.paths(floating) == ["embed", "layers.0.q.scale"]
    assert tree.paths(rest) == ["layers.0.q.codes"]
    integers, _ = tree.partition(
        {"n": torch.tensor(1), "b": torch.tensor(True), "x": torch.tensor(1.0), "word": "word"},
        "integer",
    )
    assert tree.paths(integers) == ["n"]
    chosen, others = tree.partition(
        quantized(1), lambda path, _: path == "layers.0.q", is_leaf=is_weight
    )
    assert tree.paths(chosen, is_leaf=is_weight) == ["layers.0.q"]
    assert tree.paths(others) == ["embed"]


def loss(p, x):
    for layer in p.layers:
        x = x @ (layer.q.codes.float() * layer.q.scale)
    return (x * p.embed).square().sum()


def test_a_gradient_has_the_shape_of_the_chosen_half_and_combines():
    p, x = quantized(), torch.ones(3, 2)
    floating, rest = tree.partition(p)
    slope = grad(lambda half: loss(tree.combine(half, rest), x))(floating)
    assert optree.tree_structure(slope) == optree.tree_structure(floating)
    by_hand = grad(lambda embed: loss(p._replace(embed=embed), x))(p.embed)
    torch.testing.assert_close(slope.embed, by_hand)
    stepped = tree.combine(tree.map(lambda a, b: a - 0.1 * b, floating, slope), rest)
    assert optree.tree_structure(stepped) == optree.tree_structure(p)
    assert stepped.layers[0].q.codes is p.layers[0].q.codes


def test_partition_inside_a_transform_is_partition_outside():
    p, x = params(), torch.ones(3, 2)

    def inside(p):
        floating, rest = tree.partition(
            tree.cast(torch.float64)(p), lambda path, _: path.endswith("q")
        )
        moved = tree.update(floating, "layers.0.q", lambda q: 2 * q)
        return sum(y.square().sum() for y in tree.leaves(tree.combine(moved, rest))) * x.sum()

    wanted = tree.map_with_path(
        lambda path, y: 2 * y * x.sum() * (4 if path == "layers.0.q" else 1), p
    )
    assert tree.allclose(grad(inside)(p), wanted)
    assert tree.allclose(
        jvp(inside, (p,), (p,))[1],
        sum(
            (a * b).sum() for a, b in zip(tree.leaves(p), tree.leaves(wanted), strict=True)
        ).double(),
    )
    assert tree.allclose(vjp(inside, p)[1](torch.ones((), dtype=torch.float64))[0], wanted)
    assert tree.allclose(vmap(inside)(tree.stack([p, p]))[1], inside(p))
    assert tree.allclose(vmap(grad(inside))(tree.stack([p, p])), tree.stack([wanted, wanted]))


def test_partition_and_combine_say_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"partition: tree should be without None, got None at 'a\.0'"
    ):
        tree.partition({"a": [None]})
    with pytest.raises(ValueError, match=r"partition: where .*'float'"):
        tree.partition(params(), "float")
    with pytest.raises(
        ValueError, match=r"combine: rest should be \(\) where selected is not, at 'embed'"
    ):
        tree.combine(params(), params())
    with pytest.raises(ValueError, match="combine: rest should be of the same parts at 'a'"):
        tree.combine({"a": [1, ()]}, {"a": [()]})
    with pytest.raises(ValueError, match="at 'a'"):
        tree.combine({"a": [1]}, {"a": (1,)})


# Transforms


def test_cast_changes_floating_leaves_and_shares_the_others():
    p = {
        "w": torch.ones(2),
        "done": torch.ones(2).bfloat16(),
        "n": torch.tensor(3),
        "codes": torch.ones(2).to(torch.float8_e4m3fn),
        "name": "x",
    }
    changed = tree.cast(torch.bfloat16)(p)
    assert changed["w"].dtype == torch.bfloat16
    assert p["w"].dtype == torch.float32
    assert all(changed[name] is p[name] for name in ("done", "n", "codes", "name"))
    assert tree.paths(changed) == tree.paths(p)
    with pytest.raises(TypeError, match="cast: dtype should be a floating"):
        tree.cast(torch.int8)
    with pytest.raises(TypeError, match="cast: dtype"):
        tree.cast("float32")


def test_to_moves_every_tensor_and_shares_what_is_there():
    p = {"w": torch.ones(2), "n": torch.tensor(3), "name": "x"}
    moved = tree.to("meta")(p)
    assert [moved["w"].device.type, moved["n"].device.type, moved["name"]] == ["meta", "meta", "x"]
    assert same(tree.to(p["w"].device)(p), p)


def test_the_parameters_of_a_module_are_a_tree():
    module = torch.nn.Linear(2, 3)
    floating, rest = tree.partition(
        dict(module.named_parameters()), lambda path, _: path == "weight"
    )
    x = torch.ones(2)
    slope = grad(lambda half: functional_call(module, tree.combine(half, rest), (x,)).sum())(
        floating
    )
    assert torch.equal(slope["weight"], torch.ones(3, 2))
    assert slope["bias"] == ()


# Compile


COMPILED = {
    "map": lambda p: tree.map(lambda x, y: x + y, p, p),
    "map_with_path": lambda p: tree.map_with_path(lambda path, x: x * len(path), p),
    "leaves": tree.leaves,
    "paths": lambda p: dict(zip(tree.paths(p), tree.leaves(p), strict=True)),
    "stack": lambda p: tree.stack([p, p]),
    "unstack": lambda p: tree.unstack(tree.stack([p, p]))[1],
    "partition": lambda p: tree.combine(*tree.partition(p)),
    "partition by path": lambda p: tree.partition(p, lambda path, _: "q" in path),
    "update": lambda p: tree.update(p, "layers.0.q", lambda q: q),
    "update by regex": lambda p: tree.update(p, r"layers.*", lambda x: x * 2, regex=True),
    "cast": tree.cast(torch.float64),
    "nbytes": lambda p: p.embed * tree.nbytes(p) + tree.count(p),
    "grad": lambda p: grad(lambda half, rest: loss(tree.combine(half, rest), torch.ones(3, 2)))(
        *tree.partition(p)
    ),
}


@pytest.mark.parametrize("f", COMPILED.values(), ids=COMPILED.keys())
def test_a_compiled_tree_function_is_the_eager_one(f):
    torch._dynamo.reset()
    assert tree.allclose(
        torch.compile(f, fullgraph=True, backend="eager")(quantized()), f(quantized())
    )


def test_a_dict_with_an_empty_half_compiles():
    torch._dynamo.reset()
    p = {"b": torch.ones(2), "a": [torch.ones(1)], "none": {"bias": ()}}
    double = lambda p: tree.combine(
        *(tree.map(lambda x: 2 * x, half) for half in tree.partition(p))
    )
    assert tree.allclose(torch.compile(double, fullgraph=True, backend="eager")(p), double(p))


# Summary


def test_a_summary_folds_repeated_layers_and_totals_everything():
    text = str(tree.summary(quantized(30)))
    assert text.splitlines() == [
        "path         dtype    shape  bytes",
        "embed        float32  [3,2]  24 B",
        "layers.0-29                  30 x 12 B",
        "  q                          12 B",
        "    codes    int8     [2,2]  4 B",
        "    scale    float32  [2]    8 B",
        "total: 186 elements, 384 B, 61 leaves",
    ]
    assert "  q          Codes" in str(tree.summary(quantized(30), is_leaf=is_weight))


def test_a_summary_keeps_layers_apart_that_differ():
    p = quantized(4)
    mixed = tree.update(p, "layers.2.q", torch.ones(2, 2))
    names = [line.split()[0] for line in str(tree.summary(mixed)).splitlines()[2:-1]]
    assert names == ["layers", "0-1", "q", "codes", "scale", "2", "q", "3", "q", "codes", "scale"]


def test_a_summary_of_one_leaf_or_of_nothing_reads():
    assert "float32  [2]" in str(tree.summary(torch.ones(2)))
    assert "total: 0 elements, 0 B, 0 leaves" in str(tree.summary(()))
    assert "int" in str(tree.summary({"step": 3}))
    assert "1.0 KiB" in str(tree.summary(torch.ones(256)))
    assert "3.0 MiB" in str(tree.summary(torch.ones(3 << 18, device="meta")))


def test_a_summary_escapes_every_name_in_html():
    page = tree.summary(
        {"<script>alert(1)</script>": torch.ones(2), "a&b": [torch.ones(1)] * 2}
    )._repr_html_()
    tags = set()
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.add(tag)
    parser.feed(page)
    assert tags == {"table", "tr", "th", "td", "p"}
    assert "&lt;script&gt;" in page
    assert "a&amp;b.0-1" in page
    assert "total: 4 elements" in page
