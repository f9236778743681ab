"""Quantization fitted to the activations of a text.

Each is a transform of params made from (model, tokens, scheme): `gptq` fits codes, `clipped`
searches ranges, `smooth` scales features before rounding, and `awq` is smooth, then clipped. They
compose: `gptq(...)(smooth(...)(params))`.
"""

from .clipping import awq, clipped
from .gptq_columns import gptq
from .smoothquant import smooth

__all__ = ["awq", "clipped", "gptq", "smooth"]
