"""Trees of drafts write what generate writes, in fewer rounds than chains."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import caches, drafters, sampling
from funcattn.speculation import speculate, stream, tokenwise

SMALL = fa.Config(vocabulary=24, layers=2, width=16, heads=2, head_size=8, feed_forward=32)
PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4])
PENALTIES = sampling.chain(sampling.repetition_penalty(1.2), sampling.no_repeat_ngram(3))


def some(config=SMALL, seed=0, scale=3.0):
    """A decoder in float64, in which one token or several at once agree but for the last bits."""
    model = fa.decoder(config)
    return model, fa.cast(torch.float64)(fa.tree.map(lambda w: scale * w, model.init(fa.key(seed))))


def noisy(params, share):
    """A worse model of the same text."""
    leaves = fa.tree.leaves(params)
    keys = iter(fa.split(fa.key(9), len(leaves)))
    return fa.tree.map(
        lambda w: (
            w + share * w.std(correction=0) * fa.random.normal(next(keys), tuple(w.shape), w.dtype)
        ),
        params,
    )


def each(model, params, share=0.2):
    worse = drafters.model(model, noisy(params, share))
    other = drafters.model(fa.decoder(model.config), noisy(params, share))
    return {
        "a shape": drafters.tree(worse, branching=(3, 2, 1)),
        "a shape with a past of its own": drafters.tree(other, branching=(2, 2)),
        "grown": drafters.tree(worse, nodes=6, depth=3, width=3),
        "grown with a past of its own": drafters.tree(other, nodes=5, depth=4, width=2),
        "drawn": drafters.tree(
            worse, branching=(2, 2, 1), children="drawn", sampler=sampling.temperature(0.8)
        ),
        "mixed": drafters.tree(other, branching=(3, 1), children="mixed", sampler=PENALTIES),
        "without a layer": drafters.tree(drafters.skip(model, params, [1]), branching=(4, 2)),
        "a spine": drafters.tree(
            worse, branching=(3, 2, 2, 2), width=1, confidence=0.9, least=0.02
        ),
        "a spine with a past of its own": drafters.tree(
            other, branching=(2, 2, 1, 1), width=1, confidence=0.7
        ),
    }


def slow(*values):
    """A parameter of a test that runs with the slow ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


NAMES = list(each(*some()))


@pytest.mark.parametrize("name", NAMES)
def test_under_greedy_the_tokens_are_those_of_generate(name):
    model, params = some()
    wanted, wanted_past = fa.generate(fa.key(0), model, params, PROMPT, steps=14)
    got, past = speculate(fa.key(0), model, params, each(model, params)[name], PROMPT, steps=14)
    assert got.tokens.tolist() == wanted.tolist()
    assert int(past.length) == int(wanted_past.length)
    n = int(past.length)
    torch.testing.assert_close(past.k[..., :n, :], wanted_past.k[..., :n, :])
    # a token a round, and those accepted; the last may be cut
    assert int(got.stats.rounds) + int(got.stats.accepted) in (13, 14)
    assert int(got.stats.accepted) > 0


def test_a_spine_is_the_chain_of_first_choices_and_their_siblings():
    model, params = some()
    chain = drafters.model(fa.decoder(SMALL), noisy(params, 1.0), length=4)
    n, last = torch.tensor(len(PROMPT)), torch.tensor(7)
    first = chain.propose(fa.key(0), last, chain.init(PROMPT, n, 8))[0].tokens.tolist()
    text, path = torch.cat([PROMPT, torch.tensor([7])]), []
    for token in first:
        row = model.extend(noisy(params, 1.0), text, ())[0][-1].log_softmax(-1)
        path.append(float(row[token]) + (path[-1] if path else 0))
        text = torch.cat([text, torch.tensor([token])])
    for stop in (0.0, *(min(1.0, math.exp(p) + 1e-9) for p in path)):
        drafter = drafters.tree(chain, branching=(2, 3, 2, 2), width=1, confidence=stop)
        draft, _ = drafter.propose(fa.key(0), last, drafter.init(PROMPT, n, 8))
        depth = next((i for i, p in enumerate(path, 1) if math.exp(p) < stop), 4)
        count = [0, 2, 5, 7, 9][depth]
        parent = [0, 0, 1, 1, 1, 3, 3, 6, 6]
        assert int(draft.valid) == count
        assert draft.parent.tolist() == [*parent[:count], *[-1] * (9 - count)]
        spine = [draft.tokens.tolist()[i] for i in (0, 2, 5, 7)]
        assert spine[:depth] == first[:depth]


def test_improbable_siblings_are_left_out():
    """The tree is that without `least`, with every other node in its order."""
    model, params = some()
    worse = drafters.model(fa.decoder(SMALL), noisy(params, 1.0))
    n, last = torch.tensor(len(PROMPT)), torch.tensor(7)

    def paths(**options):
        drafter = drafters.tree(worse, branching=(3, 3, 2), width=1, **options)
        draft, _ = drafter.propose(fa.key(0), last, drafter.init(PROMPT, n, 8))
        found = [()]
        for token, above in zip(draft.tokens.tolist(), draft.parent.tolist(), strict=True):
            if above >= 0:
                found.append((*found[above], token))
        assert int(draft.valid) == len(found) - 1
        return found[1:]

    def chance(path):
        text = torch.cat([PROMPT, torch.tensor([7, *path])])
        rows = model.extend(noisy(params, 1.0), text, ())[0][len(PROMPT) :].log_softmax(-1)
        return math.exp(sum(float(row[token]) for row, token in zip(rows, path, strict=False)))

    whole, lengths = paths(), set()
    spine = [whole[0], whole[3], whole[6]]
    for least in (1e-9, *(chance(path) + 1e-12 for path in whole[1:3]), 0.5):
        wanted = [path for path in whole if path in spine or chance(path) >= least]
        assert paths(least=least) == wanted
        lengths.add(len(wanted))
    assert len(lengths) > 2


def test_rows_whose_trees_end_early_are_single_ones():
    model, params = some()
    prompts, lengths = torch.stack([PROMPT, PROMPT.flip(0)]), torch.tensor([11, 4])
    one = lambda prompt, n: speculate(
        *(fa.key(0), model, params, each(model, params, 1.0)["a spine"], prompt),
        steps=9,
        prompt_length=n,
        sampler=sampling.temperature(0.7),
    )[0]
    rows = vmap(one)(prompts, lengths)
    for i in range(2):
        whole = one(prompts[i][: lengths[i]], lengths[i])
        assert rows.tokens[i].tolist() == whole.tokens.tolist()
        assert [int(x[i]) for x in rows.stats] == [int(x) for x in whole.stats]


def test_a_tree_keeps_more_than_its_first_branch():
    model, params = some()
    worse = drafters.model(model, noisy(params, 1.0), length=3)
    rounds = {}
    for name, drafter in {
        "chain": worse,
        "thin": drafters.tree(worse, branching=(1, 1, 1)),
        "tree": drafters.tree(worse, branching=(4, 2, 2)),
        "grown": drafters.tree(worse, nodes=20, depth=3, width=4),
    }.items():
        done, _ = speculate(fa.key(0), model, params, drafter, PROMPT, steps=24)
        rounds[name] = int(done.stats.rounds)
    assert rounds["thin"] == rounds["chain"]
    assert rounds["tree"] < rounds["chain"]
    assert rounds["grown"] < rounds["chain"]


@pytest.mark.parametrize(
    "options", [{}, {"children": "mixed"}, {"width": 1, "confidence": 0.01, "least": 0.2}], ids=str
)
def test_a_draft_depends_on_the_text_alone(options):
    """Whatever was drafted before: what was kept is observed once, and the rest never."""
    model, params = some()
    add = lambda token, counts: counts + torch.nn.functional.one_hot(token, 24)
    counted = sampling.Sampler(
        lambda V: torch.zeros(V, dtype=torch.int64),
        lambda logits, counts: (logits + 3.0 * counts, counts),
        add,
        observe_prompt=lambda tokens, length, counts: (
            counts + tokens[: int(length)].bincount(minlength=24)
        ),
    )
    drafter = drafters.tree(
        drafters.model(fa.decoder(SMALL), params),
        branching=(2, 2),
        sampler=counted,
        **options,
    )
    n, last, text = torch.tensor(len(PROMPT)), torch.tensor(7), PROMPT
    state = drafter.init(PROMPT, n, 12)
    for count in (1, 2, 3, 1):
        draft, state = drafter.propose(fa.key(1), last, state)
        text = torch.cat([text, last.reshape(1)])
        fresh = drafter.init(text[:-1], torch.tensor(len(text) - 1), 12)
        wanted, _ = drafter.propose(fa.key(1), last, fresh)
        assert draft.tokens.tolist() == wanted.tokens.tolist()
        child = draft.parent.tolist().index(1) if 1 in draft.parent.tolist() else 0
        path = [int(draft.tokens[0]), int(draft.tokens[child]), 5]
        written = torch.tensor(path)[: drafter.length + 1]
        state = drafter.keep(written, torch.tensor(count), state)
        text = torch.cat([text, written[: count - 1]])
        last = written[count - 1]


def test_a_sampler_is_updated_once_at_each_node_of_the_path():
    model, params = some()
    counting = sampling.Sampler(
        lambda V: torch.zeros((), dtype=torch.int64),
        lambda logits, n: (logits, n + 1),
        lambda token, n: n,
    )
    drafter = drafters.tree(
        drafters.model(fa.decoder(SMALL), params), branching=(2, 2, 1), sampler=counting
    )
    state = drafter.init(PROMPT, torch.tensor(len(PROMPT)), 12)
    draft, state = drafter.propose(fa.key(0), torch.tensor(7), state)
    first, second = draft.tokens[1], draft.tokens[4]
    assert int(draft.parent[4]) == 2
    for count in (1, 2, 3):
        written = torch.stack([first, second, first, first])
        after = drafter.keep(written, torch.tensor(count), state)
        assert int(after.states[0]) == count


def test_of_mixed_children_one_is_drawn_from_the_rest():
    model, params = some()
    drafter = each(model, params)["mixed"]
    state = drafter.init(PROMPT, torch.tensor(len(PROMPT)), 4)
    for key in fa.split(fa.key(0), 5):
        draft, _ = drafter.propose(key, torch.tensor(7), state)
        assert draft.certain.tolist() == [False, True, True, False, False, False]
        assert len(set(draft.tokens[:3].tolist())) == 3
        root = draft.probs[0]
        assert root[draft.tokens[1:3]].tolist() == [0, 0]
        assert float(root[draft.tokens[0]]) > 0
        torch.testing.assert_close(root.sum(), torch.ones((), dtype=root.dtype))


def test_the_grown_nodes_are_the_most_probable_of_those_that_grow():
    model, params = some()
    drafter = drafters.tree(drafters.model(fa.decoder(SMALL), params), nodes=7, depth=2, width=3)
    n, last = torch.tensor(len(PROMPT)), PROMPT[-1]
    state = drafter.init(PROMPT, n - 0, 4)
    draft, _ = drafter.propose(fa.key(0), torch.tensor(7), state)
    log_probs = lambda text: model.extend(params, text, ())[0][-1].log_softmax(-1)
    text = torch.cat([PROMPT, torch.tensor([7])])
    first = log_probs(text)
    scores = {(int(x),): float(first[x]) for x in first.topk(3).indices}
    for (x,), score in list(scores.items()):
        second = log_probs(torch.cat([text, torch.tensor([x])]))
        scores |= {(x, int(y)): score + float(second[y]) for y in second.topk(3).indices}
    wanted = sorted(scores, key=scores.get, reverse=True)[:7]
    paths = [()]
    for token, above in zip(draft.tokens.tolist(), draft.parent.tolist(), strict=True):
        paths.append((*paths[above], token))
    assert set(paths[1:]) == set(wanted)
    assert last == 4


@pytest.mark.parametrize("name", ["grown with a past of its own", *map(slow, ["a shape", "mixed"])])
def test_a_sampler_with_a_state_follows_the_accepted_path_alone(name):
    model, params = some()
    sampler = sampling.chain(
        *(sampling.repetition_penalty(1.2), sampling.no_repeat_ngram(2)),
        *(sampling.dry(window=64), sampling.min_new_tokens(20, (9,)), sampling.greedy),
    )
    wanted = fa.generate(fa.key(0), model, params, PROMPT, steps=16, sampler=sampler)[0]
    drafter = each(model, params)[name]
    got = speculate(fa.key(0), model, params, drafter, PROMPT, steps=16, sampler=sampler)[0]
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.stats.accepted) > 0


@pytest.mark.parametrize("name", ["mixed", *map(slow, ["a shape", "grown"])])
def test_a_ragged_batch_is_single_ones(name):
    model, params = some()
    prompts = torch.stack([PROMPT, PROMPT.flip(0), (PROMPT + 7) % 24])
    lengths, steps, stop = torch.tensor([11, 4, 8]), 10, (7, 13)
    one = lambda key, prompt, n: speculate(
        *(key, model, params, each(model, params)[name], prompt),
        steps=steps,
        stop=stop,
        prompt_length=n,
        sampler=sampling.temperature(0.7),
    )[0]
    keys = fa.split(fa.key(4), 3)
    rows = vmap(one)(keys, prompts, lengths)
    for i in range(3):
        whole = one(keys[i], prompts[i][: lengths[i]], lengths[i])
        assert rows.tokens[i].tolist() == whole.tokens.tolist()
        assert int(rows.stats.rounds[i]) == int(whole.stats.rounds)


KINDS = {
    "dense": caches.Cache,
    "pages": caches.pages(block=4),
    "ring": caches.ring(window=40, sinks=1, tail=8),
}


@pytest.mark.parametrize(
    ("kind", "window"),
    [("ring", None), ("dense", 4), *(slow(*case) for case in [("pages", None), ("ring", 4)])],
)
def test_every_kind_of_past_that_keeps_a_draft_takes_a_tree(kind, window):
    config = dataclasses.replace(SMALL, window=4, window_layers=(True, False)) if window else SMALL
    model, params = some(config)
    empty = model.cache(64, kind=KINDS[kind], dtype=torch.float64)
    wanted, wanted_past = fa.generate(fa.key(0), model, params, PROMPT, empty, steps=12)
    drafter = drafters.tree(drafters.model(model, noisy(params, 0.3)), branching=(3, 2, 1, 1))
    got, past = speculate(fa.key(0), model, params, drafter, PROMPT, empty, steps=12)
    assert got.tokens.tolist() == wanted.tolist()
    assert 0 < int(got.stats.accepted) < int(got.stats.drafted)
    more = torch.tensor([5, 6])
    torch.testing.assert_close(
        model.extend(params, more, past)[0], model.extend(params, more, wanted_past)[0]
    )


@pytest.mark.slow
def test_a_compiled_model_reads_a_tree_in_a_compiled_step():
    model, params = some(dataclasses.replace(SMALL, window=4, window_layers=(True, False)))
    fast = fa.compile(model, backend="eager")
    drafter = drafters.suffix(nodes=4, length=3)
    got, _ = speculate(fa.key(0), fast, params, drafter, PROMPT, steps=6)
    wanted, _ = speculate(fa.key(0), model, params, drafter, PROMPT, steps=6)
    assert fa.tree.allclose(got, wanted)
    assert int(got.stats.accepted) > 0
    # the step of the root and four nodes was compiled with its mask
    assert any(not shapes[-1] for shapes in fast.stack.held[5].runs)


def test_a_past_that_forgets_within_a_draft_is_refused():
    model, params = some()
    drafter = drafters.tree(drafters.model(fa.decoder(SMALL), params), branching=(2, 1, 1))
    empty = model.cache(64, kind=caches.ring(window=3), dtype=torch.float64)
    with pytest.raises(TypeError, match="speculate: cache should be one that keeps 4 tokens"):
        speculate(fa.key(0), model, params, drafter, PROMPT, empty, steps=6)


def exact(model, params, sampler, prompt, n):
    """The law of n tokens of generate, (V,) * n."""
    V = model.config.vocabulary
    law = torch.zeros((V,) * n, dtype=torch.float64)
    for text in itertools.product(range(V), repeat=n):
        state, mass = sampling.observe_prompt(sampler, prompt, sampler.init(V)), 1.0
        logits, _ = model.extend(params, torch.cat([prompt, torch.tensor(text)]), ())
        for row, token in zip(logits[len(prompt) - 1 :], text, strict=False):
            mass = mass * sampling.log_probs(sampler)(row, state).exp()[token]
            state = sampler.observe(torch.tensor(token), sampler.update(row, state)[1])
        law[text] = mass
    return law


LAWS = ("a shape", "grown", "drawn", "mixed", "a spine")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["blockwise", "tokenwise"])
@pytest.mark.parametrize("name", LAWS)
def test_200_000_texts_have_the_law_of_the_model(name, rule):
    _check_law(name, rule, 200_000)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("mixed", "blockwise"), slow("a spine", "blockwise"), slow("grown", "tokenwise")],
)
def test_sampled_texts_have_the_law_of_the_model(name, rule):
    _check_law(name, rule, 2000)


def _check_law(name, rule, trials):
    model, params = some(fa.Config(vocabulary=3, layers=1, width=16), seed=3, scale=2.0)
    sampler = sampling.chain(sampling.repetition_penalty(1.5), sampling.frequency_penalty(0.5))
    prompt = torch.tensor([1, 0, 1])
    worse = drafters.model(model, noisy(params, 0.5))
    drafter = {
        "a shape": drafters.tree(worse, branching=(2, 1)),
        "grown": drafters.tree(worse, nodes=4, depth=2, width=2),
        "a spine": drafters.tree(worse, branching=(2, 2), width=1, confidence=0.4, least=0.2),
        "drawn": drafters.tree(worse, branching=(2, 1), children="drawn", sampler=sampler),
        "mixed": drafters.tree(worse, branching=(2, 2), children="mixed", sampler=sampler),
    }[name]
    rules = {"blockwise": fa.speculation.blockwise, "tokenwise": tokenwise}
    one = lambda key: (
        speculate(
            *(key, model, params, drafter, prompt), steps=3, sampler=sampler, rule=rules[rule]
        )[0].tokens
    )
    tokens = torch.cat([vmap(one)(keys) for keys in fa.split(fa.key(8), trials).split(5000)])
    seen = torch.bincount((tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    wanted = trials * exact(model, params, sampler, prompt, 3).reshape(-1)
    assert float(wanted.min()) > 2
    # chi-square with 26 degrees of freedom at 1 - 1e-6
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 76.2


def test_a_stream_of_a_tree_ends_in_the_middle_of_a_path():
    model, params = some()
    drafter = each(model, params, share=0.0)["a shape"]
    free = fa.generate(fa.key(0), model, params, PROMPT, steps=20)[0].tolist()
    for stop in ((free[6],), (free[9],)):
        wanted = list(fa.stream(fa.key(0), model, params, PROMPT, steps=20, stop=stop))
        pieces = list(stream(fa.key(0), model, params, drafter, PROMPT, steps=20, stop=stop))
        assert pieces[-1].tokens == wanted[-1].tokens
        assert int(pieces[-1].cache.length) == int(wanted[-1].cache.length)
