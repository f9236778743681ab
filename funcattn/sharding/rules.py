"""Sharding rules for the decoder, from the table in `transformer.partition`, and specs of a tree.

`tensor_parallel` and `fsdp` return rules; `specs` applies rules to every leaf of a tree, checks
sizes, and supports the records of this library. `fsdp` shards every matrix over "data" too, along
the axis that "tensor" does not shard; the decoder gathers a layer when it needs it.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from collections.abc import Iterator

import optree
from torch import Tensor

from .. import layers, tree
from ..core import errors
from ..core.doors import door
from ..layers import Weight
from ..low_rank import Lora, LoraStack
from ..quantization import RECORDS
from ..records import is_absent
from ..transformer import DATA, TENSOR, Config, Layer, of_layer, shapes
from ..transformer.partition import CUTS, Division, division
from ..tree import Tree
from .mesh import Mesh, P, PartitionSpec, Rule, Rules, axes_of, pieces


def tensor_parallel(config: Config | None = None, *, size: int | None = None) -> tuple[Rule, ...]:
    """Tensor parallelism over the axis "tensor".

    Args:
        config: heads are kept whole, and layers of experts are recognized. None uses only the paths
            of the weights; heads split between devices then raise when the model runs.
        size: devices along "tensor". If config has fewer key/value heads, they are replicated (each
            device computes those that its query heads read, and their gradients are summed), if the
            number of heads divides the number of devices.

    Example:
        >>> from funcattn.sharding import specs, Grid
        >>> from funcattn.transformer import decoder
        >>> from funcattn.randomness import key
        >>> config = Config(layers=1)
        >>> specs(decoder(config).init(key(0)), Grid(tensor=2), tensor_parallel(config)).layers[0].o
        P(None, 'tensor')
    """
    return _rules(config, size, None)


def fsdp(config: Config | None = None, *, size: int | None = None) -> tuple[Rule, ...]:
    """Every matrix over "data", and "tensor" if the mesh has it; vectors are replicated.

    Args: as `tensor_parallel`.
    """
    return _rules(config, size, DATA)


def replicated() -> tuple[Rule, ...]:
    """Every leaf replicated: plain data parallelism."""
    return (Rule(r".*", P()),)


def _rules(config: Config | None, size: int | None, data: str | None) -> tuple[Rule, ...]:
    rules = []
    for name in CUTS:
        # from the spec and block to the layers
        ways: dict[tuple[PartitionSpec, int], list[int]] = {}
        for number, rank, experts in _weights(config, name):
            one = None if config is None else of_layer(config, config.layer_spec(number))
            n = 1 if one is None or size is None or size % one.kv_heads else size
            cut = division(one, name, rank, n, experts=experts)
            ways.setdefault((_spec(cut, rank, data), cut.block), []).append(number)
        for (spec, block), numbers in ways.items():
            layers = r"\d+" if len(ways) == 1 else f"({'|'.join(map(str, numbers))})"
            path = rf"layers\.{layers}\.{name}" if name in Layer._fields else name
            rules += [Rule(path, spec, block)] if spec else []
    return (*rules, Rule(r".*", P()))


def _weights(config: Config | None, name: str) -> Iterator[tuple[int, int, bool]]:
    """For each weight of this name: layer index, number of axes, whether the layer has experts."""
    if config is None:  # fsdp shards only matrices
        yield 0, 1 if CUTS[name].data is None else 2, False
        return
    whole = shapes(config)
    records = enumerate(whole.layers) if name in Layer._fields else [(0, whole)]
    for number, record in records:
        shape = getattr(record, name)
        if not is_absent(shape):
            yield number, len(shape), name in Layer._fields and config.layer_spec(number).experts


def _spec(cut: Division, rank: int, data: str | None) -> PartitionSpec:
    """The mesh axes that shard a weight; P() if it is replicated."""
    names = {cut.data: data, cut.tensor: TENSOR}
    spec = [names.get(dim) for dim in range(rank)]
    return P(*spec) if any(spec) else P()


@layers.fields.register(Lora)
def _(weight: Lora, division: layers.layouts.Division) -> Lora:
    rows, columns = (*division, None, None)[:2]
    base, gain = layers.fields(weight.base, division), weight.gain
    fields: Tree = (base, (None, columns), (rows, None), (), gain if is_absent(gain) else (rows,))
    return Lora(*fields)


@layers.fields.register(LoraStack)
def _(weight: LoraStack, division: layers.layouts.Division) -> LoraStack:
    one: Lora = layers.fields(Lora(*weight), division)
    a, b, gain = (None, *one.a), (None, *one.b), weight.gain
    fields: Tree = (one.base, a, b, (None,), gain if is_absent(gain) else (None, *one.gain))
    return LoraStack(*fields)


def _quantized(weight: Weight, division: layers.layouts.Division) -> Tree:
    """Codes and scales sharded like the weight, but a row's scale, which all its shards need."""
    division = (*division, *(None,) * (weight.codes.dim() - len(division)))

    def one(name: str, field: Tensor) -> layers.layouts.Division:
        if name == "order" and division[-1] is not None:
            remedy = "Keep it whole by a rule with P() of its own, or fa.dequantize(params) first."
            wanted = "cut along its rows alone: its inputs are in an order of their own"
            errors.fail("shard", "a weight in act-order", wanted, f"P{division}", remedy)
        if name in ("levels", "order"):
            return *division[:-2], None
        return division[:-1] + (
            (None,) if name != "codes" and field.shape[-1] == 1 else division[-1:]
        )

    return type(weight)(
        *(one(name, field) for name, field in zip(weight._fields, weight, strict=True))
    )


for _record in RECORDS:
    layers.fields.register(_record, _quantized)


def specs_like(state: Tree, params: Tree, cuts: Tree) -> Tree:
    """Specs of a tree with subtrees shaped like params (an optimizer state): theirs, else P().

    Args:
        state: any tree. params: a tree with the structure of the subtrees. cuts: the specs of
            params.
    """
    same = lambda node: optree.tree_structure(node) == optree.tree_structure(params)
    return tree.map(lambda node: cuts if same(node) else P(), state, is_leaf=same)


def is_weight(node: object) -> bool:
    """True for a record that represents a matrix, under the path of the weight."""
    return optree.is_namedtuple(node) and layers.fields.dispatch(
        type(node)
    ) is not layers.fields.dispatch(object)


@door
def specs(params: Tree, mesh: Mesh, rules: Rules | None = None) -> Tree:
    """A tree like params with the spec of each leaf, from rules.

    Args:
        params: weights: tensors, quantized records, adaptations.
        mesh: axes that it lacks become None.
        rules: from `tensor_parallel` or `fsdp`, or custom; None is `tensor_parallel()`.

    Raises:
        ValueError: no rule matches a path, or sizes do not divide: the error names the leaf.
            TypeError: a record that has not registered.
    """
    given: Rules = tensor_parallel() if rules is None else rules
    sizes, known = (
        axes_of(mesh),
        [rule if isinstance(rule, Rule) else Rule(*rule) for rule in given],
    )
    choices = [tree.predicate("shard", rule.path, "rules") for rule in known]

    def one(path: str, weight: Weight) -> Tree:
        rule = next(
            (rule for rule, choose in zip(known, choices, strict=True) if choose(path, weight)),
            None,
        )
        if rule is None:
            remedy = "End the rules with ('.*', P()), which keeps the rest whole."
            errors.fail("shard", "rules", f"one that matches {path!r}", "none", remedy)
        spec = _within(rule.spec, sizes)
        if not isinstance(weight, Tensor) and not is_weight(weight):
            remedy = "Register its type with @funcattn.layers.fields.register."
            errors.fail(
                "shard",
                path,
                "a tensor or a registered record",
                f"a {type(weight).__name__}",
                remedy,
                TypeError,
            )
        shape = _shape(weight)
        if len(spec) not in (0, len(shape)):
            remedy = (
                "Write a rule for this leaf; of a model with experts give "
                "rules=tensor_parallel(config)."
            )
            errors.fail("shard", path, f"of {len(spec)} axes, as {spec} has", shape, remedy)
        _check_blocks(path, shape, spec, sizes, rule.block)
        divided = layers.fields(weight, tuple(spec))
        return tree.map_with_path(
            lambda part, leaf, division: _leaf(
                f"{path}.{part}".rstrip("."), leaf, P(*division), sizes
            ),
            weight,
            divided,
        )

    return tree.map_with_path(one, params, is_leaf=is_weight)


def _within(spec: PartitionSpec, sizes: dict[str, int]) -> PartitionSpec:
    """The spec restricted to the axes of the mesh, in its order."""
    order = list(sizes)

    def entry(dim: int) -> str | tuple[str, ...] | None:
        names = tuple(name for name in spec.names(dim) if name in sizes)
        if [*names] != sorted(names, key=order.index):
            errors.fail(
                "shard",
                "rules",
                f"names in the order of the mesh, {order}",
                names,
                "Outer axes stand first.",
            )
        return None if not names else names[0] if len(names) == 1 else names

    return P(*(entry(dim) for dim in range(len(spec))))


def _shape(weight: Weight) -> tuple[int, ...]:
    if isinstance(weight, (Lora, LoraStack)):
        return _shape(weight.base)
    return tuple(weight.shape)


def _check_blocks(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int], block: int
) -> None:
    for dim in range(len(spec)):
        n = pieces(spec, dim, sizes)
        what = "columns" if dim == len(shape) - 1 and dim else "rows"
        together = block if dim == 0 else 1
        if n > 1 and shape[dim] % (n * together):
            whole = (
                f"{shape[dim] // together} blocks of {together} {what}"
                if together > 1
                else f"{shape[dim]} {what}"
            )
            remedy = (
                "Choose a number of devices that divides them, or a rule that keeps the leaf whole."
            )
            wanted = f"divisible into {n} parts along {'+'.join(spec.names(dim))!r}"
            errors.fail("shard", path, wanted, whole, remedy)


def _leaf(path: str, leaf: Tensor, spec: PartitionSpec, sizes: dict[str, int]) -> PartitionSpec:
    for dim in range(len(spec)):
        n = pieces(spec, dim, sizes)
        if leaf.shape[dim] % n:
            wanted = f"divisible into {n} parts along axis {dim}"
            remedy = (
                "A group of columns is not cut: quantize with a smaller group, or keep the leaf "
                "whole by a rule."
            )
            errors.fail("shard", path, wanted, errors.shape(leaf), remedy)
    return spec
