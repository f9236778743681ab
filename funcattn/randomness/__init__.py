"""Explicit randomness: a key is a value, a draw a pure function of it. Exported as `fa.random`.

A key is an int64 tensor (2,) of two 32-bit words. Every draw encrypts the counters 0, 1, 2, ... by
Threefry-2x32 with its key, so it depends on key and shape only: it is the same under vmap and
compile, on every device, in any order. The words are those of `jax.random` (threefry2x32,
partitionable), bit for bit, and so are all draws computed from them by exact arithmetic: keys,
bits, uniform, bernoulli, randint, permutation. normal, gumbel and exponential use erfinv and log,
which differ between libraries in the last bits; categorical differs only where two categories tie
within those bits.

Three rules of use:

- Use a key once. Two draws from one key have the same words; `split` it first.
- `split` and `fold_in` use a key too: `split(key, n)[i]` and `fold_in(key, i)` are the same key,
  and drawing from `key` itself gives the xor of their words.
- Many keys are `vmap`: a batch of keys in place of one is an error.

Half precision: `uniform` is jax's (16 bits in float16, but 7 in bfloat16). Other draws are computed
in float32 and rounded once, where jax uses those few bits: a bfloat16 gumbel with 128 values cannot
sample a vocabulary.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11; the layout of words is
    jax.random's, version 0.10.
"""

from .draws import (
    bernoulli,
    categorical,
    exponential,
    gumbel,
    normal,
    permutation,
    randint,
    uniform,
)
from .keys import WORD, Key, Sizes, bits, fold_in, key, split
from .threefry import encipher
from .vectors import normal_like, rademacher_like

__all__ = [
    "WORD",
    "encipher",
    "Key",
    "Sizes",
    "bernoulli",
    "bits",
    "categorical",
    "exponential",
    "fold_in",
    "gumbel",
    "key",
    "normal",
    "normal_like",
    "permutation",
    "rademacher_like",
    "randint",
    "split",
    "uniform",
]
