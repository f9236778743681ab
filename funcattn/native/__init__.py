"""What is compiled from C++ when it is first wanted; everything works without it, and slower.

building    load: compile, keep, tell torch; or say why not
products.h  the arithmetic, products.cpp the vector instructions (AVX2, AVX-512 VNNI) and the operator
"""

from .building import load

__all__ = ["load"]
