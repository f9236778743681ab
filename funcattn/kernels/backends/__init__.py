"""Backends of `closed`: attention and contractions of tensors outside of transforms.

`table` has each backend as a value and the order in which they are asked. `torch_blocks` loops over
blocks with torch operations and supports every input; `aten` is PyTorch's fused CPU kernel;
`triton` has CUDA kernels. `layout` merges axes with the same broadcasting pattern, and `masking`
computes which pairs of a block are visible.
"""

WIDEST = 256  # largest head size of keys and values for the Triton kernels
