"""Which leaves a transform acts on: one argument of every transform, a regex of whole paths or a
predicate, read in one place.
"""

import re

import pytest
import torch

import funcattn as fa
from funcattn import tree
from funcattn.low_rank import is_adapted
from funcattn.quantization import is_quantized
from funcattn.sharding import Grid, P, specs

CONFIG = fa.Config(vocabulary=64)
MODEL = fa.decoder(CONFIG)
PARAMS = MODEL.init(fa.key(0))
TOKENS = fa.random.randint(fa.key(1), (128,), 0, 64)
REGEX = r"layers\.\d+\.(q|up)"
CHOSEN = [f"layers.{i}.{name}" for i in range(2) for name in ("q", "up")]
SCHEME = fa.int8


def differing(changed, is_leaf=None):
    """The paths of leaves that a transform replaced."""
    before = dict(tree.items(PARAMS))
    return [path for path, leaf in tree.items(changed, is_leaf=is_leaf) if leaf is not before[path]]


def quantized(transform):
    return [
        path
        for path, leaf in tree.items(transform(PARAMS), is_leaf=is_quantized)
        if is_quantized(leaf)
    ]


def stepped(optimizer, still):
    """The paths of leaves that one step without gradients moves otherwise than another
    optimizer's.
    """
    moved = []
    for one in (optimizer, still):
        zeros = tree.map(torch.zeros_like, PARAMS)
        moved.append(dict(tree.items(one.update(zeros, one.init(PARAMS), PARAMS)[0])))
    return [path for path, leaf in moved[0].items() if not torch.equal(leaf, moved[1][path])]


def replaced_rule(where):
    cuts = specs(PARAMS, Grid(tensor=2), [(where, P("tensor", None)), (".*", P())])
    return [
        path
        for path, spec in tree.items(cuts, is_leaf=lambda node: isinstance(node, P))
        if any(spec)
    ]


TRANSFORMS = {  # where -> the paths that were chosen
    "quantize": lambda where: quantized(fa.quantize(SCHEME, where)),
    "gptq": lambda where: quantized(fa.gptq(MODEL, TOKENS, SCHEME, where)),
    "clipped": lambda where: quantized(fa.clipped(MODEL, TOKENS, SCHEME, where)),
    "awq": lambda where: quantized(fa.awq(MODEL, TOKENS, SCHEME, where)),
    "lora": lambda where: differing(fa.lora(2, where)(fa.key(0), PARAMS), is_adapted),
    "cast": lambda where: differing(tree.cast(torch.float64, where)(PARAMS)),
    "to": lambda where: differing(tree.to("meta", where)(PARAMS)),
    "partition": lambda where: tree.paths(tree.partition(PARAMS, where)[0]),
    "adamw": lambda where: stepped(
        fa.training.adamw(1.0, decays=where), fa.training.adamw(1.0, weight_decay=0.0)
    ),
    "muon": lambda where: stepped(
        fa.training.muon(1.0, where=where, rest=fa.training.sgd(1.0)),
        fa.training.muon(1.0, weight_decay=0.0, rest=fa.training.sgd(1.0)),
    ),
    "shard": replaced_rule,
}
SPELLINGS = {
    "a regex": REGEX,
    "a predicate": lambda path, leaf: re.fullmatch(REGEX, path) is not None,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_where_chooses_the_same_leaves(name, spelling):
    assert TRANSFORMS[name](SPELLINGS[spelling]) == CHOSEN


@pytest.mark.parametrize("spelling", ["regex=True", "a predicate"])
def test_update_chooses_the_same_leaves(spelling):
    path, options = (
        (REGEX, {"regex": True}) if spelling == "regex=True" else (SPELLINGS[spelling], {})
    )
    assert differing(tree.update(PARAMS, path, torch.clone, **options)) == CHOSEN


def test_smoothing_reads_the_same_where():
    """It rescales what feeds the matrices chosen, which here is a norm of each layer."""
    every = r"layers\.\d+\.(gate|up)"
    either = [every, lambda path, leaf: re.fullmatch(every, path) is not None]
    changed = [differing(fa.smooth(MODEL, TOKENS, fa.int4, where)(PARAMS)) for where in either]
    assert changed[0] == changed[1]
    assert {path.rpartition(".")[2] for path in changed[0]} == {"feed_forward_norm", "gate", "up"}


def test_a_leaf_is_shown_to_a_predicate():
    assert tree.paths(tree.partition(PARAMS, lambda path, leaf: leaf.dim() == 1)[0])
    assert set(TRANSFORMS["cast"](lambda path, leaf: leaf.dim() == 1)).isdisjoint(CHOSEN)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_no_rule_is_refused_by_name(name):
    with pytest.raises(
        ValueError,
        match=r"^\w+: (where|decays|rules) should be a regex of paths, got '\(q', missing",
    ):
        TRANSFORMS[name]("(q")
    with pytest.raises(
        TypeError,
        match=r"^\w+: (where|decays|rules) should be a regex or a predicate of \(path, weight\), got 3",
    ):
        TRANSFORMS[name](3)


# where other rules follow
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "shard"])
def test_a_regex_that_matches_no_path_is_refused(name):
    with pytest.raises(
        ValueError, match=r"^\w+: (where|decays) should be .*(chooses none|true of some weight)"
    ):
        TRANSFORMS[name](r"layers\.q")


def test_update_refuses_the_same():
    with pytest.raises(ValueError, match="update: path should be a regex of paths"):
        tree.update(PARAMS, "(q", 0, regex=True)
    with pytest.raises(
        ValueError,
        match=r"update: path should be a rule that chooses a leaf, got .* which chooses none",
    ):
        tree.update(PARAMS, lambda path, leaf: False, 0)
    with pytest.raises(ValueError, match="update: path should be a path in the tree"):
        tree.update(PARAMS, r"layers\.q", 0, regex=True)


def test_the_former_name_of_an_argument_is_read_and_both_are_refused():
    assert tree.paths(tree.partition(PARAMS, predicate=SPELLINGS["a predicate"])[0]) == CHOSEN
    halves = tree.partition({"w": torch.zeros(2), "n": torch.tensor(1)}, predicate="integer")
    assert [tree.paths(half) for half in halves] == [["n"], ["w"]]
    with pytest.raises(ValueError, match="partition: predicate should be absent beside where"):
        tree.partition(PARAMS, REGEX, predicate="floating")


def test_the_names_of_before_are_the_same_functions():
    assert fa.quantization.predicate is tree.predicate
    assert fa.quantization.Where is tree.Where
