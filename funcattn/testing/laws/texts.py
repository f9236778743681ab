"""Laws of caches in the functions that generate texts: law(kind, size, key), as in `pasts`.

The oracle is a loop over `model.apply` with a cache of the kind, one token at a time. Texts are
longer than `size`, so that a kind that drops tokens has dropped some. Drafts are wrong on purpose:
an accepted draft is read in one forward pass with the token before it, which is another reading for
a kind that drops tokens within a pass.
"""

from typing import Any

import torch
from torch import Tensor

from ... import caches, drafters, randomness, search, serving, speculation, transformer, tree
from ...decoding import generate
from ..agreement import agree
from .pasts import D, G, K, L, where_the_key_is

CONFIG = transformer.Config(
    vocabulary=11, width=8, layers=L, heads=K * G, kv_heads=K, head_size=D, feed_forward=8
)
MORE = 5  # tokens beyond the size
# float64 through L layers: 1e-16 of each operation, and weights that amplify it by less than 10^6
ROUNDING = 1e-9
WHY = "rounding of float64 through the layers of a small model"


@where_the_key_is
def every_verb_writes_what_a_loop_over_apply_writes(kind: Any, size: int, key: Tensor) -> None:
    """generate, speculate, beam_search and serving with a cache of this kind equal the loop.

    Texts, scores and caches are those of `model.apply`, one token at a time.
    """
    law, model = every_verb_writes_what_a_loop_over_apply_writes, transformer.decoder(CONFIG)
    # Large weights, so that the text depends on the cache.
    params = tree.map(lambda weight: 3 * weight.double(), model.init(key))
    prompt, steps = (
        randomness.randint(randomness.fold_in(key, 1), (2,), 0, CONFIG.vocabulary),
        size + MORE,
    )
    empty = model.cache(size, kind=kind, dtype=torch.float64)
    room = caches.grow(empty, MORE + 2)

    def along(text: Tensor) -> Tensor:
        """Logits (steps + 1, V) of a loop: before each token of the text, and after the last."""
        logits, past = model.apply(params, prompt, room)
        rows = [logits[-1]]
        for token in text:
            logits, past = model.apply(params, token[None], past)
            rows.append(logits[-1])
        return torch.stack(rows)

    def likeliest(verb: str, text: Tensor) -> Tensor:
        logits = along(text)
        chosen = logits[:-1].gather(-1, text.unsqueeze(-1))[:, 0]
        agree(
            law,
            f"the logit of each token that {verb} wrote",
            chosen,
            logits[:-1].amax(-1),
            ROUNDING,
            f"{WHY}; they are likeliest",
        )
        return logits[-1]

    text, past = generate(key, model, params, prompt, room, steps=steps)
    last = likeliest("generate", text)
    after = lambda past: model.apply(params, text[-1:], past)[0][-1]
    agree(
        law, "the logits behind the past that generate returned", after(past), last, ROUNDING, WHY
    )

    whole = torch.cat([prompt, text, text[:1]])
    wrong = lambda seen, n: (
        (whole.index_select(0, n.reshape(1)) + 1) % CONFIG.vocabulary,
        torch.ones_like(n),
    )
    drafter = drafters.function(wrong, length=1)
    done, past = speculation.speculate(key, model, params, drafter, prompt, room, steps=steps)
    likeliest("speculate", done.tokens)
    agree(
        law, "the logits behind the past that speculate returned", after(past), last, ROUNDING, WHY
    )

    found = search.beam_search(
        model, params, prompt, room, steps=steps, beams=3, best=3, length_penalty=0.0
    )
    for tokens, score in zip(found.tokens, found.scores, strict=True):
        log_p = along(tokens)[:-1].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()
        agree(law, "the score of a beam", score, log_p, ROUNDING * steps, WHY)

    slots = serving.idle(model, params, room, 2)
    for turn in range(2):  # the second text begins in a slot that was used before
        slots, written = serving.enter(key, model, params, prompt, slots, 1, steps=steps), []
        for _ in range(steps):
            served, slots = serving.step(model, params, slots)
            written.append(served.token[1])
        likeliest(f"serving, text {turn} of a slot,", torch.stack(written))
