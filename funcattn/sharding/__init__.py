"""Sharding as a transform of the tree: the same untouched model on many devices, or on many that are simulated in one process.

    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))   # or Grid(data=2, tensor=2)
    params = fa.shard(mesh, fa.sharding.tensor_parallel(config))(params)
    logits, past = fa.shard_map(model, mesh).apply(params, prompt, cache)
    gradients = fa.shard_map(grad(loss), mesh, in_specs, out_specs)(params, tokens)

    mesh       VirtualMesh, which is Grid; P, Rule: which axis of a tensor is cut along which axis of a mesh
    rules      tensor_parallel, fsdp, replicated: ordered rules for the decoder; specs: what rules say of every leaf
    storing    shard, gather: DTensors, which are storage
    devices    all devices at once; inside: a whole program on this process's parts
    vocabulary candidates: the likeliest tokens, without all logits; the loss in parts
    costs      cost: what crosses the mesh, and what that takes
    models     a Model from outside of the mesh
    mapping    shard_map, spmd: computation, each device on its part

What a function says inside is `fa.collectives`: psum, copy_to_region, all_gather, reduce_scatter, ppermute, axis_index.
"""

from .costs import Cost, cost
from .devices import inside
from .mapping import shard_map, spmd
from .mesh import Grid, P, PartitionSpec, Rule, VirtualMesh
from .rules import fsdp, replicated, specs, specs_like, tensor_parallel
from .storing import from_local, gather, shard, to_local
from .vocabulary import candidates

# Earlier names, which go on working.
parts_of, whole_of, alongside = to_local, from_local, specs_like

__all__ = [
    "Cost",
    "Grid",
    "P",
    "PartitionSpec",
    "Rule",
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
