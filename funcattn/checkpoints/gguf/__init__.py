"""GGUF files: `header` reads the header, `file` the tensors, `blocks` those that stay quantized,
`metadata` the typed fields of the header.
"""
