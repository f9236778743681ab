"""funcattn: JAX-style attention and decoding for PyTorch.

Every piece of a language model as a pure function of values, so that torch.func goes through all of it.

    records, tree          what values are made of                   floor 0
    random                 explicit keys; the bits of jax.random
    masks                  unions of intervals, with & | ~                  1
    remat                  a checkpoint that nests under torch.func
    kernels                attend, attention, merge, explain                2
    layers                 linear, norms, rope, gates                       3
    caches, sampling       the past as a value; transforms of logits        4
    transformer            Config, Params, decoder                          5
    low_rank               lora: a few trained numbers beside a weight
    generation             generate, stream                                 6
    checkpoints            load, save                                       7
    interop                other people's modules, closed
    training               loss, optimizers, step, fit
"""

from . import (
    caches,
    families,
    interop,
    kernels,
    layers,
    low_rank,
    masks,
    records,
    sampling,
    serving,
    training,
    transformer,
    tree,
)
from . import randomness as random
from .caches import Branch, Cache, Delta, Memory, Pages, QuantizedCache, Ring, commit
from .checkpoints import Loaded, load, load_lora, save, save_lora
from .generation import Streamed, generate, stream
from .kernels import attend, attention, attention_weights, explain, merge
from .low_rank import lora, merge_lora
from .masks import Mask
from .randomness import fold_in, key, split
from .records import Attended, Model
from .rematerialization import remat
from .training import loss
from .transformer import Config, Params, decoder
from .tree import cast, to

__all__ = [
    "caches",
    "families",
    "interop",
    "kernels",
    "layers",
    "low_rank",
    "masks",
    "random",
    "records",
    "sampling",
    "serving",
    "training",
    "transformer",
    "tree",
    "Attended",
    "Branch",
    "Cache",
    "Config",
    "Delta",
    "Loaded",
    "Mask",
    "Memory",
    "Model",
    "Pages",
    "Params",
    "QuantizedCache",
    "Ring",
    "Streamed",
    "attend",
    "attention",
    "attention_weights",
    "cast",
    "commit",
    "decoder",
    "explain",
    "fold_in",
    "generate",
    "key",
    "load",
    "load_lora",
    "lora",
    "loss",
    "merge",
    "merge_lora",
    "remat",
    "save",
    "save_lora",
    "split",
    "stream",
    "to",
]

__version__ = "0.1.0"
