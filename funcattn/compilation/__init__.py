"""Compiled decoding.

model       compile(model) -> Compiled, with the same functions
conditions  when a call is a plain decode step
stack       the layers of a step as a few calls of compiled functions or of the C++ operator
compiled    the function that is compiled: some layers of a step
fused       the C++ operator that runs all layers, and which configs it computes
prefill     the C++ operator that runs all layers for a prompt
mapped      its rows under vmap: several texts in one call
pasts       a past as it takes it: dense rows, and codes
"""

from .model import Compiled, compile

__all__ = ["Compiled", "compile"]
