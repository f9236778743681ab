# %% [markdown]
# # The past is a value
#
# A language model that writes keeps a past: the keys and values of every token it has read. Most libraries hold it in an object
# that each step changes. Here it is a value, as a number is. Whoever has it can use it twice.
#
# So thirty-two continuations of one prompt need no batch, no copy and no reordering of a cache: we write *one* continuation as a
# function of its randomness, and `vmap` it over thirty-two keys.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch.func import vmap

import funcattn as fa

config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)
prompt = torch.tensor(tokenizer.encode("Once upon a time, in a small village by the sea,"))
sampler = fa.sampling.chain(fa.sampling.temperature(0.6), fa.sampling.top_p(0.9))
keys = fa.split(fa.key(1), 32)
steps = 9


# %% [markdown]
# ## Naive: again and again from the start
#
# `generate` continues one prompt. A loop over keys reads that prompt each time, to arrive at the same place each time. Eight of
# them will do.


# %%
def from_the_start(key):
    tokens, _ = fa.generate(key, model, params, prompt, steps=steps, sampler=sampler)
    return tokens


begun = time.perf_counter()
looped = torch.stack([from_the_start(key) for key in keys[:8]])
loop_seconds = (time.perf_counter() - begun) / 8
looped.shape

# %% [markdown]
# ## Transform: read once, go on 32 times
#
# Read all but the last token, and keep the past that comes back. Then map over the keys *alone*: the past is a closed-over
# constant, so `vmap` has nothing to batch there. Each future writes behind it, into a small tail of its own.

# %%
begun = time.perf_counter()
_, past = model.apply(params, prompt[:-1], model.cache(len(prompt)))


def go_on(key):
    return fa.generate(key, model, params, prompt[-1:], past, steps=steps, sampler=sampler)


futures, after = vmap(go_on)(keys)
vmap_seconds = (time.perf_counter() - begun) / 32
after.tail

# %% [markdown]
# ## They agree
#
# The same keys give the same texts, whichever way they were computed; and the past that all futures were written behind is, bit for
# bit, the past that we had.

# %%
assert torch.equal(futures[:8], looped)

_, again = model.apply(params, prompt[:-1], model.cache(len(prompt)))
assert fa.tree.allclose(past, again, rtol=0, atol=0)

# %% [markdown]
# ## What it costs
#
# Time on a shared machine is a rough thing: take the ratio. Bytes are exact. A batch would hold the past once for every row.

# %%
shared, tails = fa.tree.nbytes(past), fa.tree.nbytes(after.tail)
print(
    f"a future by the loop {loop_seconds:.2f} s, by vmap {vmap_seconds:.2f} s: {loop_seconds / vmap_seconds:.1f} times as fast"
)
print(f"one past {shared / 2**20:.1f} MiB + 32 tails {tails / 2**20:.1f} MiB")

per_token = shared / (len(prompt) + 1)  # a past has one row of scratch
for T in (100, 1000, 8000):
    forked, batch = ((n * T * per_token + tails) / 2**20 for n in (1, 32))
    print(f"behind {T:>4} tokens: forked {forked:4.0f} MiB, a batch {batch:4.0f} MiB")


# %% [markdown]
# ## The tree
#
# Where two futures begin with the same tokens they are one branch, and a line is thicker where more futures run along
# it.


# %%
def spell(ids):
    return tokenizer.decode(ids).replace("\n", "¶")


def agreement(rows):
    """How many tokens the rows begin with alike."""
    return next(
        (n for n, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1),
        len(rows[0]),
    )


def draw(axes, rows, column, line):
    """Draw the rows, sorted, from a column on, the first of them in a line; return the height of their root and where they end."""
    n = agreement(rows)
    text = spell(rows[0][:n])
    end = furthest = column + len(text)
    children = []
    for first in dict.fromkeys(ids[n] for ids in rows if len(ids) > n):
        group = [ids[n:] for ids in rows if ids[n] == first]
        height, reach = draw(axes, group, end + 6, line)
        furthest = max(furthest, reach)
        children.append((height, len(group)))
        line += len(group)
    root = sum(height for height, _ in children) / len(children) if children else line
    t = torch.linspace(0, 1, 40)
    for height, count in children:
        x, y = end + 1 + 5 * t, root + (height - root) * t * t * (3 - 2 * t)
        axes.plot(
            x, y, color="#8fb8d0", linewidth=1.4 * count**0.5, solid_capstyle="butt", zorder=0
        )
    axes.text(column, root, text, family="DejaVu Sans Mono", fontsize=SIZE, va="center")
    return root, furthest


# points; inches: at 120 dots an inch a letter of this size is 9 dots wide
SIZE, COLUMN, LINE = 9, 9 / 120, 0.25
rows = [prompt.tolist() + ids for ids in sorted(futures.tolist())]
figure = plt.figure(dpi=120)
axes = figure.add_axes((0, 0, 1, 1))
_, width = draw(axes, rows, 0, 0)
axes.set(xlim=(-1, width + 1), ylim=(len(rows) - 0.4, -0.6))
axes.axis("off")
figure.set_size_inches((width + 2) * COLUMN, (len(rows) + 0.2) * LINE)

# %% [markdown]
# ## A ragged batch is another vmap
#
# Prompts of different lengths differ in their pasts, and pasts are values like any other. Pad the prompts, say how long each is,
# and map: no pad is ever remembered, and each row is what it would be alone.

# %%
beginnings = ["The sea", "In the middle of the night, a knock at the door", "Two and two"]
encoded = [tokenizer.encode(text) for text in beginnings]
lengths = torch.tensor([len(ids) for ids in encoded])
padded = torch.tensor([ids + [0] * (int(lengths.max()) - len(ids)) for ids in encoded])


def write(prompt, length):
    return fa.generate(fa.key(0), model, params, prompt, steps=8, prompt_length=length)[0]


together = vmap(write)(padded, lengths)
for row, ids in zip(together, encoded, strict=True):
    assert torch.equal(row, fa.generate(fa.key(0), model, params, torch.tensor(ids), steps=8)[0])
    print(spell(ids) + " |" + spell(row.tolist()))

# %% [markdown]
# ## Limits
#
# - Equal *texts* are not equal bits. A product of 32 rows sums in another order than 32 products of one, so logits differ in their
#   last places. Two tokens that tie within that rounding could be drawn differently; here none are.
# - Nothing is shared but the past that was there before the fork. Futures that happen to agree for three tokens write those three
#   tokens twice. To share them too, fork later: `fa.commit` them into a past, and go on from there.
# - Every row of a `vmap` takes every step. A future that ended early waits for the longest one.
# - A fork is free, a long tail is not: 32 tails of a thousand tokens are as large as a batch's.
