# %% [markdown]
# # Speculation without loops
#
# A step of a language model reads all of its weights to write one token. Reading several tokens in the same step costs little
# more. So a cheap draft proposes a few tokens, the model reads them at once, and a rule keeps those that it might have written
# itself. The rule is a theorem: what comes out has the law of the model, whatever the draft was.
#
# Usually this is a subsystem, with caches that are rolled back. Where the past is a value there is nothing to roll back: a
# rejected token is one that was never committed.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch.func import grad, vmap

import funcattn as fa

BLUE, PALE, RED = "#3b6ea5", "#8fb8d0", "#c8553d"

# %% [markdown]
# ## The theorem
#
# The draft has law q, the model law p. A drafted token x stays with probability min(1, p(x) / q(x)); if it does not, another is
# drawn from what p has more than q, max(p - q, 0), scaled to one. Then
#
#     P(x comes out) = q(x) min(1, p(x) / q(x)) + P(rejected) max(p(x) - q(x), 0) / Z = min(p, q) + max(p - q, 0) = p(x)
#
# because the mass that is rejected is the mass that is missing. As a picture: the blue part of p is what the draft gives, the red
# part is what the correction adds, and together they are p.

# %%
V = 9
p, q = (torch.softmax(1.3 * fa.random.normal(key, (V,)), -1) for key in fa.split(fa.key(4)))
kept = torch.minimum(p, q)

figure, axes = plt.subplots(figsize=(6.4, 3), dpi=110, layout="constrained")
x = torch.arange(V)
axes.bar(x - 0.2, q, 0.38, color="#ddd", label="q, the draft")
axes.bar(x + 0.2, kept, 0.38, color=BLUE, label="min(p, q), drafts that stay")
axes.bar(x + 0.2, p - kept, 0.38, bottom=kept, color=RED, label="max(p - q, 0), the correction")
axes.set(xticks=x, xlabel="token", ylabel="probability", title=f"accepted: {float(kept.sum()):.0%}")
axes.set_ylim(0, 1.4 * float(torch.maximum(p, q).max()))
axes.legend()
plt.show()

# %% [markdown]
# ## Naive: a loop that throws coins
#
# The textbook's loop, for N drafted tokens: accept or stop, one after the other.

# %%
N, DRAWS = 3, 20_000
# the model's law at each place
target = torch.softmax(1.2 * fa.random.normal(fa.key(1), (N + 1, V), torch.float64), -1)
draft = torch.softmax(1.2 * fa.random.normal(fa.key(2), (N, V), torch.float64), -1)  # the draft's


def loop(key, proposed):
    """Accept or stop, one token after the other; how many were kept, and the token that was written behind them."""
    coins, last = fa.split(key)
    for n, coin in enumerate(fa.random.uniform(coins, (N,), torch.float64)):
        if coin >= target[n, proposed[n]] / draft[n, proposed[n]]:
            return n, int(fa.random.categorical(last, (target[n] - draft[n]).clamp(min=0).log()))
    return N, int(fa.random.categorical(last, target[N].log()))


# %% [markdown]
# ## Transform: a function of one row, mapped
#
# `accept` is the same rule without a branch: one row, static shapes. Many rows are `vmap`, and a better rule, which looks at the
# block as a whole, is another value of `rule`.


# %%
def trial(key, rule):
    drawing, accepting = fa.split(key)
    proposed = fa.random.categorical(drawing, draft.log())
    return fa.speculation.accept(accepting, target, draft, proposed, rule=rule)


keys = fa.split(fa.key(3), DRAWS)
tokenwise = vmap(lambda key: trial(key, fa.speculation.tokenwise))(keys)
blockwise = vmap(lambda key: trial(key, fa.speculation.blockwise))(keys)

# %% [markdown]
# ## They agree
#
# With the loop, draw for draw: it threw the same coins. And with p: the first token that comes out has the law of the model,
# whichever rule was used. That is one draw of chance; `funcattn.testing` proves it by enumerating every draft and every text.

# %%
for key, count in zip(keys[:200], tokenwise.count[:200], strict=True):
    drawing, accepting = fa.split(key)
    assert loop(accepting, fa.random.categorical(drawing, draft.log()))[0] == count

for name, found in (("token by token", tokenwise), ("block", blockwise)):
    frequencies = torch.bincount(found.tokens[:, 0], minlength=V) / DRAWS
    chi_square = float(DRAWS * ((frequencies - target[0]) ** 2 / target[0]).sum())
    mean = float(found.count.double().mean())
    print(
        f"{name:<15} chi-square {chi_square:4.1f} with {V - 1} degrees of freedom, {mean:.3f} of {N} kept"
    )
    assert chi_square < 26.1  # one in a thousand is above

# %% [markdown]
# Since a law is a function, one can ask how to draft better. The chance that a drafted token stays is differentiable in the
# draft's law: climb it.


# %%
def stays(logits):
    """The chance that a draft of one token stays, over all that it may be."""
    law = logits.softmax(-1)
    pmf = vmap(
        lambda x: fa.speculation.acceptance_pmf(target[:2], law[None], x[None], check=False)
    )(torch.arange(V))
    return (law * pmf[:, 1]).sum()


logits = draft[0].log()
before = float(stays(logits))
for _ in range(30):
    logits = logits + 5 * grad(stays)(logits)
print(
    f"a drafted token stays with probability {before:.2f}, after 30 steps uphill {float(stays(logits)):.2f}"
)

# %% [markdown]
# ## A model drafts for itself
#
# SmolLM2 with its weights in few bits is a draft for SmolLM2. It reads the past of the target, so there is one prefill and one
# past. Both are compiled; the first call of each waits for the compiler and is not counted.

# %%
config, params, tokenizer = fa.load("smollm2-135m")
model = fa.compile(fa.decoder(config))
text = "The three largest cities of France are Paris, Marseille and Lyon. The three largest cities of Spain are"
prompt, steps = torch.tensor(tokenizer.encode(text)), 48


def plain():
    return fa.generate(fa.key(0), model, params, prompt, steps=steps)[0]


def drafted(drafter):
    return fa.speculate(fa.key(0), model, params, drafter, prompt, steps=steps)[0]


drafters = {
    "int4 of itself": fa.drafters.model(model, fa.quantize(fa.int4(group=64))(params), length=3),
    "the text itself": fa.drafters.prompt_lookup(length=3),
}
calls = {"no draft": plain} | {
    name: (lambda drafter=drafter: drafted(drafter)) for name, drafter in drafters.items()
}
results = {name: call() for name, call in calls.items()}  # compiles

# %% [markdown]
# Under `greedy` the law has one text, and every drafter writes it.

# %%
for name in drafters:
    assert torch.equal(results[name].tokens, results["no draft"]), name

seconds = {name: [] for name in calls}
for _ in range(3):  # in turns
    for name, call in calls.items():
        begun = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - begun)
speed = {name: steps / min(times) for name, times in seconds.items()}

figure, axes = plt.subplots(figsize=(6.4, 2.2), dpi=110, layout="constrained")
names = list(calls)[::-1]
bars = axes.barh(
    names,
    [speed[name] for name in names],
    color=[PALE if name == "no draft" else BLUE for name in names],
)
share = {
    name: "" if name == "no draft" else f", {float(results[name].stats.acceptance):.0%} kept"
    for name in names
}
axes.bar_label(bars, [f"{speed[name]:.0f}{share[name]}" for name in names], padding=4)
axes.set(
    xlabel="tokens/s, prefill included", title=f"SmolLM2-135M, {steps} tokens, on this machine"
)
axes.set_xlim(0, 1.35 * max(speed.values()))
plt.show()

# %% [markdown]
# Which of the tokens were drafted:

# %%
pieces = fa.speculation.stream(
    fa.key(0), model, params, drafters["int4 of itself"], prompt, steps=steps, tokenizer=tokenizer
)
fa.speculation.transcript(pieces, tokenizer)

# %% [markdown]
# ## Limits
#
# - A draft pays where its step costs much less than the model's. A record of few bits does only with a kernel that multiplies its
#   codes; where the bar of int4 is short on your machine, it has none.
# - Under `greedy` a token that ties with another within the rounding of float32 may come out as the other: one step and a step of
#   several add in different orders.
# - Long drafts pay only where nearly all of them stay. `stats.speedup(draft, verify)` gives the formula with your costs in it.
# - Trees verify second choices in the same step (`fa.drafters.tree`), and drafts may stop where they are unsure
#   (`confidence=0.4`): docs/speculation.md says which drafter pays when.
