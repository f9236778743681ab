"""What a kernel, a sampler, a past or a transform of trees must keep, as functions you call on your own.

    laws          lists of plain functions that raise AssertionError: laws.kernel, laws.sampler, laws.cache, laws.transform
    strategies    what to try them on, for hypothesis: problems(), qkv(), masks(), logits(), keys()
    check_transforms    every nesting of grad, jvp and vmap, held against plain operations in float64, as a table

Nothing in the library imports this folder; `strategies` alone needs hypothesis (`pip install funcattn[testing]`).

Example:
    >>> import torch, funcattn as fa
    >>> q = k = v = fa.random.normal(fa.key(0), (2, 3, 4), torch.float64)
    >>> for law in laws.kernel:
    ...     law(fa.attend, q, k, v, fa.masks.causal(3), fa.key(1))
"""

from . import laws
from .transforms import Report, Row, check_transforms

__all__ = ["Report", "Row", "check_transforms", "laws"]
