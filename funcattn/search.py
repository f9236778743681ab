"""Search for likely texts: beams, contrast with a weaker model, the best of several samples."""

from .decoding.beams import Texts, beam_search, best_of, contrastive

__all__ = ["Texts", "beam_search", "best_of", "contrastive"]
