# %% [markdown]
# # A lens through four bits
#
# What is a model about to say, halfway through its layers? The logit lens reads an inner residual as if it were the last one. The
# **Jacobian lens** first carries it there, by the derivative of the last residual in the inner one, averaged over texts
# ([Gurnee et al. 2026](https://transformer-circuits.pub/2026/workspace/index.html)):
#
#     J_l = mean over texts and positions t of  sum over t' >= t  d h_L[t'] / d h_l[t]          logits = head(norm(J_l h_l))
#
# Row w of `head J_l` is the direction in layer l that promotes word w, here or at any later place. Derivatives are in activations, so the
# weights may stay as they are in the file, four bits each.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch.func import vjp, vmap

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
small = fa.load("smollm2-135m", keep_quantized=True).params  # blocks of four bits, as in the file
model = fa.decoder(config)
ids = lambda text: torch.tensor(tokenizer.encode(text))
size = lambda tree: fa.tree.nbytes(tree) / 2**20
print(f"{size(params):.0f} MB as float32, {size(small):.0f} MB in four bits")

texts = [
    "The lamp on the cape was lit by hand for a hundred and forty years, and the keeper climbed the stairs at dusk with oil.",
    "Bread rises because yeast turns sugar into gas, and the dough holds the gas in small bubbles until the oven sets it.",
    "She opened the letter at the kitchen table, read it twice, and put it back into its envelope without saying a word.",
    "A river that reaches the plain slows down, drops the sand that it carried, and begins to wind from side to side.",
]
texts = [ids(text) for text in texts]
cities = [
    "Paris",
    "Rome",
    "London",
    "Berlin",
    "Madrid",
    "Tokyo",
    "Moscow",
    "Dublin",
    "Athens",
    "Cairo",
]
words = torch.cat([ids(f" {city}") for city in cities])
head = (
    fa.layers.embed(params.embedding, words) * params.norm
)  # (10, E); the norm's weight is linear
SKIP = 4  # the first tokens attend to themselves, and are unlike the rest

# %% [markdown]
# ## Naive: a derivative for each layer and word
#
# The final residual as a function of one layer's; its vjp along one word, summed over later places, averaged over this one. Twelve
# of the 290 pairs of a layer and a word, for the first text.

# %%
LAST = f"layers.{config.layers - 1}.output"


def one(layer, direction, text):
    """A row of the lens, from one text."""
    name = f"layers.{layer}.output"
    x = fa.trace(model, small, text, [name])[1][name]
    final = lambda x: fa.trace(model, small, text, [LAST], changes={name: x})[1][LAST]
    places = torch.arange(len(text))[:, None]
    inside = (places >= SKIP) & (places < len(text) - 1)
    slopes = vjp(final, x)[1](torch.where(inside, direction, 0))[0]
    return slopes[SKIP:-1].mean(0)


begun = time.perf_counter()
pairs = [(layer, word) for layer in (4, 12, 20, 28) for word in (0, 1, 9)]
naive = torch.stack([one(layer, head[word], texts[0]) for layer, word in pairs])
each = (time.perf_counter() - begun) / len(pairs)

# %% [markdown]
# ## Transform: all layers in one vjp, all words by vmap
#
# Add a vector to the residual of every layer, the same at all places. The derivative of the summed final residual in these vectors is
# the double sum, for all layers at once. So a text takes one forward pass, and a backward pass for each word.

# %%
begun = time.perf_counter()
alone = fa.evaluation.jacobian_lens(model, small, texts[0], directions=head, skip=SKIP)
whole = time.perf_counter() - begun
lens = fa.evaluation.jacobian_lens(model, small, texts, directions=head, skip=SKIP)
lens

# %% [markdown]
# ## They agree
#
# With the naive rows, and with the lens through the same weights in float32.

# %%
rows = torch.stack([alone.matrices[layer, word] for layer, word in pairs])
exact = fa.evaluation.jacobian_lens(model, params, texts, directions=head, skip=SKIP)
off = lambda a, b: float((a - b).norm() / b.norm())
print(
    f"off by {off(rows, naive):.0e} from vjps one by one, by {off(lens.matrices, exact.matrices):.0e} from float32"
)
print(f"290 pairs for one text: {290 * each / whole:.0f} times as fast")
assert off(rows, naive) < 1e-4
assert off(lens.matrices, exact.matrices) < 1e-4

# %% [markdown]
# ## Where is the capital of Italy?
#
# The product of a row with the residual is a logit, up to a factor that all words share. Read it at the word *Italy*, two tokens before
# the answer is wanted. Each row of the picture is a layer; a word is blue where its logit is above the mean of the ten.


# %%
def read(vectors, country):
    """Logits (layers, places, words) of ten cities, centred, at the last two places of a prompt."""
    prompt = ids(f"The capital of {country} is")
    _, seen = fa.trace(model, small, prompt, r"layers\.\d+\.output")
    h = torch.stack([seen[f"layers.{n}.output"][-2:] for n in range(len(vectors))])
    found = torch.einsum("lpe,lwe->lpw", h, vectors)
    return found - found.mean(-1, keepdim=True)


plain = head.expand(len(lens.matrices), *head.shape)  # J = 1, the logit lens
pictures = {
    "logit lens": read(plain, "Italy")[:, 0],
    "Jacobian lens": read(lens.matrices, "Italy")[:, 0],
}

figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.6), dpi=110, sharey=True, layout="constrained")
for axis, (name, values) in zip(axes, pictures.items(), strict=True):
    shown = values / values.abs().amax(-1, keepdim=True)
    image = axis.imshow(shown, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, origin="lower")
    axis.set_xticks(range(len(cities)), cities, rotation=60, ha="right")
    axis.set(title=f"{name}, at “Italy”")
axes[0].set(ylabel="layer")
figure.colorbar(image, ax=axes, label="logit, relative to the layer's largest", shrink=0.8)
plt.show()

# %% [markdown]
# Is *Rome* an accident? Six countries, and the rank of the right city among the ten. At the country's name the Jacobian lens finds it in the
# first layers; the logit lens, which asks what *this* place would say next, does not. At the last place both find it, in the upper layers,
# where attention has carried it.

# %%
capitals = {"France": 0, "Italy": 1, "Germany": 3, "Spain": 4, "Japan": 5, "Egypt": 9}


def ranks(vectors):
    """(layers, places): the mean rank of the right city, 1 the best."""
    each = []
    for country, city in capitals.items():
        found = read(vectors, country)
        each.append(1.0 + (found > found[..., city : city + 1]).sum(-1))
    return torch.stack(each).mean(0)


carried, unmoved = ranks(lens.matrices), ranks(plain)
figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.0), dpi=110, sharey=True, layout="constrained")
for axis, place, title in zip(
    axes, (0, 1), ("at the country", "at “is”, where it is asked"), strict=True
):
    axis.plot(unmoved[:, place], color="#999", label="logit lens")
    axis.plot(carried[:, place], color="#3b6ea5", linewidth=2, label="Jacobian lens")
    axis.axhline(5.5, color="#ccc", linewidth=0.8, linestyle=":")
    axis.text(28, 5.6, "chance", color="#999", fontsize=8, ha="right", va="top")
    axis.set(title=title, xlabel="layer", ylim=(10.2, 0.6), yticks=[1, 3, 5, 7, 9])
axes[0].set(ylabel="mean rank of ten")
axes[1].legend(loc="lower right")
plt.show()
assert carried[:12, 0].mean() < 2 < unmoved[:12, 0].mean()

# %% [markdown]
# ## Push
#
# The direction of one city against the mean of the ten, added to the residual, says the word. `fa.patched` is a model in which it is
# added, and three strengths are `vmap`: three texts that share all weights, still in four bits.

# %%
LAYER = 22
paris = lens.matrices[LAYER, 0] - lens.matrices[LAYER].mean(0)
paris = paris / paris.norm()
prompt = ids("The capital of Italy is")


def steered(strength):
    louder = fa.patched(model, {f"layers.{LAYER}.output": lambda x: x + strength * paris})
    return fa.generate(fa.key(0), louder, small, prompt, steps=10)[0]


strengths = torch.tensor([0.0, 40.0, 120.0])
for strength, tokens in zip(strengths, vmap(steered)(strengths), strict=True):
    print(f"{strength:4.0f} {tokenizer.decode(tokens.tolist())!r}")

# %% [markdown]
# ## Limits
#
# - Four texts and ten words. A published lens averages a thousand texts of 128 tokens, over all E directions: `jacobian_lens(model, params, texts)` without
#   `directions`, which `fa.evaluation.logit_lens(..., lens=lens)` then reads with norm and head. It takes E backward passes a text.
# - A derivative is a first order: far from the residuals of the texts it need not hold, and a push of 120 is far.
# - In four bits a backward pass unpacks each weight again; for a few words that costs about as much as the products do.
