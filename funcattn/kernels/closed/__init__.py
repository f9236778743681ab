"""The closed family: attention whose derivatives of every order are contractions over the same weights, in O(T + S) memory.

`algebra` says which contraction comes next, `functions` are the autograd Functions, `operators` run them on a backend, and
`entry` lays out public arguments for them; `flops` counts their operations.
"""
