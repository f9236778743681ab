"""Speculative decoding; its face is `funcattn.speculation`, that of the drafters `funcattn.drafters`."""
