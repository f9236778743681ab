# %% [markdown]
# # A spectrum at length
#
# The eigenvalues of a loss's Hessian say how sharp the minimum is and how many directions matter. They come from products H v, and
# at the scale of language models those products are taken by differences of gradients, because fused attention has no second
# derivative ([Granziol and Garg 2026](https://arxiv.org/abs/2602.00816) do so, and say what it costs them). Here H v is
# `jvp(grad(loss))`, through fused attention, at 4,096 tokens. So the two can be compared.

# %%
import time
from dataclasses import replace
from functools import partial
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch.func import grad

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)
text = topics["typesseq"] + topics["typesmapping"] + topics["specialnames"]  # Python's own manual
T, LAST = 4096, 512
tokens = torch.tensor(tokenizer.encode(text)[: T + 1])
inputs, targets = tokens[:-1], tokens[1:]

# %% [markdown]
# The weights of the last layer are 3.5 million numbers. What is below them is a constant, computed once: it serves as the table of
# embeddings of a model with one layer. The loss is that of the last 512 tokens, each of which sees 3,584 or more before it.

# %%
below = f"layers.{config.layers - 2}.output"
only_hidden = model._replace(logits=lambda params, x: x)
whole, found = fa.trace(only_hidden, params, inputs, [below])
top = fa.decoder(replace(config, layers=1, vocabulary=T))


def loss_of(cast):
    """The loss as a function of the last layer's weights, computed in the dtype of a cast."""
    constants, head = cast(params._replace(embedding=found[below])), cast(params.embedding)

    def loss(layer):
        x, _ = top.hidden(constants._replace(layers=(layer,)), torch.arange(T))
        return fa.cross_entropy(x[-LAST:], head, targets[-LAST:])

    return loss


loss, layer = loss_of(fa.cast(torch.float32)), params.layers[-1]
same = fa.cross_entropy(whole[-LAST:], params.embedding, targets[-LAST:])
print(f"loss {loss(layer):.4f}, of the whole model {same:.4f}")
torch.testing.assert_close(loss(layer), same)

# %% [markdown]
# ## Naive: a difference of two gradients
#
# H v is about (g(w + e v) - g(w - e v)) / 2 e. Which e? Too large, and the third derivative is in the result; too small, and the
# difference is rounding.

# %%
norm = fa.tree.norm
v = fa.random.normal_like(fa.key(0), layer)
v = fa.tree.scale(norm(layer) / norm(v), v)  # a step of 1 would be as long as the weights are


def difference(loss, weights, v, step):
    """The product by central differences."""
    slope = lambda sign: grad(loss)(fa.tree.axpy(sign * step, v, weights))
    return fa.tree.scale(0.5 / step, fa.tree.axpy(-1.0, slope(-1.0), slope(1.0)))


steps = [1e-6, 1e-4, 1e-2, 1e-1]
begun = time.perf_counter()
differences = [difference(loss, layer, v, step) for step in steps]
seconds = (time.perf_counter() - begun) / len(steps)

# %% [markdown]
# ## Transform: a derivative of the gradient
#
# No step is chosen, and it takes less than twice as long.

# %%
begun = time.perf_counter()
product = partial(fa.curvature.hvp, loss, layer)
exact = product(v)
print(f"differences {seconds:.1f} s, exact {time.perf_counter() - begun:.1f} s a product")

# %% [markdown]
# ## They agree, where the step is right
#
# And in bfloat16, in which large models are held, no step is: moved weights are rounded to eight bits, and so are the gradients that
# are subtracted. The derivative in bfloat16 is as good as its arithmetic.

# %%
off = lambda x: float(norm(fa.tree.axpy(-1.0, fa.cast(torch.float32)(x), exact)) / norm(exact))
narrow = fa.cast(torch.bfloat16)
in_bfloat16 = loss_of(narrow)
errors = [off(x) for x in differences]
rounded = [off(difference(in_bfloat16, narrow(layer), narrow(v), step)) for step in steps[1:]]
exact_rounded = off(fa.curvature.hvp(in_bfloat16, narrow(layer), narrow(v)))
for step, error in zip(steps, errors, strict=True):
    print(f"step {step:.0e}: off by {error:.1e}")
for step, error in zip(steps[1:], rounded, strict=True):
    print(f"step {step:.0e} in bfloat16: off by {error:.1e}")
print(f"exact in bfloat16: off by {exact_rounded:.1e}")
assert min(errors) < 1e-2 < max(errors)
assert exact_rounded < min(rounded)

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")
axes.loglog(steps, errors, "o-", color="#3b6ea5", label="differences, float32")
axes.loglog(steps[1:], rounded, "o-", color="#c8553d", label="differences, bfloat16")
axes.axhline(exact_rounded, color="#c8553d", linestyle=":", label="derivative, bfloat16")
axes.set(xlabel="step, in lengths of the weights", ylabel="error of H v, relative")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## What differences miss
#
# Lanczos' method makes a small tridiagonal matrix of a few products, whose eigenvalues approach the extreme ones of H. It rests on
# the symmetry of H, which a derivative has to rounding. A difference has it only where its step is right for every vector of the
# basis: the second one already holds the sharpest direction, along which the loss bends within a thousandth of the weights'
# length, and the first one is nearly flat, so that its gradients differ by rounding alone. `fa.curvature.lanczos` checks.

# %%
PRODUCTS = 5
run = fa.curvature.lanczos(fa.key(1), product, layer, PRODUCTS)
print("exact", run)
length = norm(layer)
for step in steps:
    of_step = lambda v, step=step: fa.tree.scale(
        1 / length, difference(loss, layer, fa.tree.scale(length, v), step)
    )
    try:
        print(f"step {step:.0e}", fa.curvature.lanczos(fa.key(1), of_step, layer, PRODUCTS))
    except ValueError as error:
        print(f"step {step:.0e}", str(error).split(". ")[0])

# %%
values, bounds, weights = fa.curvature.eigenvalues(run)
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=110, layout="constrained")
axes.errorbar(values, weights, xerr=bounds, fmt="o", color="#3b6ea5", markersize=4, linewidth=1)
axes.set(
    xlabel="eigenvalue, with its bound",
    ylabel="weight",
    yscale="log",
    title=f"The Hessian of the last layer at {T:,} tokens, {PRODUCTS} products",
)
axes.set_xscale("symlog", linthresh=0.1)
axes.set_xlim(right=2 * float(values[-1]))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Limits
#
# - Five products show the greatest eigenvalue, and bound it; the density between wants some dozens, and several first vectors.
# - The last layer alone. All 135 million weights are the same lines with `fa.decoder(config, remat=128)`:
#   `benchmarks/spectrum.py` does that, keeps its state after each step, and goes on where it was ended.
# - Differences can be mended: a step for each direction, float64, or smoothing over several. Each costs more products than it saves.
