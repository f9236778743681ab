"""The "triton" backend: `attend`, its jvp and `sweep` as kernels for CUDA, written in Triton.

`pieces` are device functions; `softmax` is the kernel of attend, with its tangents where there are any; `programs` writes the
kernel that a sweep needs; `launching` finds where tensors lie (`addresses`), how large blocks should be (`tuning`), and starts
them. Deterministic: no atomics anywhere. Where the kernels cannot run a sweep (`obstacle`), the blocks of torch operations do.

Under TRITON_INTERPRET=1 (set before Triton is imported) the same kernels run on CPU, in numpy: for tests.
"""

from .launching import attend, obstacle, obstacle_to_attend, obstacle_to_push, push, statistics, sweep

__all__ = ["attend", "obstacle", "obstacle_to_attend", "obstacle_to_push", "push", "statistics", "sweep"]
