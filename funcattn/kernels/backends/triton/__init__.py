"""The "triton" backend: CUDA kernels for attention, its jvp, and contractions.

`pieces` holds device functions; `softmax` the kernel of attention, with its tangents if there are
any; `programs` generates the kernel for a contraction; `launching` computes strides (`addresses`),
chooses block sizes (`tuning`), and launches; `conditions` says what cannot run. Results are
deterministic: there are no atomics. A contraction that the kernels cannot run (`why_not_contract`)
is computed by blocks of torch operations.

With TRITON_INTERPRET=1 (set before Triton is imported) the same kernels run on CPU, in numpy: for
tests.
"""

from .conditions import why_not_attend, why_not_attend_jvp, why_not_contract
from .launching import attend, attend_jvp, contract, statistics

__all__ = [
    "attend",
    "attend_jvp",
    "contract",
    "statistics",
    "why_not_attend",
    "why_not_attend_jvp",
    "why_not_contract",
]
