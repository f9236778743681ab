"""What every room uses and no user needs.

errors         the one form of an error; what can be looked at of a tensor
doors          @door: what was wrong with the arguments of a call that failed
autograd       what is recorded: by a transform, by autograd, by a tangent
context        values that hold inside a `with`, in eager and in compiled code
replaying      the state of torch under which something is computed once more
fingerprints   whether a tree still holds the same tensors, unwritten
atomic         files and folders that are replaced in one exchange
"""
