"""Triton where it is installed, and stand-ins where it is not, so that these modules can always be imported and read.

Nothing is launched without it: `choice` and `primitives` ask `AVAILABLE` first.
"""

import os
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources

    jit: Any = triton.jit
    AVAILABLE = True
except ImportError:
    tl: Any = SimpleNamespace(constexpr=object)
    jit: Any = lambda f: f
    OutOfResources: Any = MemoryError
    AVAILABLE = False

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")  # read when triton is, as there

__all__ = ["AVAILABLE", "INTERPRETED", "OutOfResources", "jit", "tl"]
