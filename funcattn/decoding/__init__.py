"""Decoding: a prompt read, and a text written behind it, by every verb in one loop.

requests         what a verb is asked for, checked once
loop             prefill, choose, stop, commit: decode, and the parts it is made of
generation       generate: one text, as a tensor
streams          stream: one text, as it is written
detokenization   the text of tokens that come one by one
beams            beam_search, best_of, contrastive: the likeliest texts (`fa.search`)
batching         texts that come and go, side by side (`fa.serving`)
speculative      texts with drafts (`fa.speculation`, `fa.drafters`)
"""

from .generation import generate
from .loop import hidden_along
from .streams import Streamed, stream

__all__ = ["Streamed", "generate", "hidden_along", "stream"]
