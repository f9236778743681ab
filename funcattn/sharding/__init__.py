"""Sharding as a transform of the params: one model on many devices, real or simulated by vmap.

    names = ("data", "tensor")
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    mesh = Grid(data=2, tensor=2)  # or this: all devices in one process
    params = fa.shard(mesh, fa.sharding.tensor_parallel(config))(params)
    logits, past = fa.shard_map(model, mesh).apply(params, prompt, cache)
    gradients = fa.shard_map(grad(loss), mesh, in_specs, out_specs)(params, tokens)

    mesh       VirtualMesh (alias Grid); P, Rule: which tensor axis is sharded over which mesh axis
    rules      tensor_parallel, fsdp, replicated: rules for the decoder; specs of a tree
    storing    shard, gather: DTensors, which are storage
    devices    running on all devices; inside: a whole program on this process's shards
    vocabulary candidates: the most likely tokens, without all logits
    costs      cost: bytes that cross the mesh, and the time of a step
    models     a Model on a mesh, called from outside
    mapping    shard_map, spmd: a function on each device's shards

Inside, functions use `fa.collectives`: psum, copy_to_region, all_gather, reduce_scatter, ppermute,
axis_index.
"""

from .costs import Cost, cost
from .devices import inside
from .mapping import shard_map, spmd
from .mesh import Grid, Mesh, P, PartitionSpec, Rule, VirtualMesh
from .rules import fsdp, replicated, specs, specs_like, tensor_parallel
from .storing import from_local, gather, shard, to_local
from .vocabulary import candidates

# Aliases: earlier names, kept for compatibility.
parts_of, whole_of, alongside = to_local, from_local, specs_like

__all__ = [
    "Cost",
    "Grid",
    "P",
    "PartitionSpec",
    "Rule",
    "Mesh",
    "VirtualMesh",
    "specs_like",
    "candidates",
    "cost",
    "fsdp",
    "gather",
    "inside",
    "to_local",
    "replicated",
    "shard",
    "shard_map",
    "specs",
    "spmd",
    "tensor_parallel",
    "from_local",
]
