"""Models whose decoding is compiled.

model       compile(model) -> Compiled, the same functions
conditions  when a call is a plain step
stack       the layers of a step as a few calls: of compiled functions, or of the operator in C++
compiled    what is compiled
fused       what the operator in C++ runs, and what it does not know
"""

from .model import Compiled, compile

__all__ = ["Compiled", "compile"]
