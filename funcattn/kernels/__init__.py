"""Attention as a function: the public functions, the kernels, and the dispatch between them.

| kernel | what it is |
| --- | --- |
| flash | all transforms in O(T + S) memory; torch's fused kernel for value and first gradient |
| triton | the same algorithm in CUDA kernels written in Triton: an extra, imported on first use |
| reference | dense, plain torch operations, the specification |
| sdpa | torch's F.scaled_dot_product_attention; sdpa:flash, sdpa:math, ... force a backend |

`attend` returns the output and the log-sum-exp, `attention` the output; `merge` joins attention
over disjoint keys; `explain` says which kernel runs and why. `attention_with_score` applies an
elementwise function to the logits: every transform, linear memory, slower than the others. `ring`
and `merge_over` attend over a text that is sharded over a mesh axis.

Inside: `api` checks arguments; `dispatch` keeps the registry and chooses; a `Kernel` is a value
(`request`), and a custom one is accepted wherever a name is. `closed` holds the autograd Functions
of flash and triton, whose derivatives are contractions that run on one of the `backends`; `sdpa`
and `reference` are the other kernels. `merging` and `rings` join attention over disjoint keys.
`unseen` removes keys that no query sees, `products` multiplies under vmap, `dtypes` chooses the
dtype of sums.
"""

from .api import attend, attention, attention_weights, explain
from .closed import flops as flops
from .coded import CodedSegment
from .dispatch import Explanation, use
from .merging import (
    KVSegment,
    Partial,
    attend_segments,
    check_remembered,
    join,
    merge,
    partial,
    soft_cap,
)
from .request import Kernel, Request
from .rings import join_over, merge_over, places, ring, unzigzag, zigzag
from .score_mod import attention_with_score

# Aliases: earlier names, kept for compatibility.
Part = KVSegment
attend_parts = attend_segments

__all__ = [
    "CodedSegment",
    "attend",
    "attention",
    "attention_weights",
    "attention_with_score",
    "explain",
    "use",
    "Kernel",
    "Request",
    "merge",
    "partial",
    "Partial",
    "join",
    "join_over",
    "KVSegment",
    "attend_segments",
    "check_remembered",
    "soft_cap",
    "Explanation",
    "merge_over",
    "places",
    "ring",
    "unzigzag",
    "zigzag",
]
