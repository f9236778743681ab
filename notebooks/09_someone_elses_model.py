# %% [markdown]
# # Someone else's model, made differentiable
#
# Most models are modules that somebody else wrote, and their attention is a call of torch's fused kernel. It has a first
# gradient. A `jvp`, a Hessian-vector product or a `vmap` of gradients raises, or falls back to a T x T matrix.
#
# Two things make such a module a function: `fa.interop.functional` splits it into a pure function and its parameters, and
# `fa.interop.override_sdpa` closes every attention inside a `with`. Nothing of the module is changed.

# %%
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch

warnings.filterwarnings("ignore", "IProgress not found")  # transformers' bars want ipywidgets
import transformers
from torch.func import grad, jvp, vmap

import funcattn as fa

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# ## nn.TransformerEncoder

# %%
torch.manual_seed(0)  # nn.Module draws its weights from torch's generator
layer = torch.nn.TransformerEncoderLayer(
    d_model=32,
    nhead=4,
    dim_feedforward=64,
    activation="gelu",
    batch_first=True,
    dtype=torch.float64,
)
encoder = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
x, tangent = (fa.random.normal(key, (2, 24, 32), torch.float64) for key in fa.split(fa.key(0)))

# %% [markdown]
# ## Naive: ask, and be refused
#
# So one takes finite differences: two evaluations, and half of the digits.

# %%
try:
    jvp(encoder, (x,), (tangent,))
except NotImplementedError as error:
    print(str(error).split(".")[0])

step = 1e-4
with torch.no_grad():
    differences = (encoder(x + step * tangent) - encoder(x - step * tangent)) / (2 * step)

# %% [markdown]
# ## Transform: the same module, inside a `with`

# %%
apply, params = fa.interop.functional(encoder)
loss = lambda params, x: apply(params, x).square().mean()

with fa.interop.override_sdpa():
    y, dy = jvp(encoder, (x,), (tangent,))
    hvp = jvp(grad(loss), (params, x), (fa.tree.map(torch.zeros_like, params), tangent))[1]
    per_sample = vmap(grad(loss), (None, 0))(params, x)

# %% [markdown]
# ## They agree
#
# With finite differences as far as those go; with torch's dense attention, which has all derivatives and every T x T, to rounding.

# %%
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
    torch.backends.mha.set_fastpath_enabled(False)
    expected = jvp(encoder, (x,), (tangent,))[1].detach()
    torch.backends.mha.set_fastpath_enabled(True)

worst = lambda x: float((x - expected).detach().abs().max())
print(f"finite differences are off by {worst(differences):.0e}, ours by {worst(dy):.0e}")
assert (dy - expected).abs().max() < 1e-12
assert (dy - differences).abs().max() < 1e-5
one = grad(loss)(params, x[1])
assert all(torch.allclose(per_sample[name][1], one[name], atol=1e-12) for name in params)

# %% [markdown]
# ## A model of Hugging Face
#
# SmolLM2 as transformers runs it, read from a folder that `fa.save` writes (the Hugging Face layout, safetensors and
# config.json). It calls torch's attention like most of its kind.

# %%
with tempfile.TemporaryDirectory() as folder:
    fa.save(folder, *fa.load("smollm2-135m"))
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        .eval()
        .requires_grad_(False)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

text = "The keeper of the old lighthouse opened the heavy door and saw the"
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    embedded = theirs.get_input_embeddings()(ids)
    logits = theirs(ids).logits[0, -1]
token = int(logits.argmax())
print(f"{text} ->{tokenizer.decode(token)}")


def surprise(embedded):
    """How unlikely the model finds its own next token, as a function of the embedded prompt."""
    return -theirs(inputs_embeds=embedded, use_cache=False).logits[0, -1].log_softmax(-1)[token]


# %% [markdown]
# How much does the answer hang on each word? The gradient says: by how far a small change of its embedding moves the loss. The
# second derivative says how far that can be trusted: along the word's own embedding v, the loss is L + t g.v + t^2/2 v.Hv. For
# each word one Hessian-vector product.

# %%
# one row for each word: its embedding, zero elsewhere
words = torch.eye(ids.shape[1])[:, None, :, None] * embedded

with fa.interop.override_sdpa():
    slope = grad(surprise)(embedded)
    first = (slope * words).sum((1, 2, 3))
    second = torch.stack(
        [(jvp(grad(surprise), (embedded,), (word,))[1] * word).sum() for word in words]
    )

# %% [markdown]
# Is it so? Shrink the embedding of a word by a tenth, run the model, and compare with what the first and the second order foretold.

# %%
t = -0.1
with torch.no_grad():
    found = torch.stack([surprise(embedded + t * word) for word in words]) - surprise(embedded)
foretold = {"first order": t * first, "second order": t * first + t * t / 2 * second}

figure, axes = plt.subplots(figsize=(7.4, 3.2), dpi=110, layout="constrained")
place = torch.arange(len(words))
axes.bar(place - 0.27, found, 0.27, color="#444", label="found")
axes.bar(place, foretold["first order"], 0.27, color="#8fb8d0", label="first order")
axes.bar(place + 0.27, foretold["second order"], 0.27, color="#3b6ea5", label="second order")
axes.set_xticks(place, [tokenizer.decode(i).strip() for i in ids[0]], rotation=40, ha="right")
axes.set(ylabel="change of the loss", title="A tenth less of one word")
axes.legend()
plt.show()

off = {name: float((value - found).abs().mean()) for name, value in foretold.items()}
print(", ".join(f"{name} is off by {value:.1e} on average" for name, value in off.items()))
assert off["second order"] < off["first order"]

# %% [markdown]
# ## Many prompts at once
#
# Under `vmap`, transformers looks at the values of its attention mask and stops. Registered as its attention, ours builds the
# mask without looking. Then per-sample gradients of a padded batch are a `vmap`.

# %%
fa.interop.register_transformers()
theirs.set_attn_implementation("funcattn")
tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(
    ["The sea is", "The mountains are high and the", "A loaf of"], padding=True, return_tensors="pt"
)
apply, params = fa.interop.functional(theirs)
name = "model.layers.29.mlp.down_proj.weight"


def loss_of(weight, ids, mask):
    """The loss of one padded prompt, as a function of one matrix."""
    logits = apply(
        params | {name: weight}, ids[None], attention_mask=mask[None], use_cache=False
    ).logits[0, :-1]
    log_p = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return -(log_p * mask[1:]).sum() / mask[1:].sum()


each = vmap(grad(loss_of), (None, 0, 0))(params[name], batch.input_ids, batch.attention_mask)
alone = grad(loss_of)(params[name], batch.input_ids[1], batch.attention_mask[1])
assert torch.allclose(each[1], alone, atol=1e-4 * float(alone.abs().max()))
print("norms of the gradients:", [f"{float(x):.2f}" for x in each.flatten(1).norm(dim=1)])

# %% [markdown]
# ## Limits
#
# - The context holds in the thread that entered it, for calls that happen inside. A `jvp` computes as it goes, so it must run
#   inside.
# - Attention dropout wants a key: `override_sdpa(key=...)`.
# - A module that writes its attention out by hand composes already, and keeps its T x T matrices.
# - Where torch has no derivative for something else in the module, that is still missing.
