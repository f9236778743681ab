"""Decoding: a prompt read, and a text written behind it, by every verb in one loop.

generation       generate: one text, as a tensor; stream: as it is written
beams            beam_search, best_of, contrastive: the likeliest texts (`fa.search`)
batching         texts that come and go, side by side (`fa.serving`)
speculative      texts with drafts (`fa.speculation`, `fa.drafters`)
detokenization   the text of tokens that come one by one
"""

from .generation import Streamed, generate, hidden_along, stream

__all__ = ["Streamed", "generate", "hidden_along", "stream"]
