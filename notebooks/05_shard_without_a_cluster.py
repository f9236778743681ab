# %% [markdown]
# # Shard without a cluster
#
# A model on many devices is the same model on parts of its tree. What a device has to say to the others is one word, `psum`: add
# up over an axis of devices. And an axis of devices may as well be an axis of `vmap`, so that all devices are in this process,
# and every transform goes through them. What works here works under `torchrun`.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.collectives import psum
from funcattn.sharding import Grid, P, cost, specs, tensor_parallel

# %% [markdown]
# ## Naive: cut a block by hand
#
# The feed-forward block of a transformer is `down(silu(gate x) * up x)`. Cut gate and up by rows and down by columns, in four:
# each part is a smaller block, and the results add up to the whole.

# %%
E, F, N = 16, 32, 4
gate, up, down, x = (
    fa.random.normal(key, shape, torch.float64) / 4
    for key, shape in zip(fa.split(fa.key(0), 4), [(F, E), (F, E), (E, F), (E,)], strict=True)
)


def block(gate, up, down, x):
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


whole = block(gate, up, down, x)
parts = zip(gate.chunk(N, 0), up.chunk(N, 0), down.chunk(N, 1), strict=True)
assert torch.allclose(sum(block(*part, x) for part in parts), whole, atol=1e-14)

# %% [markdown]
# ## Transform: say how it is cut
#
# `spmd` runs a function on four devices, each with its part. A spec has one entry for each axis of a tensor: the name of the axis
# of devices that it is cut along, or None.


# %%
def device(gate, up, down, x):
    return psum(block(gate, up, down, x), "tensor")


cut = (P("tensor"), P("tensor"), P(None, "tensor"), P())
sharded = fa.spmd(device, "tensor", N, cut, P())

# %% [markdown]
# ## They agree
#
# And since it is a function, so do its derivatives, in every nesting, from inside or outside of the devices.

# %%
assert torch.allclose(sharded(gate, up, down, x), whole, atol=1e-14)

loss = lambda f: lambda x: f(gate, up, down, x).square().sum()
for name, nested in {
    "grad": lambda f: grad(loss(f))(x),
    "hvp": lambda f: jvp(grad(loss(f)), (x,), (x,))[1],
    "grad of grad": lambda f: grad(lambda x: grad(loss(f))(x).square().sum())(x),
    "vmap(grad)": lambda f: vmap(grad(loss(f)))(torch.stack([x, 2 * x])),
}.items():
    error = float((nested(sharded) - nested(block)).abs().max())
    print(f"{name:<14}{error:.0e}")
    assert error < 1e-12

# %% [markdown]
# ## A whole model
#
# Rules say of every path how it is cut; the first that matches wins, and none is an error. The model is told of nothing:
# `shard_map` binds the name of the axis, and the decoder's own `psum`, which is the identity on one device, now speaks.

# %%
config = fa.Config(
    vocabulary=64, width=32, layers=2, heads=8, kv_heads=4, head_size=4, feed_forward=64
)
model = fa.decoder(config)
params = fa.cast(torch.float64)(model.init(fa.key(1)))
tokens = torch.tensor([5, 3, 8, 9, 7, 9, 3, 2])

grid = Grid(tensor=4)
cuts = specs(params, grid, tensor_parallel(config))
for path in ("embedding", "layers.0.q", "layers.0.o", "layers.0.gate", "layers.0.down", "norm"):
    node = cuts
    for part in path.split("."):
        node = node[int(part)] if part.isdecimal() else getattr(node, part)
    print(f"{path:<16}{node}")

# %%
on = fa.shard_map(model, grid)
one, _ = model.apply(params, tokens, model.cache(16, dtype=torch.float64))
many, past = on.apply(params, tokens, on.cache(16, dtype=torch.float64))
assert torch.allclose(one, many, atol=1e-12)

warm = fa.sampling.temperature(1.0)
written = fa.generate(fa.key(2), model, params, tokens, steps=12, sampler=warm)[0]
assert torch.equal(fa.generate(fa.key(2), on, params, tokens, steps=12, sampler=warm)[0], written)

gradient = grad(lambda params: fa.loss(model, params, tokens))
apart = fa.shard_map(gradient, grid, (cuts,), cuts)(params)
assert fa.tree.allclose(apart, gradient(params), rtol=1e-9, atol=1e-12)
past

# %% [markdown]
# ## The same under torchrun
#
# Two processes that speak by Gloo. The program is the one above; the mesh is real, and each process holds its part. (Two, not
# four: this is for a machine of two cores.)

# %%
PROGRAM = """
import torch, torch.distributed as dist, funcattn as fa
from funcattn.sharding import tensor_parallel
dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
config = fa.Config(vocabulary=64, width=32, layers=2, heads=8, kv_heads=4, head_size=4, feed_forward=64)
model = fa.decoder(config)
params = fa.cast(torch.float64)(model.init(fa.key(1)))
held = fa.shard(mesh, tensor_parallel(config))(params)
tokens = torch.tensor([5, 3, 8, 9, 7, 9, 3, 2])
warm = fa.sampling.temperature(1.0)
written = fa.generate(fa.key(2), fa.shard_map(model, mesh), held, tokens, steps=12, sampler=warm)[0]
if dist.get_rank() == 0:
    print(*written.tolist())
    print(held.layers[0].q.to_local().shape, "of", held.layers[0].q.shape)
dist.destroy_process_group()
"""

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "program.py"
    file.write_text(PROGRAM)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(file),
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
print(done.stdout)
assert done.stdout.splitlines()[0].split() == [str(token) for token in written.tolist()]

# %% [markdown]
# ## What it costs
#
# Compute and weights divide by the devices; what they say does not. `cost` counts what a step of the decoder says (the tests
# hold it to what Gloo is asked to do) and divides by the speeds of a machine, which are arguments. Here for the sizes of Llama
# 3 8B, with its defaults: 400 TFLOP/s, 3 TB/s of memory, 300 GB/s and 5 microseconds a message between devices. A model, not a
# measurement.

# %%
llama = fa.Config(
    vocabulary=128256,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    feed_forward=14336,
)
counts = [1, 2, 4, 8]
figure, axes = plt.subplots(figsize=(6, 3), dpi=110, layout="constrained")
for label, tokens_read, color in (
    ("reading 4096 tokens", 4096, "#3b6ea5"),
    ("decoding one", 1, "#c8553d"),
):
    efficiency = [cost(llama, {"tensor": n}, tokens=tokens_read).efficiency for n in counts]
    axes.plot(counts, efficiency, "o-", color=color, label=label)
axes.set(
    xlabel="devices of the axis tensor",
    ylabel="compute, share of the time",
    title="Llama 3 8B in 16 bits, by the model",
)
axes.set_ylim(0, 1.05)
axes.set_xticks(counts)
axes.grid(alpha=0.3)
axes.legend()
plt.show()
print(cost(llama, {"tensor": 8}, tokens=4096))

# %% [markdown]
# ## Limits
#
# - `shard_map` is the outermost transform over real devices: `shard_map(grad(f))`, not the other way round, which raises and says
#   so. In one process either order works.
# - Heads must divide by the devices, or be fewer and repeated; what does not fit is refused by name.
# - Simulated devices save nothing: they are for notebooks and tests.
