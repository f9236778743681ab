"""Internals used by all packages.

errors         the format of errors; concrete values of tensors
doors          @door: explains wrong arguments when a public function raises
autograd       whether transforms, autograd or tangents record a tensor
computations   functions of tensors, and their vjp, jvp and vmap of the same form
context        values set by a `with`, in eager and in compiled code
replaying      saving and restoring the state of torch for a recomputation
tensor_cache   what is computed from tensors, cached as long as they live
fingerprints   whether a tree still holds the same tensors, unmodified
atomic         atomic replacement of files and folders
"""
