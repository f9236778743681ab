"""Trees of drafts keep the law of the target, whatever way their children came about; enumerated."""

import itertools

import pytest
import torch
from drafted import SHAPES, WAYS, certain, drawn_from, proof, tables
from torch.func import vmap

import funcattn as fa
from funcattn.decoding.speculative.tree_rules import (
    end_of_matching,
    kinship,
    path_to,
    regions_of_chosen,
)
from funcattn.speculation import accept_tree, blockwise, tokenwise, tree_pmf
from funcattn.testing.laws import acceptances

RULES = {"tokenwise": tokenwise, "blockwise": blockwise}
PAIRS = [(rule, way) for rule in RULES for way in WAYS]


@pytest.mark.parametrize(("rule", "way"), PAIRS)
def test_every_way_of_drafting_has_the_law_of_the_target(rule, way):
    for shape, zeros in (("pairs", False), ("ragged", True), ("star", False)):
        target, draft = tables(1, 3, zeros), tables(2, 3, zeros)
        off, _ = proof(SHAPES[shape], target, draft, way, RULES[rule])
        assert off <= acceptances.EXACT


# depth 3, and 3 children: 3^5 trees of each
DEEP = ([0, 1, 0, 3, 4], [0, 0, 1, 1, 3], [0, 0, 0, 1, 4])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "way"), PAIRS)
@pytest.mark.parametrize("parent", DEEP, ids=str)
@pytest.mark.parametrize("heat", [0.3, 2.0, 20.0])
def test_deep_trees_have_the_law_of_the_target_at_every_temperature(parent, rule, way, heat):
    target, draft = tables(0, 4, heat=heat), tables(1, 4, zeros=heat == 2.0, heat=heat)
    assert proof(parent, target, draft, way, RULES[rule])[0] <= acceptances.EXACT


def test_chosen_children_taken_for_drawn_ones_change_the_law():
    """The question of EAGLE's readers: is a top-k tree lossless above temperature 0?

    It is where the rule takes each child for certain (q = 1), and it is not where the rule takes
    the drafter's softmax for the q of its k most probable tokens.
    """
    target, draft = tables(1, 3), tables(2, 3)
    for rule in RULES.values():
        assert proof(SHAPES["pairs"], target, draft, "top", rule)[0] <= acceptances.EXACT
        for judged in ("without", "independent"):
            assert proof(SHAPES["pairs"], target, draft, "top", rule, judged)[0] > 0.05
        # What was drawn may be taken for certain, as any draft may; it is accepted less often.
        off, kept = proof(SHAPES["pairs"], target, draft, "without", rule, "top")
        assert off <= acceptances.EXACT
        assert kept < proof(SHAPES["pairs"], target, draft, "without", rule)[1] - 0.1


def test_a_drawn_tree_that_is_pruned_by_its_tokens_changes_the_law():
    """Of two drawn candidates the more probable is tried alone: the other decided what was kept."""
    p, q = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    law = torch.zeros_like(p)
    for x, y in itertools.product(range(3), repeat=2):
        best = x if q[x] >= q[y] else y
        h = min(1.0, float(p[best] / q[best]))
        rest = (p - q).clamp(min=0)
        law += q[x] * q[y] * (h * torch.eye(3)[best].double() + (1 - h) * rest / rest.sum())
    assert float((law - p).abs().sum() / 2) > 0.05


def most_possible(parent, target, draft, way):
    """sum_y min(p(y), P(y is a child)) of a star: no rule accepts more."""
    k, V = len(parent), len(target)
    if way == "top":
        drafted = torch.zeros_like(draft).index_fill(0, draft.topk(k).indices, 1.0)
    elif way == "mixed":
        q = drawn_from(parent, draft.expand(k + 1, V), way)[0]
        drafted = q.index_fill(0, draft.topk(k - 1).indices, 1.0)
    return float(torch.minimum(target, drafted).sum())


def accepted(k, target, draft, way, rule):
    """The probability that a star keeps one of its k children, over all stars of this way."""
    parent, total = torch.zeros(k, dtype=torch.int64), 0.0
    rows = drawn_from([0] * k, draft.expand(k + 1, 5), way)
    chosen = draft.topk(k if way == "top" else k - 1).indices
    firsts = [None] if way == "top" else [x for x in range(5) if x not in chosen]
    for x in firsts:
        tokens = chosen if x is None else torch.cat([torch.tensor([x]), chosen])
        flags = torch.tensor(certain([0] * k, way))
        ends = tree_pmf(
            target.expand(k + 1, 5), rows, tokens, parent, certain=flags, rule=RULES[rule]
        )
        total += (1.0 if x is None else float(rows[0, x])) * float(1 - ends[0])
    return total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["top", "mixed"])
def test_chosen_children_are_accepted_as_often_as_any_rule_can(way, rule):
    for seed in range(10):
        (target,), (draft,) = tables(seed, 1, size=5), tables(seed + 50, 1, size=5)
        for k in (1, 2, 3):
            most = most_possible([0] * k, target, draft, way)
            assert accepted(k, target, draft, way, rule) == pytest.approx(most, abs=1e-12)


def test_blockwise_keeps_more_of_a_tree():
    """Measured, not proved for trees: of each of these models."""
    gains = []
    for seed in range(3):
        target, draft = tables(seed, 3), tables(seed + 20, 3)
        for way in ("without", "mixed", "top"):
            kept = {
                name: proof(SHAPES["bush"], target, draft, way, rule)[1]
                for name, rule in RULES.items()
            }
            gains.append((way, kept["blockwise"] - kept["tokenwise"]))
    drawn = torch.tensor([gain for way, gain in gains if way != "top"])
    assert float(drawn.min()) > -1e-12
    assert float(drawn.mean()) > 0.01
    # chosen trees: both attain the bound
    assert max(abs(gain) for way, gain in gains if way == "top") < 1e-12


def test_a_chain_is_the_rule_for_chains():
    p = torch.stack([table.reshape(-1, 3)[0] for table in tables(3, 4)])
    q = torch.stack([table.reshape(-1, 3)[0] for table in tables(4, 4)])
    d, parent = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2])
    for rule in RULES.values():
        got = rule.tree.regions(p, q, d, parent, torch.zeros(3, dtype=torch.bool), False)
        wanted = rule.regions(p, q[:3], d, torch.tensor(3))
        torch.testing.assert_close(got.threshold, wanted.threshold)
        torch.testing.assert_close(got.correction, wanted.correction)
        torch.testing.assert_close(
            rule.tree.pmf(got.threshold, kinship(parent)), rule.pmf(wanted.threshold)
        )


@pytest.mark.parametrize("rule", RULES)
def test_ends_have_the_volume_of_their_pmf(rule):
    """The thresholds divide the cube of uniforms into boxes; each box has one end."""
    tree, parent = RULES[rule].tree, torch.tensor([0, 0, 1, 1, 2, -1, 4])
    h = torch.tensor([0.3, 0.6, 0.5, 0.2, 0.9, 0.0, 0.4], dtype=torch.float64)
    relations, volumes = kinship(parent), torch.zeros(8, dtype=torch.float64)
    for box in itertools.product((True, False), repeat=7):
        inside = torch.tensor(box)
        u = torch.where(inside, torch.nextafter(h, torch.tensor(-1.0).double()), h)
        volumes[tree.end(h, u.clamp(min=0), relations)] += torch.where(inside, h, 1 - h).prod()
    torch.testing.assert_close(tree.pmf(h, relations), volumes)


def test_paths_are_those_of_the_parents():
    parent = torch.tensor([0, 0, 1, -1, 3, 2])
    relations = kinship(parent)
    for node, path in enumerate(([], [1], [2], [1, 3], None, [1, 3, 5], [2, 6])):
        if path is not None:
            found, count = path_to(torch.tensor(node), relations)
            assert found.tolist() == path + [0] * (6 - len(path))
            assert int(count) == len(path)


def test_what_is_chosen_at_each_node_decides_the_path_of_a_tree_without_chance():
    """Every choice of tokens at the nodes, weighted: the code that accepts top-k trees is exact."""
    parent, tokens = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 2])
    target = tables(5, 3)
    nodes = [(), (2,), (0,), (2, 1), (2, 2)]
    p = [target[len(text)][text] for text in nodes]
    relations, law = kinship(parent), torch.zeros(3, 3, 3, dtype=torch.float64)
    for chosen in itertools.product(range(3), repeat=5):
        end = int(end_of_matching(torch.tensor(chosen), tokens, parent, relations))
        mass = torch.ones((), dtype=torch.float64)
        for row, token in zip(p, chosen, strict=True):
            mass = mass * row[token]
        text = (*nodes[end], chosen[end])
        for table in target[len(text) :]:
            mass = mass.unsqueeze(-1) * table[text]
        law[text] += mass
    assert float((law - acceptances.joint(target)).abs().sum() / 2) <= acceptances.EXACT


@pytest.mark.parametrize("parent", [[0, 0, 1, 1, 3], [0, -1, 1, 0, 1]], ids=str)
def test_chosen_children_by_a_few_numbers_are_those_of_the_rule(parent):
    tokens, parent = torch.tensor([2, 0, 1, 2, 1]), torch.tensor(parent)
    p = torch.stack([table.reshape(-1, 3)[0] for table in tables(3, 6)])
    relations, flags = kinship(parent), torch.ones(5, dtype=torch.bool)
    wanted = tokenwise.tree.regions(p, (), tokens, parent, flags, False)
    threshold, correction = regions_of_chosen(p, tokens, parent, relations)
    torch.testing.assert_close(threshold, wanted.threshold)
    for node in range(6):
        torch.testing.assert_close(correction(torch.tensor(node)), wanted.correction[node])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "way"), PAIRS)
def test_200_000_trials_have_the_law_of_the_target(rule, way):
    """Trees drafted by their way, accepted by their rule: two tokens against their exact law."""
    trials, target, draft = 200_000, tables(1, 3), tables(2, 3)
    parent = [0, 0, 1, 1]
    p_of = lambda n, text: target[n].reshape(-1, 3).index_select(0, text.reshape(1))[0]
    q_of = lambda n, text: draft[n].reshape(-1, 3).index_select(0, text.reshape(1))[0]

    def pick(key, q):
        """Two children of one node, and the row that the rule is given."""
        order = q.argsort(descending=True)
        noise = fa.random.gumbel(key, (2, 3), torch.float64)
        if way == "top":
            return order[:2], q
        if way == "mixed":
            rest = torch.where(torch.arange(3) == order[0], 0, q)
            rest = rest / rest.sum()
            return torch.stack([(rest.log() + noise[0]).argmax(), order[0]]), rest
        if way == "independent":
            return (q.log() + noise).argmax(-1), q
        return (q.log() + noise[0]).topk(2).indices, q

    def one(key):
        keys = fa.split(key, 4)
        first, root = pick(keys[0], draft[0])
        second, below = pick(keys[1], q_of(1, first[0]))
        at = torch.cat([first, first[0] * 3 + second])
        p = torch.stack(
            [target[0], *(p_of(1, x) for x in at[:2].unbind()), *(p_of(2, x) for x in at[2:])]
        )
        q = torch.stack([root, below, *[root] * 3])
        done = accept_tree(
            *(keys[2], p, () if way == "top" else q, torch.cat([first, second])),
            torch.tensor(parent),
            certain=torch.tensor(certain(parent, way)),
            rule=RULES[rule],
            replacement=way == "independent",
            check=False,
        )
        # a second token where none was written
        more = fa.random.categorical(keys[3], p_of(1, done.tokens[0]).log())
        return done.tokens[0] * 3 + torch.where(done.count > 0, done.tokens[1], more)

    seen = torch.bincount(vmap(one)(fa.split(fa.key(7), trials)), minlength=9).double()
    wanted = trials * acceptances.joint(target[:2]).reshape(-1)
    # chi-square with 8 degrees of freedom at 1 - 1e-6
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 42.7


def test_a_rule_without_trees_and_flags_of_another_kind_are_refused():
    p = torch.full((3, 4), 0.25)
    given = (fa.key(0), p, p, torch.tensor([0, 1]), torch.tensor([0, 0]))
    with pytest.raises(TypeError, match="accept_tree: rule should be one with a rule for trees"):
        accept_tree(*given, rule=blockwise._replace(tree=()))
    with pytest.raises(ValueError, match="accept_tree: certain should be bool"):
        accept_tree(*given, certain=torch.tensor([1, 0]))
