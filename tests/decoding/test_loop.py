"""One loop for every verb of decoding: the same prompt, stops and length give the same text,
whichever verb writes it.
"""

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import caches, drafters, sampling, search, serving, speculation, tree
from funcattn.decoding.loop import is_stop, until_stop
from funcattn.records import is_absent

CONFIG = fa.Config(
    vocabulary=24, width=16, layers=2, heads=4, kv_heads=2, head_size=4, feed_forward=16
)
MODEL = fa.decoder(CONFIG)
# float64 and large weights: the same texts whether tokens are read one by one or several at once
PARAMS = tree.map(lambda x: (x if x.dim() == 1 else 8 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(2), (40,), 0, 24)
PROMPT, STEPS, N = TOKENS[:5], 12, 3
KEY = fa.key(1)
# each token but once: any of them may be the stop
NEW = sampling.chain(sampling.no_repeat_ngram(1, window=64), sampling.greedy)
WARM = sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(1.5))


def full(n=6):
    """A past of n tokens in a cache that has room for n."""
    return MODEL.apply(PARAMS, TOKENS[20 : 20 + n], MODEL.cache(n, dtype=torch.float64))[1]


PASTS = {"nothing": (), "a full cache": full(), "a branch": caches.Branch(full(), full(3))}


def perfect(past, more=0):
    """A drafter that foretells the text; with `more`, the wrong token after so many right ones of
    each draft.
    """
    text = fa.generate(KEY, MODEL, PARAMS, PROMPT, past, steps=STEPS + N, sampler=NEW)[0]
    whole = torch.cat([PROMPT, text])
    right = lambda seen, n: whole.index_select(0, (n + torch.arange(N)).clamp(max=len(whole) - 1))
    wrong = torch.arange(N) >= more if more else torch.zeros(N, dtype=torch.bool)
    return drafters.function(
        lambda seen, n: ((right(seen, n) + wrong) % 24, torch.full_like(n, N)), length=N
    )


# Verbs: (key, prompt, past, steps, stop, sampler) -> the tokens that were written, and the length
# of the past, or None.


def _generate(key, prompt, past, steps, stop, sampler):
    tokens, after = fa.generate(
        key, MODEL, PARAMS, prompt, past, steps=steps, stop=stop, sampler=sampler
    )
    n = int(until_stop(tokens, torch.tensor(steps), stop))
    # filled with the stop that was met
    assert set(tokens[n:].tolist()) <= set(tokens[n - 1 : n].tolist())
    return tokens[:n].tolist(), int(after.length)


def _padded(key, prompt, past, steps, stop, sampler):
    longer, n = torch.cat([prompt, TOKENS[:1]]), torch.tensor(len(prompt))
    one = lambda prompt, n: fa.generate(
        key,
        MODEL,
        PARAMS,
        prompt,
        past,
        steps=steps,
        stop=stop,
        sampler=sampler,
        prompt_length=n,
        chunk=3,
    )
    (tokens, other), after = vmap(one)(
        torch.stack([longer, longer.flip(0)]), torch.stack([n, n + 1])
    )
    n = int(until_stop(tokens, torch.tensor(steps), stop))
    return tokens[:n].tolist(), int(after.length[0])


def _stream(key, prompt, past, steps, stop, sampler):
    pieces = list(
        fa.stream(key, MODEL, PARAMS, prompt, past, steps=steps, stop=stop, sampler=sampler)
    )
    assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return list(pieces[-1].tokens), int(pieces[-1].cache.length)


def _speculate(draft):
    def verb(key, prompt, past, steps, stop, sampler):
        done, after = fa.speculate(
            key, MODEL, PARAMS, draft(past), prompt, past, steps=steps, stop=stop, sampler=sampler
        )
        return done.tokens[: int(done.count)].tolist(), int(after.length)

    return verb


def _drafted_stream(draft):
    def verb(key, prompt, past, steps, stop, sampler):
        given = (key, MODEL, PARAMS, draft(past), prompt, past)
        pieces = list(speculation.stream(*given, steps=steps, stop=stop, sampler=sampler))
        assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        return list(pieces[-1].tokens), int(pieces[-1].cache.length)

    return verb


def _serving(key, prompt, past, steps, stop, sampler):
    if not steps:
        return [], None
    empty = MODEL.cache(len(prompt) + steps, dtype=torch.float64)
    slots = serving.idle(MODEL, PARAMS, empty, 2, sampler=sampler, prefix=past)
    slots = serving.enter(
        key, MODEL, PARAMS, prompt, slots, 1, steps=steps, sampler=sampler, chunk=2
    )
    tokens = []
    while bool(slots.busy[1]):
        served, slots = serving.step(MODEL, PARAMS, slots, sampler=sampler, stop=stop)
        tokens.append(int(served.token[1]))
    return tokens, None


def _beams(key, prompt, past, steps, stop, sampler):
    if not steps:
        return [], None
    found = search.beam_search(
        MODEL,
        PARAMS,
        prompt,
        past,
        steps=steps,
        beams=1,
        stop=stop,
        length_penalty=0.0,
        sampler=sampler,
    )
    return found.tokens[0, : int(found.lengths[0])].tolist(), None


def _best_of(key, prompt, past, steps, stop, sampler):
    if not steps:
        return [], None
    found = search.best_of(
        key, MODEL, PARAMS, prompt, past, n=1, steps=steps, stop=stop, sampler=sampler
    )
    return found.tokens[0, : int(found.lengths[0])].tolist(), None


VERBS = {
    "generate": _generate,
    "generate, padded": _padded,
    "stream": _stream,
    "speculate, a perfect draft": _speculate(perfect),
    "speculate, a draft wrong at its end": _speculate(lambda past: perfect(past, N - 1)),
    "speculate, no draft": _speculate(
        lambda past: drafters.function(lambda seen, n: (seen[:N], 0 * n), length=N)
    ),
    "speculate, itself": _speculate(
        lambda past: drafters.model(MODEL, PARAMS, length=N, sampler=NEW)
    ),
    "speculation.stream": _drafted_stream(perfect),
    "serving": _serving,
    "beam_search": _beams,
    "best_of": _best_of,
}
# token i spends split(key, steps)[i] in all of them
SAMPLED = ("generate", "generate, padded", "stream", "serving")
WRITTEN = {name: _generate(KEY, PROMPT, past, STEPS, (), NEW)[0] for name, past in PASTS.items()}
# After the first token a round of speculation writes N drafted ones and one more.
PLACES = {
    "first": 0,
    "in a draft": N - 1,
    "last of a draft": N,
    "behind a draft": N + 1,
    "last": STEPS - 1,
}
PLACES |= {"never": None, "no stops": None}
CASES = [
    *(("nothing", end) for end in PLACES),
    ("a full cache", "in a draft"),
    ("a full cache", "never"),
    ("a branch", "no stops"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("past", "end"), CASES)
def test_every_verb_stops_at_the_same_token(verb, past, end):
    text, given, place = WRITTEN[past], PASTS[past], PLACES[end]
    assert len(set(text)) == STEPS
    absent = next(token for token in range(24) if token not in text)
    stop = () if end == "no stops" else (absent,) if place is None else (absent, text[place])
    wanted = text if place is None else text[: place + 1]
    before = tree.map(torch.clone, given)
    found, length = VERBS[verb](KEY, PROMPT, given, STEPS, stop, NEW)
    assert found == wanted
    if length is not None:  # all of the text but its last token
        assert (
            length == (0 if is_absent(given) else int(given.length)) + len(PROMPT) + len(wanted) - 1
        )
    assert tree.allclose(given, before, rtol=0, atol=0)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("steps", range(6))
def test_every_verb_writes_as_many_tokens_as_it_was_asked_for(verb, steps):
    found, length = VERBS[verb](KEY, PROMPT, (), steps, (), NEW)
    assert found == WRITTEN["nothing"][:steps]
    assert length in (None, len(PROMPT) + max(steps - 1, 0))


@pytest.mark.parametrize("verb", SAMPLED)
@pytest.mark.parametrize("past", PASTS)
def test_verbs_that_draw_draw_the_same(verb, past):
    wanted = _generate(KEY, PROMPT, PASTS[past], STEPS, (), WARM)[0]
    assert VERBS[verb](KEY, PROMPT, PASTS[past], STEPS, (), WARM)[0] == wanted
    stop = (wanted[6],)
    assert (
        VERBS[verb](KEY, PROMPT, PASTS[past], STEPS, stop, WARM)[0]
        == wanted[: wanted.index(stop[0]) + 1]
    )


def test_what_is_counted_up_to_a_stop_is_what_a_list_says():
    tokens = fa.random.randint(fa.key(3), (40, 6), 0, 4)
    for stop in ((), (2,), {0, 3}):
        for count in range(7):
            found = until_stop(tokens, torch.full((40,), count), stop)
            for row, n in zip(tokens.tolist(), found.tolist(), strict=True):
                before = [i + 1 for i, token in enumerate(row[:count]) if token in stop]
                assert n == min(before, default=count)
        assert is_stop(tokens, stop).tolist() == [
            [token in stop for token in row] for row in tokens.tolist()
        ]


CALLS = {
    "generate": lambda params=PARAMS, prompt=PROMPT, **o: fa.generate(
        KEY, MODEL, params, prompt, **{"steps": 2, **o}
    ),
    "stream": lambda params=PARAMS, prompt=PROMPT, **o: list(
        fa.stream(KEY, MODEL, params, prompt, **{"steps": 2, **o})
    ),
    "speculate": lambda params=PARAMS, prompt=PROMPT, **o: fa.speculate(
        KEY, MODEL, params, drafters.prompt_lookup(), prompt, **{"steps": 2, **o}
    ),
    "speculation.stream": lambda params=PARAMS, prompt=PROMPT, **o: list(
        speculation.stream(
            KEY, MODEL, params, drafters.prompt_lookup(), prompt, **{"steps": 2, **o}
        )
    ),
    "beam_search": lambda params=PARAMS, prompt=PROMPT, **o: fa.beam_search(
        MODEL, params, prompt, **{"steps": 2, **o}
    ),
    "best_of": lambda params=PARAMS, prompt=PROMPT, **o: fa.best_of(
        KEY, MODEL, params, prompt, **{"n": 2, "steps": 2, "sampler": WARM, **o}
    ),
}
ROOM = MODEL.cache(4, dtype=torch.float64)
MISTAKES = {
    "a batch": (
        {"prompt": TOKENS.reshape(2, 20)},
        r"prompt should be one sequence \(T,\) of token ids, got \(2, 20\)",
    ),
    "no prompt": ({"prompt": TOKENS[:0]}, r"prompt should be \(T,\) with T at least 1, got \(0,\)"),
    "a list": (
        {"prompt": [1, 2]},
        r"prompt should be one sequence \(T,\) of token ids, got a list",
    ),
    "no room": (
        {"cache": ROOM},
        "prompt should be at most the 4 tokens that the cache has room for, got 5 tokens",
    ),
    "a text for stop": ({"stop": "end"}, "stop should be ids as ints, got 'end'"),
    "an id for stop": ({"stop": 3}, "stop should be ids as ints, got 3"),
    "steps": ({"steps": -1}, "steps should be an int, .* got -1"),
    "a sampler": ({"sampler": 0.7}, "sampler should be a Sampler, got a float"),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_verb_tells_the_same_mistake_by_its_own_name(verb, mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=f"^{verb.split('.')[-1]}: {message}"):
        CALLS[verb](**options)


@pytest.mark.parametrize("verb", CALLS)
def test_no_verb_writes_from_logits_that_are_nan(verb):
    broken = PARAMS._replace(norm=PARAMS.norm * float("nan"))
    with pytest.raises(ValueError, match="got NaN"):
        CALLS[verb](params=broken)
