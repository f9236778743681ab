"""The "triton" backend: CUDA kernels for attention, its jvp, and contractions.

`pieces` holds device functions; `softmax` the kernel of attention, with its tangents if there are
any; `programs` generates the kernel for a contraction; `launching` computes strides (`addresses`),
chooses block sizes (`tuning`), and launches. Results are deterministic: there are no atomics. A
contraction that the kernels cannot run (`obstacle`) is computed by blocks of torch operations.

With TRITON_INTERPRET=1 (set before Triton is imported) the same kernels run on CPU, in numpy: for
tests.
"""

from .launching import attend, obstacle, obstacle_to_attend, obstacle_to_push, push, statistics, sweep

__all__ = ["attend", "obstacle", "obstacle_to_attend", "obstacle_to_push", "push", "statistics", "sweep"]
