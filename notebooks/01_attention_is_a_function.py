# %% [markdown]
# # Attention is a function
#
# Attention takes three tensors and gives one. A function can be differentiated along a direction (`jvp`), twice (a Hessian-vector
# product), mapped over anything (`vmap`), in any nesting. The fused kernels that make attention affordable have the derivatives
# that their authors wrote, which is one. Everything else falls back to the T x T matrix that they were made to avoid.
#
# `fa.attention` is that function with all of its derivatives, and none of them holds a T x T matrix.

# %%
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap

import funcattn as fa

H, T, D = 2, 48, 16
q, k, v, tangent = (
    fa.random.normal(key, (H, T, D), torch.float64) for key in fa.split(fa.key(0), 4)
)
mask = fa.masks.causal(T) & (fa.masks.window(T, 16) | fa.masks.sinks(T, 4))
mask

# %% [markdown]
# A mask is, for each query, a union of intervals of keys: linear in T, and closed under and, or, not.
#
# ## Naive: write the matrix down
#
# The definition is three lines. Every transform goes through it, and it holds `(H, T, T)` numbers, several times over where it is
# differentiated. Torch's fused kernel holds none, and stops at the first `jvp`.


# %%
def dense(q, k, v):
    logits = q @ k.mT / D**0.5
    return torch.where(mask.dense(T), logits, -torch.inf).softmax(-1) @ v


try:
    jvp(lambda q: F.scaled_dot_product_attention(q.float(), k.float(), v.float()), (q,), (tangent,))
except NotImplementedError as error:
    print(str(error).split(".")[0])

# %% [markdown]
# ## Transform: the same calls, on `fa.attention`
#
# Forward mode, reverse mode, one over the other, the whole Hessian of a few numbers, and a gradient for each of five queries.


# %%
def streaming(q, k, v):
    return fa.attention(q, k, v, mask)


def everything(attention):
    """Six derivatives of one attention."""
    loss = lambda q, k=k, v=v: attention(q, k, v).square().sum()
    temperature = lambda t: attention(q * t, k, v).sin().sum()
    return {
        "value": attention(q, k, v),
        "jvp": jvp(lambda q: attention(q, k, v), (q,), (tangent,))[1],
        "grad": grad(loss)(q),
        "hvp, forward over reverse": jvp(grad(loss), (q,), (tangent,))[1],
        "hvp, reverse over reverse": grad(lambda q: (grad(loss)(q) * tangent).sum())(q),
        "hessian of a temperature": hessian(temperature)(torch.tensor(1.0, dtype=torch.float64)),
        "vmap(grad) over queries": vmap(grad(loss))(torch.stack([q * n for n in range(5)])),
        "jvp of vmap(grad)": jvp(
            lambda v: vmap(lambda q: grad(loss)(q, k, v))(torch.stack([q, tangent])),
            (v,),
            (tangent,),
        )[1],
    }


ours, theirs = everything(streaming), everything(dense)

# %% [markdown]
# ## They agree
#
# In float64, to the last digits.

# %%
for name, value in ours.items():
    error = float((value - theirs[name]).abs().max() / theirs[name].abs().max())
    print(f"{name:<28} {error:.1e}")
    assert error < 1e-13, name  # sums of 48 terms in float64

# %% [markdown]
# ## What it costs: memory
#
# The greatest amount of memory that a Hessian-vector product takes, inputs and result included, one head of 64, in processes of
# their own (lengths rise, so the peak of a process is that of the last one). The dense route is stopped at 4096; beyond that is
# its T x T law.

# %%
PROGRAM = """
import resource, sys, torch, funcattn as fa
from torch.func import grad, jvp
kernel, lengths = sys.argv[1], [int(n) for n in sys.argv[2:]]
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
def hvp(T):
    q, t = (torch.arange(T * 64.0).mul_(0.7 + i).sin_().view(1, T, 64) for i in range(2))
    loss = lambda q: fa.attention(q, t, t, kernel=kernel).square().sum()
    return jvp(grad(loss), (q,), (t,))[1]
hvp(128)
ballast = torch.ones(2**26)  # held, so that the peak of the imports hides nothing
before = peak()
for T in lengths:
    hvp(T)
    print(T, (peak() - before) / 2**20)
"""


def measured(kernel, *lengths):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kernel, *map(str, lengths)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()]


closed = measured("flash", 1024, 2048, 4096, 8192, 16384)
matrix = measured("reference", 1024, 2048, 4096)

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=110, layout="constrained")
axes.loglog(*zip(*matrix, strict=True), "o-", color="#c8553d", label="dense")
last_T, last = matrix[-1]
beyond = [(n * last_T, last * n * n) for n in (1, 2, 4)]
axes.loglog(
    *zip(*beyond, strict=True),
    "o:",
    color="#c8553d",
    markerfacecolor="white",
    label="dense, by its law",
)
axes.loglog(*zip(*closed, strict=True), "o-", color="#3b6ea5", label="streaming")
for (x, y), side in ((beyond[-1], (-8, -4)), (closed[-1], (-8, 8))):
    text = f"{y / 1024:.1f} GiB" if y > 1024 else f"{y:.0f} MiB"
    axes.annotate(text, (x, y), xytext=side, textcoords="offset points", ha="right")
axes.set_xticks([1024, 2048, 4096, 8192, 16384], ["1k", "2k", "4k", "8k", "16k"], minor=False)
axes.set_xticks([], minor=True)
axes.set(
    xlabel="T, tokens", ylabel="MiB at the peak", title="A Hessian-vector product of attention"
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## What it costs: time
#
# In units of torch's own fused forward, causal, on this machine. Where a value or a first gradient is asked, `fa.attention` *is*
# that kernel.

# %%
T = 2048
q, k, v, tangent = (fa.random.normal(key, (4, T, 64)) for key in fa.split(fa.key(1), 4))
loss = lambda q: fa.attention(q, k, v).square().sum()
calls = {
    "torch, forward": lambda: F.scaled_dot_product_attention(q[None], k[None], v[None]),
    "forward": lambda: fa.attention(q, k, v),
    "grad": lambda: grad(loss)(q),
    "jvp": lambda: jvp(lambda q: fa.attention(q, k, v), (q,), (tangent,)),
    "hvp": lambda: jvp(grad(loss), (q,), (tangent,)),
}
seconds = {name: [] for name in calls}
for _ in range(6):  # in turns, so that a busy moment is everybody's
    for name, call in calls.items():
        begun = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - begun)
for name, times in seconds.items():
    print(f"{name:<16} {min(times) / min(seconds['torch, forward']):5.1f}")

# %% [markdown]
# Which kernel runs, and why not another, can be asked:

# %%
fa.explain(q, k, v, fa.masks.causal(T))

# %% [markdown]
# ## Limits
#
# - Memory is linear, time is not: attention over T keys is still T x T products. Blocks that a mask hides whole are skipped.
# - Derivatives beyond the first run in torch operations, block by block: on CUDA a fused kernel would be faster.
# - A row that sees no key gives zero, and zero derivatives; its log-sum-exp is minus infinity.
# - `torch.compile` of a `jvp` inside a `jvp` is refused by torch. Run that eagerly.
