"""What runs below the family: blocks in torch operations."""
from . import blocks
def attend(plan, tensors):
    q,k,v,*extra=tensors
    return blocks.attend(q,k,v,extra[:plan.masks], extra[plan.masks] if plan.biased else None)
def sweep(spec, shapes, fused, tensors):
    return blocks.sweep(spec, shapes, tensors)
def fused_backward(plan, possible, out):
    return None
