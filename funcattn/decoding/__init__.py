"""Decoding: prefill of a prompt and the decode steps after it, one loop for every function.

requests         the arguments of a decoding call, validated once
loop             prefill, choose tokens, stop, commit: `decode` and its building blocks
generation       generate: one continuation, as a tensor
streams          stream: one continuation, token by token
detokenization   incremental decoding of token ids to text
beams            beam_search, best_of, contrastive: search for likely texts (`fa.search`)
batching         continuous batching: many texts of different lengths (`fa.serving`)
speculative      speculative decoding (`fa.speculation`, `fa.drafters`)
"""

from .generation import generate
from .loop import hidden_along
from .streams import Streamed, stream

__all__ = ["Streamed", "generate", "hidden_along", "stream"]
