"""GGUF files: `file` reads the header and the tensors, `metadata` the typed fields of the
header.
"""
