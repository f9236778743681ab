"""What the closed family runs on: each backend attends and contracts tensors that no transform wraps.

`torch_blocks` is made of torch operations over blocks and takes anything; `aten` is PyTorch's fused kernel of the CPU; `triton`
has kernels for CUDA. `layout` merges the axes that behave alike, and `masking` says what is seen of a block.
"""

WIDEST = 256  # features of a key or a value that the kernels in Triton take
