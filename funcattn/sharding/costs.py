"""A cost model of a mesh: collectives per layer, bytes sent, and the time of a step.

A ring collective over n devices sends, for S bytes on each device,

    all_reduce 2 (n - 1) / n S    all_gather, reduce_scatter (n - 1) / n S of the whole    permute S

and waits for 2 (n - 1), n - 1 and 1 messages. Compute and weights are divided by the number of
devices; the bytes that cross the mesh are not, so the fraction of communication grows with n.

Source: Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in
MPICH, 2005; Kaplan et al., arXiv:2001.08361, section 2.1 (2 N operations a token forward, twice as
many backward).
"""

import math
from dataclasses import dataclass

from ..core import errors
from ..core.doors import door
from ..layers import Weight
from ..transformer import DATA, TENSOR, Config, of_layer, shapes
from .mesh import Mesh, axes_of

CONTEXT = "context"


@dataclass(frozen=True)
class CollectiveCost:
    """One kind of collective in a step: number of calls, devices, and bytes per call and device."""

    axis: str
    kind: str
    phase: str  # "forward" or "backward"
    calls: int
    devices: int
    nbytes: float  # of one call: of the shard if gathered or permuted, of the whole if reduced

    @property
    def traffic(self) -> float:
        """Bytes that a device sends in all calls."""
        n = self.devices
        share = {
            "all_reduce": 2 * (n - 1) / n,
            "all_gather": n - 1,
            "reduce_scatter": (n - 1) / n,
            "permute": 1,
        }[self.kind]
        return self.calls * share * self.nbytes

    @property
    def messages(self) -> int:
        """Number of sequential messages that a device waits for."""
        n = self.devices
        return (
            self.calls
            * {
                "all_reduce": 2 * (n - 1),
                "all_gather": n - 1,
                "reduce_scatter": n - 1,
                "permute": 1,
            }[self.kind]
        )


@dataclass(frozen=True)
class Cost:
    """The cost of a step on each device; prints as a table."""

    collectives: tuple[CollectiveCost, ...]
    layers: int
    devices: int
    operations: float  # of one device
    weights: float  # bytes stored on one device
    seconds: float  # the larger of compute and memory time
    communication: float  # seconds of collectives, without overlap with compute

    @property
    def traffic(self) -> float:
        """Bytes that a device sends."""
        return sum(one.traffic for one in self.collectives)

    @property
    def efficiency(self) -> float:
        """The fraction of the time that is not communication: 1 is perfect scaling."""
        return self.seconds / (self.seconds + self.communication) if self.seconds else 0.0

    def per_layer(self, axis: str, phase: str) -> int:
        """Number of collectives per layer over an axis, of every kind."""
        calls = {
            one.kind: one.calls
            for one in self.collectives
            if one.axis == axis and one.phase == phase
        }
        return sum(n // self.layers for n in calls.values())

    def __str__(self) -> str:
        rows = [("axis", "collective", "phase", "calls", "bytes each", "sent")]
        rows += [
            (s.axis, s.kind, s.phase, str(s.calls), f"{s.nbytes:,.0f}", f"{s.traffic:,.0f}")
            for s in self.collectives
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        told = (
            f"{self.devices} devices: {self.weights / 2**30:.3g} GiB of weights each, "
            f"{self.operations:.3g} operations"
        )
        times = (
            f"{self.seconds * 1e3:.3g} ms of compute, {self.communication * 1e3:.3g} ms of "
            "communication"
        )
        times = f"{times}, {self.efficiency:.0%} efficient"
        return "\n".join([*lines, told, times])

    __repr__ = __str__


@door
def cost(
    config: Config,
    mesh: Mesh | dict[str, int],
    *,
    tokens: int = 1,
    rows: int = 1,
    training: bool = False,
    sharded: bool = False,
    nbytes: int = 2,
    flops: float = 400e12,
    memory: float = 3e12,
    bandwidth: float = 300e9,
    latency: float = 5e-6,
) -> Cost:
    """The collectives and the estimated time of a step of a decoder on a mesh.

    Args:
        config: sizes.
        mesh: a mesh, or names and sizes of its axes: {"data": 8, "tensor": 8, "context": 1}.
        tokens: new tokens per row: 1 is a decode step.
        rows: batch size over all devices; they are divided over "data".
        training: include the backward pass and the reduction of gradients over "data" and
            "context".
        sharded: by `fsdp`: weights are gathered over "data" forward and backward, gradients
            scattered.
        nbytes: bytes per element.
        flops, memory, bandwidth, latency: of one device: operations per second, bytes of memory per
            second, bytes per second to others, seconds per message. The defaults are those of an
            accelerator of 2024 with its fast links.

    Example:
        >>> found = cost(Config(), {"tensor": 2}, training=True)
        >>> found.per_layer("tensor", "forward"), found.per_layer("tensor", "backward")
        (2, 2)

    Law: calls per layer equal those that processes make (tests/distributed:
        test_the_cost_of_a_layer_is_what_is_counted).
    """
    sizes = dict(mesh) if isinstance(mesh, dict) else axes_of(mesh)
    for name, size in sizes.items():
        if name not in (DATA, TENSOR, CONTEXT) or not isinstance(size, int) or size < 1:
            remedy = "The decoder knows these axes."
            errors.fail(
                "cost",
                "mesh",
                "of 'data', 'tensor' and 'context', 1 device or more each",
                {name: size},
                remedy,
            )
    d, t, c = (sizes.get(name, 1) for name in (DATA, TENSOR, CONTEXT))
    if rows % d or (c > 1 and tokens % (2 * c)):
        remedy = f"{rows} rows and {tokens} tokens do not divide by {d} and 2 x {c}."
        errors.fail(
            "cost", "rows and tokens", "such that the devices divide them", (rows, tokens), remedy
        )
    L, here = config.layers, tokens // c * (rows // d)  # tokens of this device
    layer, ends = _sizes(config)
    found: list[CollectiveCost] = []
    add = lambda axis, kind, phase, calls, n, size: (
        found.append(CollectiveCost(axis, kind, phase, calls, n, size)) if n > 1 and calls else None
    )
    activation = here * config.width * nbytes
    add(TENSOR, "all_reduce", "forward", 2 * L, t, activation)
    each = [of_layer(config, config.layer_spec(i)) for i in range(L)]
    sizes_of_head = sum(sum(one.head_sizes) for one in each) / L
    keys = sum(max(1, one.kv_heads // t) * sum(one.head_sizes) for one in each) / L
    keys *= here * nbytes
    if tokens > 1:
        add(CONTEXT, "permute", "forward", (c - 1) * 2 * L, c, keys / 2)
    else:
        add(
            CONTEXT,
            "all_reduce",
            "forward",
            3 * L,
            c,
            here * config.heads // t * (config.head_sizes[1] + 2) * 4 / 3,
        )
    per_leaf = _leaves(config)
    if sharded:
        add(
            DATA,
            "all_gather",
            "forward",
            per_leaf["matrices"] * L,
            d,
            layer["matrices"] / per_leaf["matrices"] / t / d * nbytes,
        )
    if training:
        add(TENSOR, "all_reduce", "backward", 2 * L, t, activation)
        add(CONTEXT, "permute", "backward", (c - 1) * 2 * L, c, keys / 2)
        if sharded:
            add(
                DATA,
                "reduce_scatter",
                "backward",
                per_leaf["matrices"] * L,
                d,
                layer["matrices"] / per_leaf["matrices"] / t * nbytes,
            )
            add(
                DATA,
                "all_reduce",
                "backward",
                per_leaf["vectors"] * L,
                d,
                layer["vectors"] / per_leaf["vectors"] * nbytes,
            )
        else:
            leaves = per_leaf["matrices"] + per_leaf["vectors"]
            add(
                DATA,
                "all_reduce",
                "backward",
                leaves * L,
                d,
                (layer["matrices"] / t + layer["vectors"]) / leaves * nbytes,
            )
        leaves, whole = (
            per_leaf["matrices"] + per_leaf["vectors"],
            layer["matrices"] / t + layer["vectors"],
        )
        add(
            CONTEXT,
            "all_reduce",
            "backward",
            leaves * L,
            c,
            whole / leaves * nbytes / (d if sharded else 1),
        )
    weights = (layer["matrices"] * L + ends) / t + layer["vectors"] * L
    operations = 2 * here * weights * (3 if training else 1)
    operations += (
        2 * here * tokens / 2 * config.heads * sizes_of_head / t * L * (3 if training else 1)
    )
    kept = weights / (d if sharded else 1) * nbytes
    seconds = max(operations / flops, weights * nbytes / memory)
    communication = sum(one.traffic / bandwidth + one.messages * latency for one in found)
    return Cost(tuple(found), L, d * t * c, operations, kept, seconds, communication)


def _sizes(config: Config) -> tuple[dict[str, float], float]:
    """Elements of the matrices and vectors of a layer, on average, and of other weights."""
    wanted = shapes(config)
    found = {"matrices": 0.0, "vectors": 0.0}
    for layer in wanted.layers:
        for shape in layer:
            if shape:
                found["matrices" if len(shape) > 1 else "vectors"] += (
                    math.prod(shape) / config.layers
                )
    table: Weight = wanted.embedding
    return found, math.prod(table) * (1 if config.tied else 2)


def _leaves(config: Config) -> dict[str, int]:
    """Numbers of matrices and vectors of a layer."""
    first = [shape for shape in shapes(config).layers[0] if shape]
    matrices = sum(len(shape) > 1 for shape in first)
    return {"matrices": matrices, "vectors": max(1, len(first) - matrices)}
