"""GGUF files: `header` reads the header, `file` the tensors, `metadata` the typed fields of the
header.
"""
