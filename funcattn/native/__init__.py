"""What is compiled from C++ when it is first wanted; everything works without it, and slower.

building    load: compile, keep, tell torch; or say why not
products.h  the arithmetic of products, floats.h that of what stands between them
products.cpp  the vector instructions (AVX2, AVX-512 VNNI), and funcattn::products: matrices times a few vectors
layers.cpp  funcattn::layers: all layers of a decoder for a few tokens; matrices.h is what the two share
"""

from .building import load, once

__all__ = ["load", "once"]
