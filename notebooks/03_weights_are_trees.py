# %% [markdown]
# # Weights are trees
#
# The parameters of a model are a value: a tree of named tensors. Whatever makes a model cheaper, or a little different, is a
# function from a tree to a tree, and the model is never told. Fewer bits, a few trained numbers beside the rest, ten models at
# once: each is one line, and they compose because they are functions.

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad_and_value, vmap

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)
text = torch.tensor(
    tokenizer.encode(
        "The ferry leaves at nine. By the time the fog lifts, the island is already behind it."
    )
)
fa.tree.summary(params)

# %% [markdown]
# ## Naive: round a matrix by hand
#
# Eight bits for a weight and one scale for a row is arithmetic on one matrix. The rest of the usual work is plumbing: find the
# matrices, swap their modules, teach the module to multiply.

# %%
matrix = params.layers[0].q
scale = (matrix.abs().amax(1, keepdim=True) / 127).half().float()  # scales are kept in 16 bits
by_hand = (matrix / scale).round() * scale
by_hand.shape

# %% [markdown]
# ## Transform: a tree to a tree
#
# The plumbing is the same for every scheme, so it is written once. A quantized weight is a record of codes and scales; `linear`
# dispatches on its type.

# %%
eight = fa.quantize(fa.int8)(params)
four = fa.quantize(fa.int4(group=64))(params)
eight.layers[0].q

# %% [markdown]
# ## They agree
#
# With the arithmetic by hand, and with each other where they should: a model of codes is the model of the matrices that the codes
# stand for.

# %%
assert torch.equal(fa.dequantize(eight).layers[0].q, by_hand)

eight_loss, plain_loss = fa.loss(model, eight, text), fa.loss(model, fa.dequantize(eight), text)
assert abs(eight_loss - plain_loss) < 0.02  # the fast kernel takes activations in bfloat16
print(f"loss {float(fa.loss(model, params, text)):.3f}, in eight bits {float(eight_loss):.3f}")

# %% [markdown]
# ## What it costs: the error of every matrix
#
# A report is a tree's worth of rows. As a picture: layers from left to right, kinds of matrix from top to bottom, the relative
# error of each where four bits replace thirty-two, in groups of 64.

# %%
report = fa.quantization.report(params, four)
kinds = ["q", "k", "v", "o", "gate", "up", "down"]
error = {row.path: row.error for row in report}
grid = torch.tensor(
    [[error[f"layers.{layer}.{kind}"] for layer in range(config.layers)] for kind in kinds]
)

figure, axes = plt.subplots(figsize=(7.2, 2.6), dpi=110, layout="constrained")
picture = axes.imshow(100 * grid, aspect="auto", cmap="YlGnBu")
axes.set_yticks(range(len(kinds)), kinds)
axes.set(xlabel="layer", title="int4, groups of 64: relative error of each matrix")
figure.colorbar(picture, label="%", pad=0.01)
plt.show()

size = lambda tree: fa.tree.nbytes(tree) / 2**20
print(f"{size(params):.0f} MiB -> int8 {size(eight):.0f} MiB, int4 {size(four):.0f} MiB")

# %% [markdown]
# ## A few trained numbers
#
# LoRA adds a product of two thin matrices to a weight. Here the weight below is the one in four bits: the transforms compose, and
# the gradient goes through both. Nothing but the thin matrices is trained.
#
# And an *ensemble* is `vmap`: four beginnings, four learning rates, one base that is held once. This is the same `loss`, the same
# `grad`, the same update, written for one.

# %%
STEPS = 20
rates = torch.tensor([0.1, 0.2, 0.3, 0.5])
adapt = fa.lora(4, lambda path, weight: path in ("layers.28.v", "layers.29.v", "layers.29.o"))
trained, frozen = fa.tree.partition(adapt(fa.key(0), four), fa.low_rank.is_trained)


def loss(trained, tokens):
    return fa.loss(model, fa.tree.combine(trained, frozen), tokens)


def begin(key):
    return fa.tree.partition(adapt(key, four), fa.low_rank.is_trained)[0]


def step(trained, rate):
    slope, before = grad_and_value(loss)(trained, text)
    return fa.tree.map(lambda x, g: x - rate * g, trained, slope), before


members = fa.tree.stack([begin(key) for key in fa.split(fa.key(1), 4)])
losses = []
for _ in range(STEPS):
    members, before = vmap(step)(members, rates)
    losses.append(before)

# %% [markdown]
# One member by itself goes the same way as in the ensemble.

# %%
alone = begin(fa.split(fa.key(1), 4)[2])
for _ in range(6):
    alone, _ = step(alone, rates[2])
assert abs(loss(alone, text) - losses[6][2]) < 0.02

# %%
figure, axes = plt.subplots(figsize=(5.6, 3), dpi=110, layout="constrained")
for rate, curve, color in zip(
    rates, torch.stack(losses).T, ["#8fb8d0", "#3b6ea5", "#1b3a57", "#c8553d"], strict=True
):
    axes.plot(curve, ".-", color=color, label=f"rate {rate:g}")
axes.set(
    xlabel="step",
    ylabel="loss on the text",
    ylim=(0, 6),
    title="Four adaptations at once, one base in four bits",
)
axes.legend()
axes.grid(alpha=0.3)
plt.show()
print(f"trained: {fa.tree.count(trained):,} numbers of {fa.tree.count(params):,}")

# %% [markdown]
# ## Limits
#
# - Fewer bits are less memory at once; they are more speed only where a kernel multiplies the codes. `fa.kernels` and the
#   [page on quantization](../docs/quantization.md) say where.
# - Rounding to nearest is the cheapest way to choose codes. `fa.gptq` looks at a text and loses less.
# - The error of a matrix is not the error of the model: the heat map shows where to look, a loss says what it meant.
# - `vmap` over whole trees holds them all. An ensemble of adaptations is small because the base is not mapped over.
