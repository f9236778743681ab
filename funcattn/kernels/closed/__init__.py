"""Attention whose derivatives of every order are contractions with the same weights.

They take O(T + S) memory.

`algebra` derives the next contraction, `functions` holds the autograd Functions, `operators` runs
them on a backend, and `entry` reshapes public arguments for them; `flops` counts their operations.
"""
