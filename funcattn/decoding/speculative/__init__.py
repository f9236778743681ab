"""Speculative decoding; the public names are in `funcattn.speculation` and `funcattn.drafters`."""
