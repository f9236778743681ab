# %% [markdown]
# # Test your own kernel
#
# You wrote a kernel, it looks right on the example at hand, and the loss goes down. It may still be wrong at the edges: a row
# that sees no key, a last block that is shorter, heads that share keys, a second derivative. `funcattn.testing` holds a kernel to
# laws that have nothing to do with how it is written, and shrinks what fails to the smallest shapes that fail.

# %%
import textwrap

import matplotlib.pyplot as plt
import torch
from hypothesis import HealthCheck, find, settings
from hypothesis.errors import NoSuchExample

import funcattn as fa
from funcattn.testing import check_transforms, laws, strategies

SEARCH = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
)

# %% [markdown]
# ## A kernel
#
# The streaming softmax, block of keys after block of keys, as it would be written for an accelerator. One line of it is wrong.

# %%
BLOCK = 4


def booleans(mask, T, S):
    """Laws come with a mask of intervals, of booleans, or none."""
    if mask is None:
        return torch.ones(T, S, dtype=torch.bool)
    return mask if isinstance(mask, torch.Tensor) else mask.dense(S).unsqueeze(-3)


def streaming(q, k, v, mask, rescale):
    """(*lead, H, T, D), (*lead, K, S, D), (*lead, K, S, Dv) -> (*lead, H, T, Dv)."""
    seen = booleans(mask, q.shape[-2], k.shape[-2])
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    most, mass, out = -torch.inf, 0.0, 0.0
    for s in range(0, k.shape[-2], BLOCK):
        block = slice(s, s + BLOCK)
        logits = torch.where(
            seen[..., block], q @ k[..., block, :].mT / q.shape[-1] ** 0.5, -torch.inf
        )
        new = torch.maximum(torch.as_tensor(most).to(logits), logits.amax(-1, keepdim=True))
        shift = torch.where(new.isinf(), 0, new)
        old = torch.exp(most - shift)
        P = torch.exp(logits - shift)
        mass = mass * old + P.sum(-1, keepdim=True)
        out = out * (old if rescale else 1) + P @ v[..., block, :]
        most = new
    return torch.where(
        torch.as_tensor(mass) > 0, out / torch.where(torch.as_tensor(mass) > 0, mass, 1), 0
    )


def wrong(q, k, v, mask):
    return streaming(q, k, v, mask, rescale=False)


def right(q, k, v, mask):
    return streaming(q, k, v, mask, rescale=True)


# %% [markdown]
# ## Naive: try an example
#
# Four keys fit into a block, and in a single block nothing has to be rescaled. On this example both are right.

# %%
q, k, v = (fa.random.normal(key, (2, 4, 8), torch.float64) for key in fa.split(fa.key(0), 3))
expected = fa.attention(q, k, v, kernel="reference")
assert torch.allclose(wrong(q, k, v, None), expected)
assert torch.allclose(right(q, k, v, None), expected)

# %% [markdown]
# ## Transform: laws over drawn problems
#
# A problem is `(q, k, v, mask, key)`. hypothesis draws sizes and a key, never numbers, so what fails shrinks to small shapes. In
# a test file this is five lines (`@given(strategies.problems())`); here we ask for the smallest problem that breaks a law.


# %%
def complaint(law, kernel, problem):
    """What a law has to say about a kernel on a problem, or None."""
    try:
        law(kernel, *problem)
    except AssertionError as error:
        return str(error)


law = laws.kernels.agrees_with_the_reference
smallest = find(
    strategies.problems(),
    lambda problem: complaint(law, wrong, problem) is not None,
    settings=SEARCH,
)
print(smallest)
print()
print(textwrap.fill(complaint(law, wrong, smallest), 110))

# %% [markdown]
# One more key than a block holds, and nothing else: the shapes are the hint. The line that should rescale what was added so far
# does not.
#
# ## The mended kernel agrees
#
# Every law, on sixty problems each. A law that a kernel does not claim is left out by name; this one claims all of them.

# %%
table = {}
for each in laws.kernel:
    found = {}
    for name, kernel in (("wrong", wrong), ("right", right)):
        try:
            find(
                strategies.problems(),
                lambda problem, k=kernel, f=each: complaint(f, k, problem) is not None,
                settings=SEARCH,
            )
            found[name] = "broken"
        except NoSuchExample:
            found[name] = "kept"
    table[each.__name__] = found
    print(f"{each.__name__:<48} {found['wrong']:<8} {found['right']}")
assert all(found["right"] == "kept" for found in table.values())
assert sum(found["wrong"] == "broken" for found in table.values()) > 3

# %% [markdown]
# Most laws are kept by the wrong kernel too, on these problems: a mistake shows where a law asks about it. That is why there are
# many.
#
# ## Every nesting of transforms
#
# The kernel is plain operations, so `torch.func` goes through it. All nestings of grad, jvp and vmap to a depth, against the
# definition, in float64:

# %%
report = check_transforms(right, depth=2)
report

# %%
errors = [max(row.error, 1e-17) for row in report.rows]
figure, axes = plt.subplots(figsize=(7, 3.6), dpi=110, layout="constrained")
axes.hlines(range(len(errors)), 1e-17, errors, color="#3b6ea5", alpha=0.35)
axes.plot(errors, range(len(errors)), "o", color="#3b6ea5", markersize=5)
for bound, color, name in (
    (2**-53, "#999", "one rounding"),
    (report.tolerance, "#c8553d", "allowed"),
):
    axes.axvline(bound, color=color, linestyle="--", linewidth=1)
    axes.text(bound * 1.3, -0.4, name, color=color, fontsize=8, va="center")
axes.set_yticks(range(len(errors)), [row.nesting for row in report.rows], fontsize=8)
axes.invert_yaxis()
axes.set(
    xscale="log",
    xlim=(1e-17, 1e-8),
    xlabel="relative error",
    title="Every nesting, against the definition",
)
axes.grid(axis="x", alpha=0.3)
plt.show()

# %% [markdown]
# ## Limits
#
# - Laws are tried on examples, not proved. Small shapes find most mistakes; a mistake at block 4097 needs a test of its own.
# - What is allowed is a bound on rounding, derived from dtype, logits and lengths. In bfloat16 with large logits that is wide:
#   prove a kernel in float64 or float32 first.
# - `check_transforms` compares with plain operations under torch's own `grad` and `jvp`. A mistake of torch's would be on both
#   sides.
