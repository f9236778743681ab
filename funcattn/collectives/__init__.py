"""Collectives as pure functions of a value and the name of a mesh axis.

    bindings      Axis, binding, unbound, axis_size, carried: what an axis name is bound to
    operations    the linear maps between devices, each with its transpose
    groups        collectives over a process group, as blocking operators; counts
    agreement     agree: whether a value is the same on all processes
    fingerprint   contents: the bytes and tensors that a value consists of, functions included
    verbs         psum, copy_to_region, all_gather, reduce_scatter, all_gather_invariant,
                  local_slice, ppermute, axis_index, pmax, global_norms

A function that calls them runs unchanged on one device. `funcattn.sharding` binds the names.
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

# Aliases: earlier names, kept for compatibility.
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
