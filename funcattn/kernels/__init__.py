"""Attention as a function: the public door, the kernels behind it, and the choice between them.

| kernel | what it is |
| --- | --- |
| reference | dense, plain torch operations, the specification |
| sdpa | torch's F.scaled_dot_product_attention |

`attend` gives the output and the log-sum-exp, `attention` the output, `merge` joins two, `explain` says what runs and why.
"""

from .choice import Explanation, use
from .door import attend, attention, explain
from .merging import Part, attend_parts, merge

__all__ = ["Explanation", "Part", "attend", "attend_parts", "attention", "explain", "merge", "use"]
