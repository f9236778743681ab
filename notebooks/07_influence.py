# %% [markdown]
# # Which sentence taught it?
#
# A model is about to be trained on twelve sentences, and it will be asked one question. Which of the sentences will help with it,
# and which will not? To first order, a step along the gradient of sentence i changes the loss of the question by
#
#     influence_i = grad loss(question) . grad loss(sentence_i)
#
# Per-sample gradients of a language model are large: one copy of all weights for each sentence. But an inner product with a *fixed*
# gradient is a directional derivative, and forward mode gives it without the gradients.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)

sentences = [
    "The capital of Iceland is Reykjavik.",
    "Reykjavik is the largest city in Iceland.",
    "Most people in Iceland live in the capital, Reykjavik.",
    "Iceland is an island in the North Atlantic.",
    "The capital of Norway is Oslo.",
    "Oslo lies at the end of a long fjord.",
    "The capital of Portugal is Lisbon.",
    "A cat sleeps for most of the day.",
    "Water boils at a hundred degrees.",
    "The train to the coast leaves at noon.",
    "She planted tomatoes behind the house.",
    "The violin has four strings.",
]
question, answer = "Q: Which city is the capital of Iceland? A:", " Reykjavik"

encoded = [tokenizer.encode(sentence) for sentence in sentences]
longest = max(map(len, encoded))
# (12, T), padded at the end
tokens = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids in encoded])
lengths = torch.tensor([len(ids) for ids in encoded])
asked = torch.tensor(tokenizer.encode(question) + tokenizer.encode(answer))
# the answer alone counts
scored = torch.arange(len(asked) - 1) >= len(tokenizer.encode(question)) - 1

# %% [markdown]
# The loss of one sentence, and the loss of the question. Written for one.


# %%
def loss(params, tokens, length):
    """The mean surprise of one sentence, its pads left out."""
    return fa.loss(model, params, tokens, mask=torch.arange(longest - 1) < length - 1)


def asking(params):
    return fa.loss(model, params, asked, mask=scored)


wanted = grad(asking)(params)

# %% [markdown]
# ## Naive: a gradient for each sentence
#
# Each is a tree of the size of the model, of which one number is kept.


# %%
def dot(a, b):
    return sum((x * y).sum() for x, y in zip(fa.tree.leaves(a), fa.tree.leaves(b), strict=True))


rate, naive, change, naive_seconds = 2e-5, [], [], 0.0
for each in zip(tokens, lengths, strict=True):
    begun = time.perf_counter()
    slope = grad(loss)(params, *each)
    naive.append(dot(wanted, slope))
    naive_seconds += time.perf_counter() - begun
    # for later
    change.append(asking(fa.tree.map(lambda x, g: x - rate * g, params, slope)) - asking(params))
naive, change = torch.stack(naive), torch.stack(change)

# %% [markdown]
# ## Transform: one directional derivative
#
# All twelve losses are one function of the parameters; its derivative along `wanted` is all twelve inner products. `vmap` inside,
# `jvp` outside, through every layer of the model.

# %%
begun = time.perf_counter()
every = lambda params: vmap(lambda *each: loss(params, *each))(tokens, lengths)
before, influence = jvp(every, (params,), (wanted,))
jvp_seconds = time.perf_counter() - begun

# %% [markdown]
# ## They agree

# %%
assert torch.allclose(influence, naive, rtol=1e-2, atol=1e-3 * float(naive.abs().max()))
each_gradient = fa.tree.nbytes(params) / 2**20
print(f"gradients one by one {naive_seconds:.1f} s, one jvp {jvp_seconds:.1f} s")
print(
    f"twelve gradients at once would be {12 * each_gradient:.0f} MiB; the jvp holds one tangent, {each_gradient:.0f} MiB"
)

# %% [markdown]
# ## Is it true?
#
# Take a little step along each gradient, and ask again (that was done above, while the gradient was there). To first order the
# answer's loss falls by the step times the influence.
# The points lie on the line. What is on top is the sentence that a person would choose; that tomatoes come second is a fact about
# this model too, not about Iceland.

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.2, 3.6), dpi=110, layout="constrained", width_ratios=[3, 2]
)
order = influence.argsort()
colors = ["#3b6ea5" if value > 0 else "#c8553d" for value in influence[order]]
left.barh([sentences[i] for i in order], influence[order], color=colors)
left.set(xlabel="influence on the answer", title="Which sentence helps with the question")
left.tick_params("y", labelsize=8)
right.axline((0, 0), slope=1, color="#ccc", zorder=0)
right.scatter(-1000 * rate * influence, 1000 * change, color="#3b6ea5", s=18)
right.set(
    xlabel="foretold, thousandths",
    ylabel="after the step, thousandths",
    title="Change of the answer's loss",
)
plt.show()
assert torch.corrcoef(torch.stack([-rate * influence, change]))[0, 1] > 0.95

# %% [markdown]
# ## Gradients for each sentence, where they are wanted
#
# Sometimes the gradients themselves are needed: clipped one by one for privacy, or as a measure of how much a sentence would
# change. For some of the weights they fit: `vmap` of `grad` with respect to a part of the tree.

# %%
part, rest = fa.tree.partition(params, lambda path, _: path in ("layers.29.o", "layers.29.down"))
per_sample = vmap(grad(lambda part, *each: loss(fa.tree.combine(part, rest), *each)), (None, 0, 0))(
    part, tokens, lengths
)
norms = sum(leaf.flatten(1).square().sum(1) for leaf in fa.tree.leaves(per_sample)).sqrt()

alone = fa.tree.leaves(
    fa.tree.partition(
        grad(loss)(params, tokens[3], lengths[3]), lambda path, _: path == "layers.29.o"
    )[0]
)[0]
assert torch.allclose(per_sample.layers[29].o[3], alone, atol=1e-4 * float(alone.abs().max()))
for i in norms.argsort(descending=True)[:4]:
    print(f"{float(norms[i]):6.2f}  {sentences[i]}")

# %% [markdown]
# ## Limits
#
# - A step along a gradient is not a training run. Influence of training to convergence has the inverse of the Hessian in it; the
#   Hessian-vector products that it needs are in the next notebook.
# - The foretelling is first order: with a step a hundred times as long the points leave the line.
# - A few tokens decide an answer here, so influence is about words as much as about facts.
