# %% [markdown]
# # Two tutorials, re-told
#
# PyTorch has a tutorial on `scaled_dot_product_attention`: which kernel runs, causal biases, jagged batches, compile. And it has
# gpt-fast, a thousand lines that make a language model decode ten times faster: compile, int8, int4, speculation, tensor
# parallelism. Here are both, step by step, as functions of values, each step measured on the machine in front of you.

# %%
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, jvp
from torch.nn.attention.bias import causal_lower_right

import funcattn as fa

BLUE, PALE = "#3b6ea5", "#8fb8d0"

# %% [markdown]
# ## Part one: attention
#
# ### Which kernel
#
# torch chooses among its kernels and keeps the reason to itself, or warns. Here one asks, and a `with` forces.

# %%
q, k, v = (fa.random.normal(key, (4, 64, 32)) for key in fa.split(fa.key(0), 3))
with fa.kernels.use("reference"):
    dense = fa.attention(q, k, v)
assert torch.allclose(fa.attention(q, k, v), dense, atol=1e-5)
fa.explain(q, k, v)

# %% [markdown]
# ### Causal biases
#
# The tutorial's `causal_upper_left` and `causal_lower_right` are the same mask with another corner: which key the first query
# stands on matters where T queries follow a past. They are intervals, so they combine with windows, documents and padding, and
# `&` is exact.

# %%
T, S = 6, 10
upper, lower = fa.masks.causal(T, S), fa.masks.causal(T, S, align="lower")
short = q[:, :T], k[:, :S], v[:, :S]
bias = causal_lower_right(T, S)
theirs = F.scaled_dot_product_attention(*(x[None] for x in short), attn_mask=bias)[0]
assert torch.allclose(fa.attention(*short, lower), theirs, atol=1e-5)
(lower & fa.masks.window(T, 4, offset=S - T)) | fa.masks.sinks(T, 1)

# %% [markdown]
# ### Jagged batches
#
# Sequences of different lengths: the tutorial packs them into a NestedTensor. Pack them into one row, and the mask says which
# document a token is of. The sum is the same, and unlike a NestedTensor it goes through every transform.

# %%
lengths = [5, 17, 9, 33]
ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
mask = fa.masks.segments(ids) & fa.masks.causal(sum(lengths))
packed = fa.attention(q, k, v, mask)
parts = [
    fa.attention(*(x[:, begin : begin + n] for x in (q, k, v)), fa.masks.causal(n))
    for begin, n in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False)
]
assert torch.allclose(packed, torch.cat(parts, 1), atol=1e-5)
# where a NestedTensor stops
hvp = jvp(grad(lambda q: fa.attention(q, k, v, mask).square().sum()), (q,), (q,))[1]
mask

# %% [markdown]
# ### Compile
#
# Value and gradient compile to one graph.

# %%
slope = grad(lambda q: fa.attention(q, k, v, fa.masks.causal(64)).square().sum())
compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(q), slope(q), atol=1e-4)

# %% [markdown]
# ## Part two: decoding
#
# gpt-fast's ladder, on SmolLM2-135M. Every step is a value: another model, another tree, a drafter. The rest of the code stays as
# it was.

# %%
config, params, tokenizer = fa.load("smollm2-135m")
prompt = torch.tensor(
    tokenizer.encode(
        "The three largest cities of France are Paris, Marseille and Lyon. The largest of Spain are"
    )
)
steps = 32

eager = fa.decoder(config)
model = fa.compile(eager)
eight, four = fa.quantize(fa.int8)(params), fa.quantize(fa.int4(group=64))(params)

ladder = {
    "eager": lambda: fa.generate(fa.key(0), eager, params, prompt, steps=steps)[0],
    "compile": lambda: fa.generate(fa.key(0), model, params, prompt, steps=steps)[0],
    "int8": lambda: fa.generate(fa.key(0), model, eight, prompt, steps=steps)[0],
    "int4": lambda: fa.generate(fa.key(0), model, four, prompt, steps=steps)[0],
    "speculate, int4 drafts": lambda: (
        fa.speculate(
            fa.key(0), model, params, fa.drafters.model(model, four, length=3), prompt, steps=steps
        )[0].tokens
    ),
}
texts = {name: call() for name, call in ladder.items()}  # waits for the compiler

# %% [markdown]
# ### They agree
#
# What changes the speed and not the function writes the same text. Fewer bits are another function, and may write another one.

# %%
assert torch.equal(texts["compile"], texts["eager"])
assert torch.equal(texts["speculate, int4 drafts"], texts["eager"])
for name in ("eager", "int8", "int4"):
    print(f"{name:>6}: {tokenizer.decode(texts[name])!r}")

# %% [markdown]
# ### Tensor parallelism
#
# The last step of the ladder: each process holds a part of every matrix, and they add up what they found by Gloo. SmolLM2 has nine
# heads and three of keys, so three processes it is, by torchrun, of one thread each. The text is the same.

# %%
PROGRAM = """
import sys, time, torch, torch.distributed as dist, funcattn as fa
from funcattn.sharding import tensor_parallel
dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = dist.init_device_mesh("cpu", (3,), mesh_dim_names=("tensor",))
config, params, _ = fa.load("smollm2-135m")
model, held = fa.shard_map(fa.decoder(config), mesh), fa.shard(mesh, tensor_parallel(config))(params)
steps, *prompt = map(int, sys.argv[1:])
for count in (1, steps):  # the first is not timed
    dist.barrier()
    begun = time.perf_counter()
    tokens = fa.generate(fa.key(0), model, held, torch.tensor(prompt), steps=count)[0]
    seconds = time.perf_counter() - begun
if dist.get_rank() == 0:
    print(seconds, *tokens.tolist())
dist.destroy_process_group()
"""

few = 8  # tokens; they take their time
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "program.py"
    file.write_text(PROGRAM)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        str(file),
        str(few),
    ]
    done = subprocess.run(
        [*run, *map(str, prompt.tolist())], capture_output=True, text=True, check=True
    )
took, *written = done.stdout.split()
assert [int(token) for token in written] == texts["eager"][:few].tolist()

# %% [markdown]
# ### What it costs

# %%
seconds = {name: [] for name in ladder}
for _ in range(3):  # in turns
    for name, call in ladder.items():
        begun = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - begun)
speed = {name: steps / min(times) for name, times in seconds.items()}
speed["eager, 3 processes"] = few / float(took)

figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")
names = list(speed)[::-1]
lossless = [name not in ("int8", "int4") for name in names]
bars = axes.barh(
    names, [speed[name] for name in names], color=[BLUE if same else PALE for same in lossless]
)
axes.bar_label(
    bars, [f"{speed[name]:.0f}   {speed[name] / speed['eager']:.2f}x" for name in names], padding=4
)
axes.set(
    xlabel="tokens/s, prefill included",
    title=f"SmolLM2-135M, batch one, {torch.get_num_threads()} thread(s), this machine",
)
axes.set_xlim(0, 1.25 * max(speed.values()))
plt.show()

# %% [markdown]
# Dark bars write the text of the eager model, light ones are other models. On a CPU with two cores the ladder is not gpt-fast's on
# an A100: what pays is decided by what the machine's memory and its instructions for small integers can do. And tensor
# parallelism does not pay here at all: the processes share the cores and the memory that one of them had for itself, and each
# token waits for some sixty messages. It is for several machines, or several GPUs; here it shows that the text stays the same.
#
# ### What gpt-fast does by surgery
#
# | step | gpt-fast | here |
# | --- | --- | --- |
# | static cache | buffers in the module, made by `setup_caches` | `model.cache(n)`, a value |
# | compile | module globals are rebound | `fa.compile(model)`, another value |
# | int8, int4 | linears are swapped in the module | `fa.quantize(scheme)(params)`, another tree |
# | speculation | caches are overwritten and positions moved back | what was not committed was never there |
# | tensor parallelism | attributes are changed, hooks are registered | `fa.shard(mesh)(params)`, another tree |
#
# ## Limits
#
# - The first call of a compiled form waits for a C++ compiler, some ten seconds each; a second process finds its code.
# - Batch one. Many texts are `vmap`, or `fa.serving` where they come and go.
# - A few threads of a shared machine: take ratios, and those with a grain of salt.
