# %% [markdown]
# # One step from noise to shape
#
# A diffusion model walks from noise to data in many steps. MeanFlow ([arXiv:2505.13447](https://arxiv.org/abs/2505.13447)) learns the
# *average* velocity u between two times, and so walks in one: x = noise - u(noise, 0, 1). What u must satisfy is an identity between a
# function and its derivative along the path,
#
#     u(z, r, t) = v - (t - r) du/dt              du/dt = the jvp of u along (v, 0, 1)
#
# so the loss holds a **jvp of the whole network**, and training takes the **gradient of that**. Fused attention kernels have no jvp;
# with them people fall back to attention that holds T x T matrices. Here `fa.attention` has every derivative in linear memory.

# %%
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, jvp

import funcattn as fa

T, WIDTH, HEADS, LAYERS = 6, 64, 4, 2
ANGLE = torch.arange(T) * (2 * math.pi / T)


def shapes(key, n):
    """Hexagons of any turn and many sizes: (n, T, 2), a token for each corner."""
    a, b = fa.split(key)
    angle = ANGLE + 2 * math.pi * fa.random.uniform(a, (n, 1))
    radius = 1 + 0.6 * fa.random.uniform(b, (n, 1))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def initialize(key):
    """A transformer whose norms are shifted, scaled and gated by the times (DiT), all gates at zero."""
    sizes = {
        "enter": (WIDTH, 2),
        "place": (T, WIDTH),
        "time": (WIDTH, 32),
        "time_out": (WIDTH, WIDTH),
        "qkv": (LAYERS, 3 * WIDTH, WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, 4 * WIDTH, WIDTH),
        "down": (LAYERS, WIDTH, 4 * WIDTH),
        "gates": (LAYERS, 6 * WIDTH, WIDTH),
        "last": (2 * WIDTH, WIDTH),
        "leave": (2, WIDTH),
    }
    draw = lambda name, key, size: (
        torch.zeros(size)
        if name in ("gates", "last", "leave")
        else fa.random.normal(key, size) * size[-1] ** -0.5
    )
    keys = fa.split(key, len(sizes))
    return {name: draw(name, k, size) for k, (name, size) in zip(keys, sizes.items(), strict=True)}


FREQUENCIES = torch.linspace(0, math.log(30), 8).exp()
norm = lambda x: F.layer_norm(x, x.shape[-1:])  # exact here: see the limits


def velocity(params, z, r, t):
    """u (B, T, 2): the average velocity between the times r and t (B,), of z (B, T, 2) at t."""
    angles = torch.stack([t, t - r], -1)[..., None] * FREQUENCIES.to(t.dtype)
    waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
    times = F.gelu(F.gelu(waves @ params["time"].mT) @ params["time_out"].mT)[..., None, :]
    x = z @ params["enter"].mT + params["place"]
    for layer in range(LAYERS):
        shift, scale, gate, shift2, scale2, gate2 = (times @ params["gates"][layer].mT).chunk(6, -1)
        y = norm(x) * (1 + scale) + shift
        heads = (y @ params["qkv"][layer].mT).unflatten(-1, (3 * HEADS, -1)).transpose(-2, -3)
        mixed = fa.attention(*heads.chunk(3, -3)).transpose(-2, -3).flatten(-2)
        x = x + gate * (mixed @ params["out"][layer].mT)
        y = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * (F.gelu(y @ params["up"][layer].mT) @ params["down"][layer].mT)
    shift, scale = (times @ params["last"].mT).chunk(2, -1)
    return (norm(x) * (1 + scale) + shift) @ params["leave"].mT


def draw(key, n):
    """Data x, noise e, and times r <= t, equal for half of the rows (then u is the plain velocity)."""
    a, b, c, d = fa.split(key, 4)
    x = shapes(a, n)
    both = (fa.random.normal(c, (2, n)) - 0.4).sigmoid()
    t = both.amax(0)
    r = torch.where(fa.random.bernoulli(d, 0.5, (n,)), t, both.amin(0))
    return x, fa.random.normal(b, x.shape), r, t


# %% [markdown]
# ## Naive: ask torch's attention, then take differences
#
# Torch's fused attention has no forward derivative. A difference quotient costs two more evaluations and half of the digits.

# %%
key = fa.key(0)
q = fa.random.normal(key, (1, HEADS, T, 16))
try:
    jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (q,))
except NotImplementedError as error:
    print(str(error).split(".")[0])

start = initialize(key)
stirred = fa.tree.axpy(0.1, fa.random.normal_like(fa.key(8), start), start)  # no gate at zero
x, e, r, t = draw(fa.key(1), 64)
at = t[:, None, None]
z, v = (1 - at) * x + at * e, e - x


def difference(h):
    """du/dt along (v, 0, 1), by a central difference."""
    ends = [velocity(stirred, z + s * h * v, r, t + s * h) for s in (1, -1)]
    return (ends[0] - ends[1]) / (2 * h)


# %% [markdown]
# ## Transform: a jvp inside a loss, and its gradient

# %%
along = lambda params, z, v, r, t: jvp(
    lambda z, r, t: velocity(params, z, r, t),
    (z, r, t),
    (v, torch.zeros_like(r), torch.ones_like(t)),
)


def loss(params, x, e, r, t):
    """The square of what is missing in the identity; its right side is held fixed, as in the paper."""
    at = t[:, None, None]
    v = e - x
    u, du = along(params, (1 - at) * x + at * e, v, r, t)
    missing = (u - (v - (t - r)[:, None, None] * du).detach()).square().mean((1, 2))
    return (missing / (missing.detach() + 0.1).sqrt()).mean()  # large errors weigh less


# %% [markdown]
# ## They agree
#
# The derivative with differences, as far as those go, and the gradient of the whole loss with the one through dense attention, in float64.

# %%
exact = along(fa.cast(torch.float64)(stirred), *(a.double() for a in (z, v, r, t)))[1]
off = lambda a: float((a - exact).norm() / exact.norm())
steps = [10.0**-n for n in range(1, 7)]
print("differences are off by", ", ".join(f"{off(difference(h)):.0e} (h = {h:.0e})" for h in steps))
print(f"the jvp, in the same float32, by {off(along(stirred, z, v, r, t)[1]):.0e}")

wide = fa.cast(torch.float64)(stirred)
batch = tuple(a.double() for a in (x, e, r, t))
with fa.kernels.use("flash"):  # six tokens alone would take the dense route
    streamed = grad(loss)(wide, *batch)
with fa.kernels.use("reference"):
    dense = grad(loss)(wide, *batch)
worst = max(float((streamed[name] - dense[name]).norm() / dense[name].norm()) for name in dense)
print(f"gradients differ from the dense ones by {worst:.0e}")
assert worst < 1e-10

# %% [markdown]
# ## Train

# %%
STEPS, ROWS = 700, 128
optimizer = fa.training.adamw(
    fa.training.cosine(4e-3, STEPS, warmup=20), betas=(0.9, 0.98), weight_decay=0.0
)
params = averaged = initialize(fa.key(1))
state, history = optimizer.init(params), []


def error(params, x, e, r, t):
    """Of the plain velocity, u at r = t."""
    at = t[:, None, None]
    return (velocity(params, (1 - at) * x + at * e, t, t) - (e - x)).square().mean()


for number in range(STEPS):
    batch = draw(fa.fold_in(fa.key(2), number), ROWS)
    updates, state = optimizer.update(grad(loss)(params, *batch), state, params)
    params = fa.training.apply(params, updates)
    averaged = fa.tree.map(lambda a, p: 0.98 * a + 0.02 * p, averaged, params)
    if number % 20 == 19:
        history.append((number + 1, float(error(averaged, *draw(fa.key(3), 256))), None))
fa.evaluation.curve(history)

# %% [markdown]
# ## One step
#
# x = e - u(e, 0, 1): a single evaluation. Below it, the same network with r = t walks the plain velocity: in one step it goes to the
# middle of all hexagons, in sixteen it arrives.


# %%
def walked(noise, steps, average):
    """Samples from noise, by equal steps of the average velocity, or of the plain one."""
    z, n = noise, len(noise)
    for i in range(steps):
        t, r = (torch.full((n,), 1 - j / steps) for j in (i, i + 1))
        z = z - velocity(averaged, z, r if average else t, t) / steps
    return z


noise = fa.random.normal(fa.key(4), (12, T, 2))
rows = {
    "data": shapes(fa.key(5), 12),
    "noise": noise,
    "MeanFlow, 1 step": walked(noise, 1, True),
    "velocity, 1 step": walked(noise, 1, False),
    "velocity, 16 steps": walked(noise, 16, False),
}
figure, axes = plt.subplots(len(rows), 12, figsize=(8.4, 4.0), dpi=110, layout="constrained")
for line, (name, samples) in zip(axes, rows.items(), strict=True):
    for axis, corners in zip(line, samples, strict=True):
        axis.fill(*corners.T, color="#3b6ea5" if "MeanFlow" in name else "#9db7cc")
        axis.set(
            xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal", frame_on=False
        )
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()


def measures(samples):
    """How far the corners are from a hexagon, relative to their size; and the mean radius."""
    corners = torch.view_as_complex(samples.contiguous()) * torch.polar(torch.ones(T), -ANGLE)
    off = (corners - corners.mean(1, keepdim=True)).norm() / corners.norm()
    return float(off), float(corners.abs().mean())


noise = fa.random.normal(fa.key(6), (256, T, 2))
for name, samples in {
    "data": shapes(fa.key(7), 256),
    "noise": noise,
    "MeanFlow, 1 step": walked(noise, 1, True),
    "velocity, 1 step": walked(noise, 1, False),
    "velocity, 16 steps": walked(noise, 16, False),
}.items():
    off, radius = measures(samples)
    print(f"{name:<20} off by {off:.2f}, radius {radius:.2f}")

# %% [markdown]
# ## What it costs: memory
#
# Six corners need no streaming. An image of 64 x 64 patches is 4096 tokens; the gradient of the jvp through one head of 16 over
# them, in processes of their own, above what was there before.

# %%
PROGRAM = """
import resource, sys, torch, funcattn as fa
from torch.func import grad, jvp
kernel, lengths = sys.argv[1], [int(n) for n in sys.argv[2:]]
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
def step(T):
    z, v = (torch.arange(T * 16.0).mul_(0.7 + i).sin_().view(1, T, 16) for i in range(2))
    u = lambda w, z: fa.attention(z @ w, z, z, kernel=kernel)
    loss = lambda w: sum(x.square().sum() for x in jvp(lambda z: u(w, z), (z,), (v,)))
    return grad(loss)(torch.eye(16))
step(128)
ballast = torch.ones(2**25)  # held, so that the peak of the imports hides nothing
before = peak()
for T in lengths:
    step(T)
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


closed = measured("flash", 1024, 2048, 4096)
matrix = measured("reference", 512, 1024, 2048)

figure, axes = plt.subplots(figsize=(6.0, 3.2), dpi=110, layout="constrained")
last_T, last = matrix[-1]
axes.loglog(*zip(*matrix, strict=True), "o-", color="#c8553d", label="dense")
axes.loglog(
    [last_T, 2 * last_T],
    [last, 4 * last],
    "o:",
    color="#c8553d",
    mfc="white",
    label="dense, by its law",
)
axes.loglog(*zip(*closed, strict=True), "o-", color="#3b6ea5", label="streaming")
for x, y in ((2 * last_T, 4 * last), closed[-1]):
    axes.annotate(f"{y:.0f} MiB", (x, y), xytext=(-8, 4), textcoords="offset points", ha="right")
axes.set_xticks([512, 1024, 2048, 4096], ["512", "1k", "2k", "4k"], minor=False)
axes.set_xticks([], minor=True)
axes.set(xlabel="T, tokens", ylabel="MiB at the peak", title="A gradient of a jvp of attention")
axes.set(ylim=(None, 5000))
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## Limits
#
# - Six corners and half a minute of one core show that it works, not how well. The paper trains for days.
# - Memory is linear in T, time is not.
# - The right side of the identity is held fixed, so the gradient needs the jvp's value only; without `.detach()` it is a gradient *through* the jvp,
#   which `fa.attention` has as well (`benchmarks/meanflow.py` times it). Then let no `F.layer_norm` in: PyTorch's gradient of its jvp is
#   wrong without a word (pytorch#196700). `fa.layers.layer_norm` is exact, and so is torch's inside `fa.interop.closed()`.
