"""funcattn: JAX-style attention and decoding for PyTorch.

Every piece of a language model as a pure function of values, so that torch.func goes through all of
it.

    config, params, tokenizer = fa.load("smollm2-135m")          a tree of named tensors
    model = fa.decoder(config)                                   six pure functions
    text = torch.tensor(tokenizer.encode("The sea"))             one sequence (T,); many are vmap
    tokens, past = fa.generate(fa.key(0), model, params, text, steps=8)
    small = fa.quantize(fa.int4(group=64))(params)               cheaper is a transform of the tree

Arguments come in one order: key, model, params, data, state. What is here, by floors:

    records, tree          what values are made of                   floor 0
    random                 explicit keys; the bits of jax.random
    masks, taps            unions of intervals, with & | ~; listeners       1
    collectives            psum and its kin, between the devices of a mesh
    remat                  a checkpoint that nests under torch.func
    curvature              hvp, lanczos, spectrum, cg, trace, influence, ntk
    kernels                attend, attention, merge, explain                2
    layers                 linear, norms, rope, gates, experts              3
    vocabulary             cross_entropy: the loss is an attention
    caches, sampling       the past as a value; transforms of logits        4
    quantization           int8, int4, ... as transforms of the tree
    transformer            Config, Params, decoder                          5
    low_rank               lora: a few trained numbers beside a weight
    families               other people's files                             6
    sharding               shard, gather, shard_map, spmd: many devices
    compilation            compile: decoding at the speed of memory
    decoding               generate, stream, and all verbs that write
    checkpoints            load, save                                       7
    speculation, drafters  speculate, accept: drafts, verified without loss
    search, serving        beam_search, best_of; texts that come and go
    training, evaluation   loss, optimizers, fit; score, trace, patch, patched
    interop                other people's modules, closed
"""

from . import (
    caches,
    collectives,
    curvature,
    drafters,
    evaluation,
    families,
    interop,
    kernels,
    layers,
    low_rank,
    masks,
    quantization,
    records,
    sampling,
    search,
    serving,
    sharding,
    speculation,
    taps,
    training,
    transformer,
    tree,
)
from . import randomness as random
from .caches import Branch, Cache, Delta, Memory, Pages, QuantizedCache, Ring, commit
from .checkpoints import Loaded, load, load_lora, save, save_lora
from .collectives import all_gather, axis_index, ppermute, psum, reduce_scatter
from .compilation import compile
from .decoding import Streamed, generate, stream
from .evaluation import patch, patched, perplexity, score, score_continuation, trace
from .kernels import attend, attention, attention_weights, explain, merge
from .low_rank import choose_lora, lora, merge_lora, stack_lora
from .masks import Mask
from .models import Model
from .quantization import dequantize, fp8, int4, int8, nf4, quantize, ternary, w8a8
from .quantization.calibration import awq, clipped, gptq, smooth
from .randomness import fold_in, key, split
from .records import Attended
from .rematerialization import remat
from .search import beam_search, best_of
from .sharding import gather, shard, shard_map, spmd
from .speculation import Speculated, speculate
from .training import loss
from .transformer import Config, Params, decoder
from .tree import cast, to
from .vocabulary import cross_entropy

__all__ = [
    "caches",
    "collectives",
    "curvature",
    "drafters",
    "evaluation",
    "families",
    "interop",
    "kernels",
    "layers",
    "low_rank",
    "masks",
    "quantization",
    "random",
    "records",
    "sampling",
    "search",
    "serving",
    "sharding",
    "speculation",
    "taps",
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
    "Speculated",
    "Streamed",
    "all_gather",
    "attend",
    "attention",
    "attention_weights",
    "axis_index",
    "beam_search",
    "best_of",
    "cast",
    "choose_lora",
    "commit",
    "compile",
    "cross_entropy",
    "decoder",
    "explain",
    "fold_in",
    "gather",
    "generate",
    "awq",
    "clipped",
    "gptq",
    "smooth",
    "key",
    "load",
    "load_lora",
    "lora",
    "loss",
    "merge",
    "merge_lora",
    "patch",
    "patched",
    "perplexity",
    "ppermute",
    "psum",
    "reduce_scatter",
    "remat",
    "save",
    "save_lora",
    "score",
    "score_continuation",
    "shard",
    "shard_map",
    "speculate",
    "split",
    "spmd",
    "stack_lora",
    "stream",
    "to",
    "trace",
    "dequantize",
    "fp8",
    "int4",
    "int8",
    "nf4",
    "quantize",
    "ternary",
    "w8a8",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What a person may want to complete `fa.` to; modules that only others here import are left
    out.
    """
    return sorted([*__all__, "__version__", "__doc__"])
