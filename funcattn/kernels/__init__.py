"""Attention as a function: the public door, the kernels behind it, and the choice between them.

| kernel | what it is |
| --- | --- |
| flash | the closed streaming family: every transform, O(T + S) memory; torch's fused kernel for the value and first gradient |
| triton | the same family in kernels for CUDA, written in Triton: an extra, imported when it is used |
| reference | dense, plain torch operations, the specification |
| sdpa | torch's F.scaled_dot_product_attention; sdpa:flash, sdpa:math and so on force one of its own kernels |

`attend` gives the output and the log-sum-exp, `attention` the output, `merge` joins two, `explain` says what runs and why.
`attention_with_score` puts the logits through any elementwise function: every transform, linear memory, slower than all of them.
`ring` and `merge_over` attend over a text that no device of a mesh holds all of.
Inside: `api` checks, `dispatch` keeps the registry and chooses; a `Kernel` is a value (`request`), and one of one's own is
accepted wherever a name is. `closed` is the family of flash and triton, whose derivatives are contractions on one of the
`backends`; `sdpa` and `reference` are the others. `merging` and `rings` join attention over disjoint keys. `unseen` takes out
what no query sees, `products` multiply under vmap, `dtypes` says what sums are kept in.
"""

from .api import attend, attention, attention_weights, explain
from .closed import flops as flops
from .dispatch import Explanation, use
from .merging import Part, Partial, attend_parts, check_remembered, join, merge, partial, soft_cap
from .request import Kernel, Request
from .rings import join_over, merge_over, places, ring, unzigzag, zigzag
from .score_mod import attention_with_score

__all__ = [
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
    "Part",
    "attend_parts",
    "check_remembered",
    "soft_cap",
    "Explanation",
    "merge_over",
    "places",
    "ring",
    "unzigzag",
    "zigzag",
]
