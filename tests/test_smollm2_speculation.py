"""The real model: greedy speculation writes what greedy decoding writes, whoever drafts."""

import pytest
import torch

import funcattn as fa
from funcattn import drafters

CHATS = [
    "What is the capital of France? Then tell me about the city.",
    "Write a short story about a lighthouse keeper.",
    "Explain how photosynthesis works.",
    "Give me a recipe for bread.",
    "Write a Python function that sorts a list, and explain it.",
]
DRAFTERS = {
    "itself in int8": lambda model, params: drafters.model(model, fa.quantize(fa.int8)(params), length=3),
    "itself in int4": lambda model, params: drafters.model(model, fa.quantize(fa.int4(group=64))(params), length=3),
    "itself without two layers": lambda model, params: drafters.skip(model, params, (14, 15), length=2),
    "prompt lookup": lambda model, params: drafters.prompt_lookup(length=4),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    ("chats", "steps"), [(CHATS[:2], 64), pytest.param(CHATS, 256, marks=pytest.mark.slow)], ids=["2 texts of 64", "5 of 256"]
)
def test_greedy_speculation_writes_what_greedy_decoding_writes(smollm2, name, chats, steps):
    """One row and several are sums in different orders, 1e-4 apart of logits near 40: a text could only part at such a tie."""
    config, params, tokenizer = smollm2
    model = fa.decoder(config)
    for chat in chats:
        prompt = torch.tensor(tokenizer.prompt([{"role": "user", "content": chat}]))
        wanted = fa.generate(fa.key(0), model, params, prompt, steps=steps, stop=tokenizer.stop)[0]
        got, _ = fa.speculate(fa.key(0), model, params, DRAFTERS[name](model, params), prompt, steps=steps, stop=tokenizer.stop)
        assert got.tokens.tolist() == wanted.tolist()
        assert int(got.stats.rounds) <= int(got.count)
