"""What devices say to each other, as pure functions of a value and the name of an axis.

    bindings      Axis, binding, unbound, axis_size, carried: what a name stands for in this context
    operations    the linear maps between devices, each with its transpose
    groups        the same over a process group, as blocking operators; counts
    agreement     agree: whether all processes hold a value alike
    fingerprint   contents: what a value is made of, functions included
    verbs         psum, copy_to_region, all_gather, reduce_scatter, all_gather_invariant, local_slice,
                  ppermute, axis_index, pmax, global_norms

A function that speaks them runs on one device as it is. `funcattn.sharding` binds the names.
"""

from .agreement import agree
from .bindings import Axis, axis_size, binding, bound, carried, find, simulated, unbound
from .groups import counts, reset
from .verbs import (
    all_gather,
    all_gather_invariant,
    axis_index,
    copy_to_region,
    global_norms,
    local_slice,
    pmax,
    ppermute,
    psum,
    reduce_scatter,
)

# Earlier names, which go on working.
enter, own, share = copy_to_region, local_slice, all_gather_invariant

__all__ = [
    "Axis",
    "agree",
    "all_gather",
    "axis_index",
    "axis_size",
    "binding",
    "bound",
    "carried",
    "counts",
    "copy_to_region",
    "find",
    "local_slice",
    "pmax",
    "ppermute",
    "psum",
    "reduce_scatter",
    "reset",
    "all_gather_invariant",
    "simulated",
    "unbound",
    "global_norms",
]
