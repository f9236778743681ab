"""Property tests for kernels, samplers, caches and transforms of trees, as plain functions.

    laws          lists of functions that raise AssertionError: laws.kernel, laws.sampler,
                  laws.cache, laws.transform
    strategies    inputs for hypothesis: problems(), qkv(), masks(), logits(), keys()
    checking      check(kernel): all laws of a kernel, sampler or cache, as `funcattn check` does
    check_transforms    every nesting of grad, jvp and vmap, against plain operations in float64

The library does not import this folder; `strategies` and `checking` need hypothesis
(`pip install funcattn[testing]`).

Example:
    >>> import torch, funcattn as fa
    >>> q = k = v = fa.random.normal(fa.key(0), (2, 3, 4), torch.float64)
    >>> for law in laws.kernel:
    ...     law(fa.attend, q, k, v, fa.masks.causal(3), fa.key(1))
"""

from . import laws
from .transforms import Report, Row, check_transforms

__all__ = ["Report", "Row", "check_transforms", "laws"]
