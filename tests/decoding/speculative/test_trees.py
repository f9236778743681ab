"""Trees of drafts lose nothing: every tree of tokens enumerated in float64, drawn without
replacement and with.
"""

import pytest
import torch
from drafted import SHAPES, proof, tables
from torch.func import grad, vmap

import funcattn as fa
from funcattn.decoding.speculative import trees as module
from funcattn.decoding.speculative.tree_rules import kinship, path_to
from funcattn.speculation import Regions, accept, accept_among, accept_tree, tokenwise, tree_pmf
from funcattn.testing.laws import acceptances


@pytest.mark.parametrize("way", ["without", "independent"])
@pytest.mark.parametrize("zeros", ["none", "target", "draft", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_has_the_law_of_the_target(shape, zeros, way):
    target, draft = (
        tables(1, 3, zeros in ("target", "both")),
        tables(2, 3, zeros in ("draft", "both")),
    )
    assert proof(SHAPES[shape], target, draft, way)[0] <= acceptances.EXACT
    assert proof(SHAPES[shape], target, target, way)[0] <= acceptances.EXACT


def test_more_candidates_keep_more_and_none_twice_is_better():
    target, draft = tables(1, 3), tables(2, 3)
    ways = {False: "without", True: "independent"}
    kept = {
        (m, r): proof([0] * m, target, draft, way)[1] for m in (1, 2, 3) for r, way in ways.items()
    }
    assert kept[1, False] == pytest.approx(kept[1, True])
    assert kept[1, False] < kept[2, True] < kept[2, False] < kept[3, False]
    # all three tokens were drawn: one of them is the target's
    assert kept[3, False] == pytest.approx(1.0)


def test_a_seeded_mistake_is_seen():
    target, draft = tables(1, 3), tables(2, 3)
    for parent in ([0, 0], [0, 1], SHAPES["pairs"]):
        assert (
            proof(
                parent, target, draft, spoil=lambda regions, p, q: regions._replace(correction=p)
            )[0]
            > 1e-3
        )
    # candidates that were drawn without replacement, taken for independent ones
    assert proof([0, 0], target, draft, "without", judged="independent")[0] > 1e-3


def some_tree(seed, parent=(0, 0, 1, 1, 2, 4), size=6):
    keys = fa.split(fa.key(seed), 3)
    M = len(parent)
    p, q = (fa.random.normal(key, (M + 1, size), torch.float64).softmax(-1) for key in keys[:2])
    return p, q, fa.random.randint(keys[2], (M,), 0, size), torch.tensor(parent)


def test_the_path_ends_at_each_node_as_often_as_its_pmf_says():
    for replacement in (False, True):
        given = some_tree(6)
        wanted = 200_000 * tree_pmf(*given, replacement=replacement)
        draws = vmap(
            lambda key, given=given, r=replacement: accept_tree(
                key, *given, replacement=r, check=False
            )
        )(fa.split(fa.key(4), 200_000))
        last = torch.where(
            draws.count > 0, draws.path.gather(-1, (draws.count - 1).clamp(min=0)[:, None])[:, 0], 0
        )
        seen = torch.bincount(last, minlength=7).double()
        likely = wanted > 5
        # expected 5 at most in each of six, and 40 has probability below 1e-2 for 30
        assert float(seen[~likely].sum()) <= 40
        statistic = float(((seen - wanted)[likely] ** 2 / wanted[likely]).sum())
        assert statistic < 38.3  # chi-square with 6 degrees of freedom at most, at 1 - 1e-6
        assert int(likely.sum()) >= 4


def test_a_walk_takes_the_first_child_that_passes_at_its_threshold():
    parent = torch.tensor([0, 0, 1, 2])
    h = torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
    below = torch.nextafter(h, torch.zeros_like(h))
    relations = kinship(parent)

    def ends(u):
        end = tokenwise.tree.end(h, u, relations)
        return int(end), int(path_to(end, relations)[1])

    assert ends(below) == (3, 2)
    # u = h = 0 does not pass
    assert ends(torch.stack([h[0], below[1], below[2], below[3]])) == (2, 1)
    assert ends(h) == (0, 0)


def test_a_chain_is_tokenwise():
    p, q, d, parent = some_tree(5, (0, 1, 2))
    regions = module._regions("test", p, q, d, parent, False, True)
    wanted = tokenwise.regions(p, q[:3], d, torch.tensor(3))
    assert isinstance(regions, Regions)
    torch.testing.assert_close(regions.threshold, wanted.threshold)
    torch.testing.assert_close(regions.correction, wanted.correction)
    for key in fa.split(fa.key(0), 20):
        assert torch.equal(
            accept_tree(key, p, q, d, parent).tokens,
            accept(key, p, q[:3], d, rule=tokenwise).tokens,
        )


def test_trees_of_a_batch_are_single_ones_and_paths_name_their_nodes():
    p, q, d, parent = some_tree(6)
    keys = fa.split(fa.key(1), 60)
    rows = vmap(lambda key: accept_tree(key, p, q, d, parent))(keys)
    for i, key in enumerate(keys):
        one = accept_tree(key, p, q, d, parent)
        assert all(torch.equal(a[i], b) for a, b in zip(rows, one, strict=True))
        n = int(one.count)
        assert one.tokens.tolist() == [
            *(int(d[node - 1]) for node in one.path[:n]),
            int(one.token),
            *[-1] * (6 - n),
        ]
        assert [int(parent[node - 1]) for node in one.path[:n]] == [0, *one.path[: n - 1].tolist()][
            :n
        ]
    assert len(set(rows.count.tolist())) >= 3
    compiled = torch.compile(accept_tree, fullgraph=True, backend="eager")(keys[0], p, q, d, parent)
    assert torch.equal(compiled.tokens, rows.tokens[0])


def test_a_path_is_what_commit_takes():
    model = fa.decoder(fa.Config())
    params, cache = model.init(fa.key(0)), model.cache(16)
    p, q, d, parent = some_tree(6)
    tried = (accept_tree(key, p, q, d, parent) for key in fa.split(fa.key(11), 50))
    done = next(done for done in tried if int(done.count) >= 2)
    n = int(done.count)
    _, delta = model.extend(params, torch.cat([torch.tensor([1]), d]), cache)
    index = torch.cat([torch.zeros(1, dtype=torch.int64), done.path])
    after = fa.commit(cache, delta, done.count + 1, index=index)
    assert int(after.length) == n + 1
    assert torch.equal(after.k[0][:, : n + 1], delta.k[0][:, index[: n + 1]])


def test_one_of_several_candidates_has_the_law_of_the_target():
    p, q = (
        (2 * fa.random.normal(key, (4,), torch.float64)).softmax(-1) for key in fa.split(fa.key(9))
    )

    def one(key):
        pick, decide = fa.split(key)
        # two without replacement
        candidates = (fa.random.gumbel(pick, (4,), torch.float64) + q.log()).topk(2).indices
        return accept_among(decide, p, q, candidates, check=False).token

    seen = torch.bincount(vmap(one)(fa.split(fa.key(2), 200_000)), minlength=4).double()
    # chi-square with 3 degrees of freedom at 1 - 1e-6
    assert float(((seen - 200_000 * p) ** 2 / (200_000 * p)).sum()) < 30.7


def test_the_pmf_of_a_tree_can_be_climbed():
    p, q, d, parent = some_tree(6)
    got = grad(lambda logits: tree_pmf(p, logits.softmax(-1), d, parent)[0])(q.log())
    assert got.isfinite().all()
    assert float(got.abs().max()) > 1e-3
    torch.testing.assert_close(tree_pmf(p, q, d, parent).sum(), torch.ones((), dtype=torch.float64))


TREE = some_tree(6)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"target": TREE[0][:6]}, ValueError, r"target should be \(N \+ 1, V\)"),
        ({"draft": TREE[1][:, :5]}, ValueError, "Target and draft need one vocabulary"),
        ({"draft": TREE[1] * 2}, ValueError, "sum to one"),
        ({"target": TREE[0].bfloat16()}, TypeError, "float32 or float64"),
        ({"proposed": TREE[2] + 6}, ValueError, "ids below V = 6"),
        ({"proposed": TREE[2][:0]}, ValueError, "M at least 1"),
        ({"parent": torch.tensor([0, 0, 3, 1, 2, 4])}, ValueError, "an earlier node, or -1"),
        ({"parent": torch.tensor([0, 0])}, ValueError, r"\(M,\) with M = 6"),
        ({"parent": TREE[3].double()}, TypeError, r"parent should be int64 \(M,\)"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(change, kind, message):
    given = dict(zip(("target", "draft", "proposed", "parent"), TREE, strict=True)) | change
    with pytest.raises(kind, match="accept_tree: .*" + message):
        accept_tree(fa.key(0), **given)
