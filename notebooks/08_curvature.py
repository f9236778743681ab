# %% [markdown]
# # Curvature
#
# The Hessian of a model's loss has as many rows as the model has weights. Nobody writes it down. But its product with a vector is
# a derivative of a gradient, `jvp(grad(loss))`, and from a few dozen such products Lanczos' method reads off the ends of its
# spectrum, and its shape.
#
# For a transformer that product goes through attention twice, which fused kernels refuse. Here it is a transform like any other,
# in memory linear in the length.

# %%
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.func import grad, jvp

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)
text = (
    "The lamp on the cape was lit by hand for a hundred and forty years. The keeper climbed the stairs at dusk with a can of oil, "
    "trimmed the wick, and wound the clockwork that turned the lens. In fog he rang the bell. When the current came, nobody had to "
    "climb any more."
)
tokens = torch.tensor(tokenizer.encode(text))
len(tokens)

# %% [markdown]
# ## Naive: write the Hessian down
#
# For a function of a few numbers one can. Scale each head's queries of one layer by a factor: nine numbers, a Hessian of nine by
# nine, by finite differences of gradients, the way it is done where a second derivative is not to be had.

# %%
LAYER = 24
heads, size = config.heads, config.head_size


def scaled(factors):
    """The loss where the queries of each head of a layer are multiplied by a factor."""
    q = (params.layers[LAYER].q.view(heads, size, -1) * factors[:, None, None]).flatten(0, 1)
    layers = list(params.layers)
    layers[LAYER] = layers[LAYER]._replace(q=q)
    return fa.loss(model, params._replace(layers=tuple(layers)), tokens)


one, step = torch.ones(heads), 0.05
rows = [
    (grad(scaled)(one + step * e) - grad(scaled)(one - step * e)) / (2 * step)
    for e in torch.eye(heads)
]
differences = torch.stack(rows)

# %% [markdown]
# ## Transform: a product without the matrix
#
# `hvp(v)` is the derivative of the gradient along v. For nine numbers, nine products are the Hessian.

# %%
along = lambda v: jvp(grad(scaled), (one,), (v,))[1]
exact = torch.stack([along(e) for e in torch.eye(heads)])

# %% [markdown]
# ## They agree
#
# To the accuracy of finite differences, which is what one would like to be rid of. The exact one is symmetric to rounding.

# %%
off = float((exact - differences).abs().max() / exact.abs().max())
asymmetry = float((exact - exact.mT).abs().max() / exact.abs().max())
print(f"differences are off by {off:.1%} of the greatest entry; asymmetry {asymmetry:.1e}")
assert off < 0.1
assert asymmetry < 1e-3

# %% [markdown]
# ## The spectrum of a layer's block
#
# Now all the matrices of attention in one layer: 885 thousand numbers, a Hessian of 780 billion entries. Lanczos builds an
# orthonormal basis of v, Hv, HHv, ..., in which the Hessian is a small tridiagonal matrix; its eigenvalues are those of the ends
# of the spectrum, and its eigenvectors' first entries squared are weights of a density. `fa.curvature` has it, for any part of a
# tree. Twelve products each, for an early layer and the last one.


# %%
def block(layer):
    """The weights of attention in a layer, and the loss as a function of them."""
    some, rest = fa.tree.partition(params, rf"layers\.{layer}\.[qkvo]")
    return some, lambda some: fa.loss(model, fa.tree.combine(some, rest), tokens)


spectra, seconds, PRODUCTS = {}, [], 12
for layer in (20, 29):
    some, loss = block(layer)
    begun = time.perf_counter()
    product = partial(fa.curvature.hvp, loss, some)
    spectra[layer] = fa.curvature.lanczos(fa.key(1), product, some, PRODUCTS)
    seconds.append((time.perf_counter() - begun) / PRODUCTS)
print(
    ", ".join(
        f"layer {layer}: {s:.2f} s a product" for layer, s in zip(spectra, seconds, strict=True)
    )
)

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")
for (layer, run), color in zip(spectra.items(), ["#c8553d", "#3b6ea5"], strict=True):
    values, _, weights = fa.curvature.eigenvalues(run)
    axes.vlines(values, 1e-9, weights, color=color, linewidth=1.5)
    axes.plot(
        values,
        weights,
        "o",
        color=color,
        markersize=4,
        label=f"layer {layer}, from {values[0]:.2f} to {values[-1]:.2f}",
    )
axes.set(
    yscale="log",
    xlabel="eigenvalue",
    ylabel="weight",
    title="The Hessian of the loss in one layer, by Lanczos",
)
axes.set_xscale("symlog", linthresh=0.1)
axes.axvline(0, color="#ccc", zorder=0)
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# Most of the weight is near zero: in nearly all directions the loss is flat. A few directions are sharp, and some are negative:
# the model is not at a minimum for this text. The greatest eigenvalue is the *sharpness*, which bounds the step of gradient
# descent by 2 / sharpness.
#
# Power iteration, which keeps one vector and no basis, comes near the greatest one from below.

# %%
some, loss = block(29)
v = fa.random.normal_like(fa.key(2), some)
for _ in range(10):
    v = fa.curvature.hvp(loss, some, fa.tree.scale(1 / fa.tree.norm(v), v))
sharpness = float(fa.tree.norm(v))
greatest = float(fa.curvature.eigenvalues(spectra[29]).values.abs().max())
print(f"by power iteration {sharpness:.2f}, by Lanczos {greatest:.2f}")
assert 0.7 < sharpness / greatest < 1.02

# %% [markdown]
# ## All weights
#
# Nothing above is about one layer. A product with the Hessian of all 135 million weights is the same line; the trace of the
# Hessian is the mean of v.Hv over random signs. One sign, one product:

# %%
few = tokens[:24]
begun = time.perf_counter()
product = partial(fa.curvature.hvp, lambda params: fa.loss(model, params, few), params)
trace = fa.curvature.trace(fa.key(3), product, params, draws=1)
print(f"v.Hv = {float(trace.value):.0f} for one v, {time.perf_counter() - begun:.1f} s")

# %% [markdown]
# ## Limits
#
# - Lanczos gives the ends of the spectrum well and its middle as a smear: weights are of a density, not single eigenvalues.
# - One random vector has a variance. A trace wants several; their relative error falls with the root of their number.
# - A product costs about three gradients in time. Memory is linear in the length, but the layers' activations are all held:
#   `fa.decoder(config, remat=True)` computes them again.
# - One text is one text: curvature over a data set is the mean over it.
