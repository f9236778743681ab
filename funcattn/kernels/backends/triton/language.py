"""Triton if it is installed, else stand-ins, so that these modules can always be imported.

Nothing is launched without Triton: kernel selection checks that it is installed.
"""

import importlib
import os
from types import SimpleNamespace
from typing import Any

tl: Any
jit: Any
OutOfResources: Any
try:
    tl = importlib.import_module("triton.language")
    jit = importlib.import_module("triton").jit
    OutOfResources = importlib.import_module("triton.runtime.errors").OutOfResources
except ImportError:
    tl, jit, OutOfResources = (
        SimpleNamespace(constexpr=lambda value: value),
        lambda f: f,
        MemoryError,
    )

# read when Triton is imported, as there
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["INTERPRETED", "OutOfResources", "jit", "tl"]
