"""Generation against the plain loop without a cache, and what a text must keep: its past, its end,
its characters.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import caches, sampling
from funcattn.caches import Branch, Cache, Delta
from funcattn.sampling import Sampler, chain, greedy, temperature, top_k

CONFIG = fa.Config(
    vocabulary=40, width=16, layers=2, heads=4, kv_heads=2, head_size=4, feed_forward=24
)
MODEL = fa.decoder(CONFIG)
# float64 and large weights: laws are far from flat, and the same to 1e-12 by every way through
# attention
PARAMS = optree.tree_map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (40,), 0, 40)
PROMPT = TOKENS[:5]
WARM = chain(temperature(1.5), top_k(20))


def past_of(n, size=60):
    empty = MODEL.cache(size, dtype=torch.float64)
    return MODEL.apply(PARAMS, TOKENS[:n], empty)[1] if n else empty


def stack(values):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *values)


def take(tree, b):
    return optree.tree_map(lambda leaf: leaf[b], tree)


def same(a, b):
    """Bit for bit: rows that do not count may hold NaN, which equals nothing."""
    bits = lambda x: x.contiguous().view(torch.uint8) if x.dim() else x
    return all(
        torch.equal(bits(x), bits(y))
        for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    )


def last_logits(tokens):
    return MODEL.logits(PARAMS, MODEL.hidden(PARAMS, tokens)[0][-1])


def naive(key, text, steps, sampler=greedy):
    """Draw from the whole text again for each token; no cache."""
    drawn = []
    state = sampler.init(CONFIG.vocabulary)
    for i in range(steps):
        token, state = sampling.draw(fa.split(key, steps)[i], sampler, last_logits(text), state)
        text = torch.cat([text, token.unsqueeze(0)])
        drawn.append(token)
    return torch.stack(drawn)


def continues(cache, text, more=3):
    """The cache holds exactly this text: what follows has the logits of the whole."""
    assert int(cache.length) == len(text)
    room = caches.grow(cache, more)
    got = MODEL.extend(PARAMS, TOKENS[30 : 30 + more], room)[0]
    wanted = MODEL.logits(
        PARAMS, MODEL.hidden(PARAMS, torch.cat([text, TOKENS[30 : 30 + more]]))[0]
    )[len(text) :]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    return True


class Counted(NamedTuple):
    model: fa.Model
    calls: list[int]  # the number of new tokens of each call


def counted(model=MODEL):
    calls = []

    def hidden(params, tokens, *rest, **options):
        calls.append(tokens.shape[-1])
        return model.hidden(params, tokens, *rest, **options)

    return Counted(model._replace(hidden=hidden), calls)


# The plain loop.


@pytest.mark.parametrize("sampler", [greedy, WARM])
@pytest.mark.parametrize("prompt", [TOKENS[:1], PROMPT, TOKENS[:20]], ids=len)
def test_generation_is_the_loop_without_a_cache(prompt, sampler):
    wanted = naive(fa.key(7), prompt, 6, sampler)
    tokens, cache = fa.generate(fa.key(7), MODEL, PARAMS, prompt, steps=6, sampler=sampler)
    assert torch.equal(tokens, wanted)
    assert isinstance(cache, Cache)
    assert continues(cache, torch.cat([prompt, wanted[:-1]]))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_prompt_continues_the_past_that_is_given(n):
    prompt = TOKENS[n : n + 4]
    tokens, branch = fa.generate(
        fa.key(7), MODEL, PARAMS, prompt, past_of(n), steps=5, sampler=WARM
    )
    assert torch.equal(tokens, naive(fa.key(7), TOKENS[: n + 4], 5, WARM))
    assert isinstance(branch, Branch)
    assert continues(branch, torch.cat([TOKENS[: n + 4], tokens[:-1]]))


def test_fewer_steps_are_the_beginning_of_more():
    many = fa.generate(fa.key(7), MODEL, PARAMS, PROMPT, steps=8, sampler=WARM)[0]
    for steps in (0, 1, 5):
        tokens, cache = fa.generate(fa.key(7), MODEL, PARAMS, PROMPT, steps=steps, sampler=WARM)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, many[:steps])
        assert continues(cache, torch.cat([PROMPT, many[: max(steps - 1, 0)]]))


def test_the_key_decides():
    texts = [
        fa.generate(fa.key(seed), MODEL, PARAMS, PROMPT, steps=12, sampler=WARM)[0].tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 17, 22, 512])
@pytest.mark.parametrize("n", [0, 5])
def test_chunked_prefill_is_whole_prefill(n, chunk):
    model, calls = counted()
    past = past_of(n) if n else ()
    prompt = TOKENS[n : n + 22]
    tokens, cache = fa.generate(fa.key(7), model, PARAMS, prompt, past, steps=3, chunk=chunk)
    assert max(calls) == min(chunk, 22)
    assert torch.equal(tokens, naive(fa.key(7), TOKENS[: n + 22], 3))
    assert continues(cache, torch.cat([TOKENS[: n + 22], tokens[:-1]]))


def test_prefill_takes_the_logits_of_the_last_position_alone():
    rows = []
    model = MODEL._replace(
        logits=lambda params, hidden: (rows.append(hidden.dim()), MODEL.logits(params, hidden))[1]
    )
    fa.generate(fa.key(7), model, PARAMS, TOKENS, steps=2)
    assert rows == [1, 1]


def test_the_model_reads_no_token_that_nobody_asks_about():
    for steps, wanted in ((0, [5]), (1, [5]), (3, [5, 1, 1])):
        model, calls = counted()
        fa.generate(fa.key(7), model, PARAMS, PROMPT, steps=steps)
        assert calls == wanted


def test_a_sampler_sees_the_tokens_it_drew():
    once = Sampler(
        lambda V: torch.zeros(V, dtype=torch.bool),
        lambda logits, seen: (torch.where(seen, float("-inf"), logits), seen),
        lambda token, seen: seen | (torch.arange(len(seen)) == token),
    )
    run = lambda key: fa.generate(key, MODEL, PARAMS, PROMPT, steps=30, sampler=once)[0]
    assert len(set(run(fa.key(0)).tolist())) == 30
    assert all(len(set(row.tolist())) == 30 for row in vmap(run)(fa.split(fa.key(0), 2)))


# The past is a value.


def test_generation_leaves_the_past_unchanged():
    dense = past_of(7)
    branch = Branch(dense, MODEL.apply(PARAMS, TOKENS[7:9], MODEL.cache(3, dtype=torch.float64))[1])
    for past in (dense, branch):
        before = optree.tree_map(torch.clone, past)
        first = fa.generate(fa.key(1), MODEL, PARAMS, PROMPT, past, steps=6, sampler=WARM)
        assert same(past, before)
        again = fa.generate(fa.key(1), MODEL, PARAMS, PROMPT, past, steps=6, sampler=WARM)
        assert same(first, again)
        vmap(
            lambda key, past=past: fa.generate(
                key, MODEL, PARAMS, PROMPT, past, steps=6, sampler=WARM
            )
        )(fa.split(fa.key(1), 3))
        assert same(past, before)


@pytest.mark.parametrize(
    "kind",
    [Cache, caches.quantized(block=4, recent=2), caches.pages(4), caches.ring(9, tail=4)],
    ids=["dense", "codes", "pages", "ring"],
)
def test_generation_leaves_mapped_pasts_unchanged(kind):
    """Though under vmap too rows are written in place, into tails that the loop has made."""
    read = lambda n: MODEL.apply(
        PARAMS, TOKENS[:n], MODEL.cache(30, kind=kind, dtype=torch.float64)
    )[1]
    pasts, keys = stack([read(7), read(10)]), fa.split(fa.key(1), 2)
    for behind in (lambda past: past, lambda past: Branch(past_of(7), past)):
        write = lambda key, past, behind=behind: fa.generate(
            key, MODEL, PARAMS, PROMPT, behind(past), steps=9, sampler=WARM
        )
        before = optree.tree_map(torch.clone, pasts)
        got = vmap(write)(keys, pasts)[0]
        assert same(pasts, before)
        for b in range(2):
            assert torch.equal(got[b], write(keys[b], take(pasts, b))[0])


def test_the_returned_past_forks_joins_and_grows():
    tokens, branch = fa.generate(
        fa.key(1), MODEL, PARAMS, PROMPT, past_of(0), steps=4, sampler=WARM
    )
    text = torch.cat([PROMPT, tokens])
    before = optree.tree_map(torch.clone, branch)
    for past in (
        branch,
        caches.flatten(branch),
        caches.grow(branch, 3),
        Branch(branch, MODEL.cache(2, dtype=torch.float64)),
    ):
        for key in (fa.key(2), fa.key(3)):
            more, after = fa.generate(key, MODEL, PARAMS, tokens[-1:], past, steps=5, sampler=WARM)
            assert torch.equal(more, naive(key, text, 5, WARM))
            assert continues(after, torch.cat([text, more[:-1]]))
    assert same(branch, before)


def test_weights_that_require_a_gradient_generate_the_same():
    wanted = fa.generate(fa.key(1), MODEL, PARAMS, PROMPT, past_of(3), steps=4)
    params = optree.tree_map(lambda x: x.clone().requires_grad_(), PARAMS)
    tokens, cache = fa.generate(fa.key(1), MODEL, params, PROMPT, past_of(3), steps=4)
    assert torch.equal(tokens, wanted[0])
    MODEL.extend(params, tokens[-1:], cache)[0].sum().backward()
    assert params.embedding.grad.isfinite().all()


# Many by vmap.


def test_futures_of_one_shared_past_are_the_loop_and_store_it_once():
    past, keys = past_of(7), fa.split(fa.key(4), 5)
    go_on = lambda key: fa.generate(key, MODEL, PARAMS, TOKENS[7:9], past, steps=6, sampler=WARM)
    tokens, branches = vmap(go_on)(keys)
    assert branches.prefix.k.untyped_storage().data_ptr() == past.k.untyped_storage().data_ptr()
    assert branches.tail.k.shape[0] == 5
    assert caches.capacity(take(branches.tail, 0)) == 2 + 6
    for b, key in enumerate(keys):
        wanted, _ = go_on(key)
        assert torch.equal(tokens[b], wanted)
        assert continues(take(branches, b), torch.cat([TOKENS[:9], wanted[:-1]]))
    assert len({tuple(row.tolist()) for row in tokens}) == 5


def test_pasts_of_different_lengths_are_one_by_one():
    pasts = [past_of(n) for n in (0, 4, 9)]
    go_on = lambda past: fa.generate(
        fa.key(4), MODEL, PARAMS, TOKENS[20:23], past, steps=5, sampler=WARM
    )
    tokens, branches = vmap(go_on)(stack(pasts))
    for b, past in enumerate(pasts):
        assert torch.equal(tokens[b], go_on(past)[0])
        assert continues(
            take(branches, b),
            torch.cat([TOKENS[: int(past.length)], TOKENS[20:23], tokens[b, :-1]]),
        )


@pytest.mark.parametrize("T", [4, 20])
def test_prompts_and_weights_and_keys_map_as_the_loop(T):
    prompts, keys = TOKENS[: 2 * T].reshape(2, T), fa.split(fa.key(5), 2)
    ensemble = [PARAMS, optree.tree_map(lambda x: x * 1.1, PARAMS)]
    f = lambda key, params, prompt: fa.generate(key, MODEL, params, prompt, steps=4, sampler=WARM)[
        0
    ]
    got = vmap(f)(keys, stack(ensemble), prompts)
    assert torch.equal(
        got, torch.stack([f(*args) for args in zip(keys, ensemble, prompts, strict=True)])
    )
    nested = vmap(lambda prompt: vmap(lambda key: f(key, PARAMS, prompt))(keys))(prompts)
    assert torch.equal(
        nested,
        torch.stack([torch.stack([f(key, PARAMS, prompt) for key in keys]) for prompt in prompts]),
    )


RAGGED = [1, 3, 8, 20, 22]


@pytest.mark.parametrize("chunk", [3, 18, 512])
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("stops", [False, True])
def test_ragged_prompts_are_single_ones(stops, n, chunk):
    past = past_of(n) if n else ()
    # the pads are tokens like any other
    prompts = stack([torch.cat([TOKENS[n : n + T], TOKENS[: 22 - T]]) for T in RAGGED])
    lengths = torch.tensor(RAGGED)
    single = lambda key, T, stop: fa.generate(
        key, MODEL, PARAMS, TOKENS[n : n + T], past, steps=6, sampler=WARM, stop=stop
    )
    keys = fa.split(fa.key(6), len(RAGGED))
    stop = (
        (int(single(keys[1], RAGGED[1], ())[0][2]), int(single(keys[3], RAGGED[3], ())[0][3]))
        if stops
        else ()
    )

    def ragged(key, prompt, length):
        return fa.generate(
            key,
            MODEL,
            PARAMS,
            prompt,
            past,
            steps=6,
            sampler=WARM,
            stop=stop,
            prompt_length=length,
            chunk=chunk,
        )

    tokens, after = vmap(ragged)(keys, prompts, lengths)
    for b, T in enumerate(RAGGED):
        wanted, cache = single(keys[b], T, stop)
        assert torch.equal(tokens[b], wanted)
        read = int(cache.length) - n - T
        assert read == (
            wanted.tolist().index(next(t for t in wanted.tolist() if t in stop))
            if set(wanted.tolist()) & set(stop)
            else 5
        )
        assert continues(take(after, b), torch.cat([TOKENS[: n + T], wanted[:read]]))


def test_a_padded_prompt_without_vmap_is_the_short_one():
    tokens, cache = fa.generate(
        fa.key(1), MODEL, PARAMS, TOKENS[:9], steps=4, prompt_length=torch.tensor(5)
    )
    assert torch.equal(tokens, naive(fa.key(1), PROMPT, 4))
    assert continues(cache, torch.cat([PROMPT, tokens[:-1]]))


# A model that writes what it is told: the weights are the text.


def scripted():
    """The token at place i is followed by script[i + 1], whatever it is; params is the script."""
    plain = fa.decoder(fa.Config(layers=1, heads=1, kv_heads=1, head_size=2))

    def hidden(script, tokens, cache=(), **_):
        T = tokens.shape[-1]
        place = torch.arange(T) + (cache.length if len(cache) else 0)
        following = script.index_select(0, (place + 1).clamp(max=len(script) - 1))
        nothing = torch.zeros(1, T, 2)
        return torch.nn.functional.one_hot(following, 256).float(), Delta((nothing,), (nothing,))

    return plain._replace(hidden=hidden, logits=lambda script, hidden: 9 * hidden)


SCRIPTED = scripted()
START = torch.tensor([0])


def script(*ids):
    return torch.tensor([0, *ids])


def test_after_a_stop_the_rest_is_the_stop_that_was_met():
    run = lambda stop: fa.generate(
        fa.key(0), SCRIPTED, script(5, 6, 7, 8, 9), START, steps=5, stop=stop
    )
    for stop, wanted, length in (
        ((), [5, 6, 7, 8, 9], 5),
        ((7,), [5, 6, 7, 7, 7], 3),
        ((8, 6), [5, 6, 6, 6, 6], 2),
        ((5,), [5, 5, 5, 5, 5], 1),
        ((9,), [5, 6, 7, 8, 9], 5),
        ((40,), [5, 6, 7, 8, 9], 5),
    ):
        tokens, cache = run(stop)
        assert tokens.tolist() == wanted
        assert int(cache.length) == length  # the prompt, and what was read before the stop


def test_a_text_ends_early():
    model, calls = counted(SCRIPTED)
    fa.generate(fa.key(0), model, script(5, 6, 7, 8, 9), START, steps=100, stop=(7,))
    assert calls == [1, 1, 1]


def test_a_batch_ends_when_every_row_has_stopped_and_not_before():
    scripts = torch.stack([script(5, 7, 1, 1, 1), script(5, 6, 1, 7, 1), script(7, 6, 1, 1, 7)])
    model, calls = counted(SCRIPTED)
    tokens, after = vmap(
        lambda params: fa.generate(fa.key(0), model, params, START, steps=100, stop=(7,))
    )(scripts)
    assert len(calls) == 4
    assert tokens[:, :5].tolist() == [[5, 7, 7, 7, 7], [5, 6, 1, 7, 7], [7, 7, 7, 7, 7]]
    assert (tokens[:, 5:] == 7).all()
    assert after.length.tolist() == [2, 4, 1]
    for b in range(3):
        single, cache = fa.generate(fa.key(0), SCRIPTED, scripts[b], START, steps=100, stop=(7,))
        assert torch.equal(tokens[b], single)
        assert cache.length == after.length[b]


def test_a_nested_batch_ends_early_too():
    scripts = torch.stack([script(5, 7, 1, 1), script(5, 6, 7, 1)])
    model, calls = counted(SCRIPTED)
    run = lambda key, params: fa.generate(key, model, params, START, steps=50, stop=(7,))[0]
    tokens = vmap(vmap(run, (0, None)), (None, 0))(fa.split(fa.key(0), 2), scripts)
    assert len(calls) == 3
    assert tokens.shape == (2, 2, 50)


# Streams.


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may take four of them."""

    stop = (0,)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def write(text, steps=None, **options):
    """Stream a scripted text; the pieces."""
    ids = text if isinstance(text, bytes) else text.encode()
    return list(
        fa.stream(
            fa.key(0),
            SCRIPTED,
            script(*ids),
            START,
            steps=len(ids) if steps is None else steps,
            tokenizer=Bytes(),
            **options,
        )
    )


def joined(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("sampler", [greedy, WARM])
@pytest.mark.parametrize("n", [0, 4])
def test_a_stream_has_the_tokens_and_the_past_of_generate(n, sampler):
    past = past_of(n) if n else ()
    tokens, cache = fa.generate(fa.key(3), MODEL, PARAMS, PROMPT, past, steps=7, sampler=sampler)
    pieces = list(fa.stream(fa.key(3), MODEL, PARAMS, PROMPT, past, steps=7, sampler=sampler))
    assert [len(piece.tokens) for piece in pieces] == [1, 2, 3, 4, 5, 6, 7]
    assert list(pieces[-1].tokens) == tokens.tolist()
    assert [piece.ended for piece in pieces] == [False] * 6 + [True]
    assert joined(pieces) == ""
    assert type(pieces[-1].cache) is type(cache)
    for piece in pieces:  # also an older one, once the stream went on
        assert continues(
            piece.cache,
            torch.cat([TOKENS[:n], PROMPT, torch.tensor(piece.tokens[:-1], dtype=torch.int64)]),
        )


def test_a_stream_of_no_steps_is_one_empty_piece():
    (piece,) = fa.stream(
        fa.key(3), MODEL, PARAMS, PROMPT, steps=0, tokenizer=Bytes(), stop_strings=["x"]
    )
    assert (piece.text, piece.tokens, piece.ended) == ("", (), True)
    assert continues(piece.cache, PROMPT)


def test_a_character_is_written_when_it_is_whole():
    assert [piece.text for piece in write("a€😀b")] == ["a", "", "", "€", "", "", "", "😀", "b"]


def test_a_character_that_is_never_whole_is_shown_as_such():
    assert joined(write("a€", steps=3)) == "a\N{REPLACEMENT CHARACTER}"
    assert joined(write("a€".encode()[:3] + b"\0z")) == "a\N{REPLACEMENT CHARACTER}"
    assert joined(write(b"a\xffb")) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_stop_id_ends_the_stream_and_is_no_text():
    pieces = write("ab\0cd")
    assert joined(pieces) == "ab"
    assert pieces[-1].tokens == (97, 98, 0)
    assert [piece.ended for piece in pieces] == [False, False, True]
    assert joined(write("ab\0cd", stop=(ord("d"),))) == "ab\0c"
    assert joined(write("ab\0cd", stop=())) == "ab\0cd"


def test_a_stop_string_ends_the_stream_and_is_no_text():
    pieces = write("say <end> no more", stop_strings=["<end>"])
    assert joined(pieces) == "say "
    assert pieces[-1].ended
    assert bytes(pieces[-1].tokens).decode() == "say <end>"
    # the prompt, and all of it but the last token
    assert int(pieces[-1].cache.length) == len("say <end>")


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    assert [piece.text for piece in write("a<e<b", stop_strings=["<end>"])] == [
        "a",
        "",
        "",
        "<e",
        "<b",
    ]
    assert joined(write("a<en", stop_strings=["<end>"])) == "a<en"
    assert joined(write("a<en\0b", stop_strings=["<end>"])) == "a<en"


def ends(text, stop_strings):
    """Decode all tokens so far after each, and cut at the first stop string as soon as there is
    one.
    """
    ids = text.encode()
    for n in range(1, len(ids) + 1):
        decoded = ids[:n].decode("utf-8", errors="ignore")
        found = [place for place in map(decoded.find, stop_strings) if place >= 0]
        if found:
            return decoded[: min(found)]
    return text


@given(
    st.text(alphabet="aab€😀", max_size=10),
    st.lists(st.text(alphabet="aab€", min_size=1, max_size=3), max_size=3),
)
@example("aaab", ["aab"])
@example("ab", ["ab", "b"])
@example("a€b", ["€b", "€"])
def test_the_pieces_join_to_the_text_before_the_first_stop_string(text, stop_strings):
    pieces = write(text, stop_strings=stop_strings)
    assert joined(pieces) == ends(text, stop_strings)
    assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for older, newer in itertools.pairwise(pieces):
        assert newer.tokens[: len(older.tokens)] == older.tokens


# Bad input.


def broken(where):
    if where == "params":
        return PARAMS._replace(norm=PARAMS.norm * float("nan")), ()
    past = past_of(5)
    return PARAMS, past._replace(v=past.v.index_fill(-2, torch.tensor([2]), float("nan")))


@pytest.mark.parametrize("where", ["params", "the past"])
def test_nan_logits_are_an_error_and_not_a_token(where):
    params, past = broken(where)
    with pytest.raises(
        ValueError,
        match=r"generate: the logits of step 0 should be numbers, got NaN\. Look for NaN in params",
    ):
        fa.generate(fa.key(0), MODEL, params, PROMPT, past, steps=3)
    with pytest.raises(ValueError, match="got NaN"):
        list(fa.stream(fa.key(0), MODEL, params, PROMPT, past, steps=3))


def test_nan_in_one_row_of_a_batch_is_an_error():
    rows = stack([PARAMS, broken("params")[0]])
    with pytest.raises(ValueError, match="got NaN"):
        vmap(lambda params: fa.generate(fa.key(0), MODEL, params, PROMPT, steps=3)[0])(rows)


def test_a_past_that_overflowed_in_a_batch_generates_nothing():
    full = stack([past_of(3, 6), past_of(5, 6)])
    _, after = vmap(lambda past: MODEL.apply(PARAMS, TOKENS[:2], past))(full)
    with pytest.raises(ValueError, match="a past that overflowed inside a transform gives NaN too"):
        vmap(lambda past: fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, past, steps=3)[0])(after)
    with pytest.raises(ValueError, match="overflowed inside a transform"):
        fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, take(after, 1), steps=3)


def run(prompt=PROMPT, past=(), model=MODEL, params=PARAMS, key=None, **options):
    return lambda: fa.generate(
        fa.key(0) if key is None else key, model, params, prompt, past, **{"steps": 2, **options}
    )


def streamed(**options):
    return lambda: next(fa.stream(fa.key(0), MODEL, PARAMS, PROMPT, **{"steps": 2, **options}))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            run(TOKENS[:0]),
            ValueError,
            r"prompt should be \(T,\) with T at least 1, got \(0,\)\. Begin with one token",
        ),
        (
            run(TOKENS.reshape(2, 20)),
            ValueError,
            r"one sequence \(T,\) of token ids, got \(2, 20\).* vmap",
        ),
        (
            lambda: fa.generate(fa.key(0), PARAMS, MODEL, TOKENS, steps=2),
            TypeError,
            "generate: model should be from fa.decoder, got a Params",
        ),
        (
            run(TOKENS, sampler=0.7),
            TypeError,
            r"generate: sampler should be a Sampler, got a float\. Such as fa\.sampling",
        ),
        (run(TOKENS, steps="3"), ValueError, "steps should be an int, 0 or more, got '3'"),
        (run([1, 2]), ValueError, r"got a list\. Pass torch\.tensor\(tokenizer\.encode\(text\)\)"),
        (run(PROMPT.double()), TypeError, "tokens should be an integer tensor"),
        (run(torch.tensor([1, 40])), ValueError, r"ids in 0\.\.39, got 40"),
        (
            run(past=MODEL.cache(4, dtype=torch.float64)),
            ValueError,
            "at most the 4 tokens that the cache has room for, got 5 tokens",
        ),
        (
            run(past=MODEL.cache(9)._replace(length=torch.tensor(1))),
            TypeError,
            r"model\.cache\(size, dtype=torch\.float64\)",
        ),
        (run(past=[1]), TypeError, "a past such as Cache or Branch, got a list"),
        (run(steps=-1), ValueError, "steps should be an int, 0 or more, got -1"),
        (run(steps=2.0), ValueError, "steps should be an int"),
        (run(chunk=0), ValueError, "chunk should be at least 1, got 0"),
        (run(stop="\n"), TypeError, r"ids as ints.*Stop strings belong to fa\.stream"),
        (run(stop=["</s>"]), TypeError, "ids as ints"),
        (run(stop=2), TypeError, "ids as ints"),
        (run(stop=torch.tensor([2])), TypeError, "ids as ints"),
        (
            run(prompt_length=torch.tensor(6)),
            ValueError,
            "between 1 and the 5 tokens of the prompt, got 6",
        ),
        (run(prompt_length=torch.tensor(0)), ValueError, "Count the tokens before the padding"),
        (
            run(prompt_length=3),
            TypeError,
            r"an integer tensor \(\), got 3\. Pass torch\.tensor\(n\)",
        ),
        (
            run(prompt_length=torch.tensor([3])),
            TypeError,
            r"integer tensor \(\), got torch\.int64 \(1,\)",
        ),
        (run(key=0), TypeError, r"key should be one key, int64 \(2,\)"),
        (run(key=fa.split(fa.key(0))), ValueError, "vmap"),
        (streamed(stop_strings=["x"]), TypeError, "tokenizer should be given with stop_strings"),
        (streamed(stop_strings="x", tokenizer=Bytes()), TypeError, "Put a single one into a tuple"),
        (streamed(stop_strings=[""], tokenizer=Bytes()), TypeError, "none of them empty"),
        (streamed(stop_strings=[3], tokenizer=Bytes()), TypeError, "a sequence of texts"),
        (streamed(stop=5), TypeError, "stream: stop should be ids as ints, got 5"),
        (
            streamed(tokenizer="smollm2"),
            TypeError,
            "stream: tokenizer should be one that decodes, got a str",
        ),
        (
            streamed(sampler=fa.sampling.temperature),
            TypeError,
            "stream: sampler should be a Sampler, got a function",
        ),
        (streamed(steps=-1), ValueError, "stream: steps should be an int, 0 or more"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_ragged_lengths_are_checked_in_every_row():
    f = lambda length: fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, steps=2, prompt_length=length)[
        0
    ]
    with pytest.raises(ValueError, match="prompt_length should be between 1 and the 5 tokens"):
        vmap(f)(torch.tensor([5, 6]))


KINDS = {
    "pages": caches.pages(block=3),
    "ring that holds all": caches.ring(window=40, sinks=2, tail=3),
    "ring": caches.ring(window=5, sinks=1, tail=2),
    "int8": caches.quantized(bits=8, block=3, recent=2),
    "int4": caches.quantized(bits=4, block=2, recent=0),
}
EXACT = {"pages", "ring that holds all"}


def by_hand(past, prompt, steps):
    """Greedy tokens by apply alone, in a past with room for them."""
    logits, past = MODEL.apply(PARAMS, prompt, caches.grow(past, 40))
    tokens = []
    for _ in range(steps):
        tokens.append(logits[-1].argmax())
        logits, past = MODEL.apply(PARAMS, tokens[-1].reshape(1), past)
    return torch.stack(tokens)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_past_is_continued_and_left_as_it_was(name):
    prompt, key = torch.tensor([7, 8, 9, 3, 1, 4]), fa.key(0)
    _, past = MODEL.apply(PARAMS, prompt, MODEL.cache(20, kind=KINDS[name], dtype=torch.float64))
    before = optree.tree_map(torch.clone, past)
    more = torch.tensor([2, 7])
    tokens, after = fa.generate(key, MODEL, PARAMS, more, past, steps=9)
    assert torch.equal(tokens, by_hand(past, more, 9))
    if name in EXACT:
        assert torch.equal(
            tokens, fa.generate(key, MODEL, PARAMS, torch.cat([prompt, more]), steps=9)[0]
        )
    assert int(after.length) == 6 + 2 + 8
    for now, then in zip(optree.tree_leaves(past), optree.tree_leaves(before), strict=True):
        assert torch.equal(now, then)
    # and what came out goes on
    again, _ = fa.generate(key, MODEL, PARAMS, tokens[-1:], after, steps=4)
    assert torch.equal(again, by_hand(after, tokens[-1:], 4))


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_kind_end_at_their_own_stop(name):
    _, past = MODEL.apply(
        PARAMS, torch.tensor([7, 8, 9, 3]), MODEL.cache(9, kind=KINDS[name], dtype=torch.float64)
    )
    go_on = lambda key, first: fa.generate(
        key, MODEL, PARAMS, first.reshape(1), past, steps=12, sampler=WARM, stop=(1, 5, 6)
    )
    keys, firsts = fa.split(fa.key(3), 5), torch.tensor([0, 2, 4, 7, 8])
    tokens, after = vmap(go_on)(keys, firsts)
    lengths = []
    for i in range(5):
        alone, own = go_on(keys[i], firsts[i])
        assert torch.equal(tokens[i], alone)
        row = optree.tree_map(lambda leaf, i=i: leaf[i], after)
        lengths.append(int(row.length))
        assert lengths[-1] == int(own.length)
        wanted = MODEL.extend(PARAMS, torch.tensor([3]), own)[0]
        torch.testing.assert_close(MODEL.extend(PARAMS, torch.tensor([3]), row)[0], wanted)
    assert len(set(lengths)) > 1
