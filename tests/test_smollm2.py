"""The real model: SmolLM2-135M against transformers on the same weights, and what many futures of
one past cost in memory.
"""

import weakref

import pytest
import torch
import transformers
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funcattn as fa
from funcattn import drafters

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = {
    "prose": lambda tokenizer: tokenizer.encode("The old lighthouse keeper opened the door and"),
    "code": lambda tokenizer: tokenizer.encode('def fibonacci(n):\n    """'),
    "chat": lambda tokenizer: tokenizer.prompt(
        [{"role": "user", "content": "Tell me about the city of Paris."}]
    ),
}


@pytest.fixture(scope="module")
def theirs(smollm2, tmp_path_factory):
    """transformers' model of the folder that fa.save wrote."""
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    fa.save(folder, *smollm2)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=PROMPTS)
def prompt(request, smollm2):
    return torch.tensor(PROMPTS[request.param](smollm2.tokenizer))


@pytest.fixture(scope="module")
def written(smollm2, prompt):
    """64 greedy tokens behind the prompt."""
    return fa.generate(fa.key(0), fa.decoder(smollm2.config), smollm2.params, prompt, steps=64)[0]


def test_greedy_ids_are_those_of_transformers(theirs, prompt, written):
    with torch.no_grad():
        ids = theirs.generate(
            prompt[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(written, ids[0, len(prompt) :])


def test_float32_logits_are_within_two_ten_thousandths_of_those_of_transformers(
    smollm2, theirs, prompt, written
):
    # Logits reach 45, where float32 steps by 4e-6, and are sums of 576 terms after 30 layers.
    # Measured: at most 7.4e-5.
    config, params, _ = smollm2
    model = fa.decoder(config)
    with torch.no_grad():
        expected = theirs(torch.cat([prompt, written])[None]).logits[0]
    begun, past = model.apply(params, prompt, model.cache(len(prompt) + len(written)))
    gone_on, _ = model.extend(params, written, past)
    torch.testing.assert_close(torch.cat([begun, gone_on]), expected, rtol=0, atol=2e-4)


def test_the_capital_of_france_is_paris(smollm2):
    config, params, tokenizer = smollm2
    pieces = fa.stream(
        *(fa.key(0), fa.decoder(config), params, torch.tensor(tokenizer.prompt(CAPITAL))),
        steps=32,
        tokenizer=tokenizer,
    )
    assert "".join(piece.text for piece in pieces) == "The capital of France is Paris."


def test_futures_under_vmap_are_those_of_a_loop(smollm2):
    config, params, tokenizer = smollm2
    model, prompt = fa.decoder(config), torch.tensor(tokenizer.encode("The sea was"))
    past = fa.generate(fa.key(0), model, params, prompt[:-1], steps=0)[1]
    sampler = fa.sampling.chain(fa.sampling.temperature(0.8), fa.sampling.top_k(50))
    go_on = lambda key: fa.generate(
        key, model, params, prompt[-1:], past, steps=5, sampler=sampler
    )[0]
    keys = fa.split(fa.key(5), 4)
    futures = vmap(go_on)(keys)
    assert torch.equal(futures, torch.stack([go_on(key) for key in keys]))
    assert len(futures.unique(dim=0)) == 4


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of all storages made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.bytes = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **options or {})
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((arguments, options))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in before:
                self._count(leaf.untyped_storage())
        return found

    def _count(self, storage):
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address):
        self.now -= self.alive.pop(address)


def test_the_meter_sees_what_is_alive_at_once_and_not_what_has_gone():
    with Peak() as peak:
        a = torch.zeros(1000)
        for _ in range(5):
            b = a + 1
            a = b.view(10, 100).reshape(-1) * 2
    # a and b at the end; the older a too, while the new one is made
    assert (peak.now, peak.bytes) == (8000, 12000)


def test_thirty_two_futures_store_their_past_once():
    config = fa.Config(layers=16, heads=2, kv_heads=2, head_size=32, vocabulary=64)
    model, T = fa.decoder(config), 1000
    params = model.init(fa.key(0))
    text = fa.random.randint(fa.key(1), (T + 1,), 0, 64)
    _, past = model.apply(params, text[:-1], model.cache(T))
    go_on = lambda key, past: fa.generate(
        key, model, params, text[-1:], past, steps=3, sampler=fa.sampling.temperature(1.0)
    )[0]
    keys = fa.split(fa.key(2), 32)
    with Peak() as shared:
        futures = vmap(go_on, (0, None))(keys, past)
    with Peak() as copied:
        each = vmap(go_on)(
            keys, fa.tree.map(lambda leaf: leaf.expand(32, *leaf.shape).clone(), past)
        )
    assert torch.equal(futures, each)
    # all their tails and activations together: not even one copy of the past
    assert shared.bytes < fa.tree.nbytes(past)
    assert copied.bytes > 32 * fa.tree.nbytes(past)


CHATS = [
    "What is the capital of France? Then tell me about the city.",
    "Write a short story about a lighthouse keeper.",
    "Explain how photosynthesis works.",
    "Give me a recipe for bread.",
    "Write a Python function that sorts a list, and explain it.",
]
DRAFTERS = {
    "itself in int8": lambda model, params: drafters.model(
        model, fa.quantize(fa.int8)(params), length=3
    ),
    "itself in int4": lambda model, params: drafters.model(
        model, fa.quantize(fa.int4(group=64))(params), length=3
    ),
    "itself without two layers": lambda model, params: drafters.skip(
        model, params, (14, 15), length=2
    ),
    "prompt lookup": lambda model, params: drafters.prompt_lookup(length=4),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    ("chats", "steps"),
    [(CHATS[:1], 64), pytest.param(CHATS, 256, marks=pytest.mark.slow)],
    ids=["a text of 64", "5 of 256"],
)
def test_greedy_speculation_writes_what_greedy_decoding_writes(smollm2, name, chats, steps):
    """One row and several are sums in different orders, 1e-4 apart of logits near 40: a text could
    only part at such a tie.
    """
    config, params, tokenizer = smollm2
    model = fa.decoder(config)
    for chat in chats:
        prompt = torch.tensor(tokenizer.prompt([{"role": "user", "content": chat}]))
        wanted = fa.generate(fa.key(0), model, params, prompt, steps=steps, stop=tokenizer.stop)[0]
        got, _ = fa.speculate(
            fa.key(0),
            model,
            params,
            DRAFTERS[name](model, params),
            prompt,
            steps=steps,
            stop=tokenizer.stop,
        )
        assert got.tokens.tolist() == wanted.tolist()
        assert int(got.stats.rounds) <= int(got.count)
