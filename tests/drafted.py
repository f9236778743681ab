"""Trees of drafts enumerated in float64: the exact law of the texts that a rule writes.

All trees of tokens that a way of drafting can give are weighted with their probabilities:

    without       children drawn one after another, without the earlier ones
    independent   children drawn independently
    top           the most probable tokens, without chance
    mixed         one drawn from all but the k - 1 most probable, then these
"""

import itertools

import torch

import funcattn as fa
from funcattn.decoding.speculative import trees
from funcattn.speculation import tokenwise, tree_pmf
from funcattn.testing.laws import acceptances

V = 3
# parents of nodes 1, 2, ...: a chain, a star, two pairs, a bush, one with a missing token
SHAPES = {
    "chain": [0, 1],
    "star": [0, 0, 0],
    "pairs": [0, 0, 1, 1],
    "bush": [0, 0, 1, 2],
    "ragged": [0, -1, 1, 0],
}
WAYS = ("without", "independent", "top", "mixed")


def tables(seed, n, zeros=False, heat=2.0, size=V):
    """Random conditional probabilities of n tokens: table[i] is (V,) * (i + 1)."""
    out = []
    for depth, key in enumerate(fa.split(fa.key(seed), n)):
        law = (heat * fa.random.normal(key, (size,) * (depth + 1), torch.float64)).softmax(-1)
        if zeros:
            law = torch.where(law < law.amax(-1, keepdim=True) / 4, 0, law)
            law = law / law.sum(-1, keepdim=True)
        out.append(law)
    return out


def texts(parent, tokens):
    """The text at each node, () at the root."""
    found = [()]
    for n, above in enumerate(parent):
        found.append((*found[above], tokens[n]) if above >= 0 else ())
    return found


def certain(parent, way):
    """Which tokens are chosen without chance."""
    first = [above not in parent[:n] for n, above in enumerate(parent)]
    return [way == "top" or (way == "mixed" and not first[n]) for n in range(len(parent))]


def drawn_from(parent, q, way):
    """The probabilities that each node's children are drawn from, (M + 1, V)."""
    if way != "mixed":
        return q
    rows = q.clone()
    for node in range(len(q)):
        k = parent.count(node)
        rows[node, q[node].topk(max(k - 1, 0)).indices] = 0
    return rows / rows.sum(-1, keepdim=True).where(rows.sum(-1, keepdim=True) > 0, 1)


def chance(parent, tokens, q, way):
    """The probability of this tree, its children in order."""
    probability, left = 1.0, list(drawn_from(parent, q, way))
    size, chosen = q.shape[-1], certain(parent, way)
    for n, above in enumerate(parent):
        if above >= 0 and chosen[n]:
            rank = parent[:n].count(above) - (way == "mixed")
            probability *= float(tokens[n] == int(q[above].topk(rank + 1).indices[rank]))
            continue
        # no token, or none left to draw: whatever stands there
        if above < 0 or left[above].sum() == 0:
            probability /= size
            continue
        probability *= float(left[above][tokens[n]])
        if way != "independent" and probability > 0:
            rest = left[above].clone()
            rest[tokens[n]] = 0
            left[above] = rest / rest.sum() if rest.sum() > 0 else rest
    return probability


def written(parent, target, draft, way, regions, pmf):
    """(V,) * n: enumerate trees, where each ends and what follows, and complete with the target.

    Also the mean number of drafted tokens that are accepted.
    """
    size = target[0].shape[-1]
    total = torch.zeros((size,) * len(target), dtype=torch.float64)
    kept = 0.0
    for tokens in itertools.product(range(size), repeat=len(parent)):
        nodes = texts(parent, tokens)
        p = torch.stack([target[len(text)][text] for text in nodes])
        q = torch.stack([draft[len(text)][text] for text in nodes])
        probability = chance(parent, tokens, q, way)
        if probability == 0:
            continue
        given = (p, drawn_from(parent, q, way), torch.tensor(tokens), torch.tensor(parent))
        found, ends = regions(*given), pmf(*given)
        for node, text in enumerate(nodes):
            kept += probability * float(ends[node]) * len(text)
            mass = probability * ends[node] * found.correction[node]
            for law in (target[n] for n in range(len(text) + 1, len(target))):
                mass = mass.unsqueeze(-1) * (law[text] if text else law)
            total[text] += mass
    return total, kept


def proof(parent, target, draft, way="without", rule=tokenwise, judged=None, spoil=None):
    """The total variation from the target, and the mean number of accepted tokens.

    judged: the way of drafting that the rule is told of, where it is not the true one.
    """
    told = judged or way
    options = {
        "certain": torch.tensor(certain(parent, told)),
        "rule": rule,
        "replacement": told == "independent",
    }

    def regions(p, q, d, above):
        found = trees._regions(
            *("test", p, q, d, above, options["replacement"], False),
            rule=rule,
            certain=options["certain"],
        )
        return spoil(found, p, q) if spoil else found

    pmf = lambda p, q, d, above: tree_pmf(p, q, d, above, check=False, **options)
    got, kept = written(parent, target, draft, way, regions, pmf)
    return float((got - acceptances.joint(target)).abs().sum() / 2), kept
