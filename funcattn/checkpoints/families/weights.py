"""Tensors by their names in a file to Params and back. A leaf goes by its path (`layers.0.q`), as
in funcattn.tree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import transformer
from ...core.errors import fail
from ...layers import Weight
from ...records import ABSENT, is_absent
from ...transformer import Config, Layer, Params
from .tables import CheckpointError, Pack, Spelling

PLAIN = Pack((), (), lambda config, tensors: tensors, lambda config, leaves: leaves)


@dataclass(frozen=True)
class Source:
    """Tensors of a file, and the leaves that are made of them."""

    paths: tuple[str, ...]
    names: tuple[str, ...]
    pack: Pack

    @property
    def is_changed(self) -> bool:
        """True where the tensors are joined, split or transposed leaves, not the leaves
        themselves.
        """
        return self.pack is not PLAIN


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Path -> the shape that the leaf must have."""
    return leaves(transformer.shapes(config))


def spelling(tensors: Mapping[str, str], path: str) -> str:
    """The name on disk of the leaf at a path.

    Example:
        >>> spelling({"layers.{}.q": "blk.{}.attn_q.weight"}, "layers.3.q")
        'blk.3.attn_q.weight'
    """
    number, template = _template(path)
    if template not in tensors:
        fail(
            "load",
            path,
            "a leaf that the family has a name for",
            "none",
            "It is another family's.",
            CheckpointError,
        )
    return tensors[template].format(number)


def _template(path: str) -> tuple[int, str]:
    found = re.match(r"layers\.(\d+)\.", path)
    return (int(found[1]), f"layers.{{}}.{path[found.end() :]}") if found else (0, path)


def locate_tensors(family: Spelling, config: Config) -> list[Source]:
    """The tensors of a family's files that each leaf of a Config is read from, in the order of the
    computation.
    """
    needed = shapes(config)
    found, done = [], set[str]()
    for path, shape in needed.items():
        if path in done:
            continue
        number, template = _template(path)
        layouts = (
            pack for pack in family.packs if template in pack.paths and pack.applies(config, number)
        )
        pack = next(layouts, None)
        if pack is None:
            found.append(Source((path,), (spelling(family.tensors, path),), PLAIN))
            continue
        paths = tuple(other.format(number) for other in pack.paths)
        experts = range(shape[0]) if "{expert}" in pack.names[0] else (0,)
        names = tuple(
            name.replace("{}", str(number))
            .replace("{before}", str(number - 1))
            .replace("{last}", str(config.layers - 1))
            .replace("{expert}", str(i))
            for name in pack.names
            for i in experts
        )
        found.append(Source(paths, names, pack))
        done |= set(paths)
    return found


def in_layout(
    config: Config, from_: Sequence[Source], found: Mapping[str, tuple[int, ...]]
) -> list[Source]:
    """Sources with another layout of their pack where the shapes in a file are those of it.

    Args:
        found: name -> shape in the file.
    """
    needed = shapes(config)

    def fits(source: Source) -> bool:
        names = _wanted(config, [source], needed)
        return all(found.get(name) == size for name, size in names.items())

    def chosen(source: Source) -> Source:
        other = source
        while other.pack.other is not None:
            if fits(other):
                return other
            other = replace(other, pack=other.pack.other)
        return other if other is source or fits(other) else source

    return [chosen(source) for source in from_]


def wanted(config: Config, from_: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """Name -> the shape that the file must have."""
    return _wanted(config, from_, shapes(config))


def _wanted(
    config: Config, from_: Sequence[Source], needed: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    found = {}
    for source in from_:
        tensors = source.pack.pack(
            config, [torch.empty(needed[path], device="meta") for path in source.paths]
        )
        found |= {
            name: tuple(tensor.shape) for name, tensor in zip(source.names, tensors, strict=True)
        }
    return found


def match(
    needed: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise one error with every difference between the tensors that are needed and those of a
    file.

    Args:
        needed: name -> shape of what must be there.
        found: name -> shape of what is there, less what is harmless.
        where: the file, for the message.
    """
    missing = [name for name in needed if name not in found]
    extra = sorted(found.keys() - needed.keys())
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in needed.items()
        if name in found and found[name] != shape
    ]
    differences = [
        f"{kind}: {_some(items)}"
        for kind, items in (("missing", missing), ("unknown", extra), ("of another shape", wrong))
        if items
    ]
    if differences:
        remedy = "The file is incomplete, or its configuration is that of another model."
        fail(
            "load",
            f"tensors of {where}",
            "those of its configuration",
            "; ".join(differences),
            remedy,
            CheckpointError,
        )


def _some(items: list[str], shown: int = 20) -> str:
    """A list for a message, its end left out where it is long."""
    return ", ".join(items[:shown]) + (
        f" and {len(items) - shown} more" if len(items) > shown else ""
    )


def unpack(config: Config, from_: Sequence[Source], read: Callable[[str], Tensor]) -> Params:
    """Params from the tensors of a file, each read once, in the order of `by_columns`."""
    found = {}
    for source in from_:
        leaves = source.pack.unpack(config, [read(name) for name in source.names])
        found |= {path: by_columns(leaf) for path, leaf in zip(source.paths, leaves, strict=True)}
        del leaves  # before the next are read
    return assemble(config, found.__getitem__)


def by_columns(weight: Weight) -> Weight:
    """The same values, a matrix of floats in column-major order.

    Matrix-vector products of a decode step are faster on it: all linears of SmolLM2 take 26 ms
    instead of 34 on one thread, 31 instead of 40 on two; products with more rows are no slower.
    """
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2
    return weight.mT.contiguous().mT if is_matrix else weight


def pack(config: Config, to: Sequence[Source], leaves: Mapping[str, Weight]) -> dict[str, Weight]:
    """The tensors of a file, by name, from leaves by path."""
    found = {}
    for source in to:
        found |= dict(
            zip(
                source.names,
                source.pack.pack(config, [leaves[path] for path in source.paths]),
                strict=True,
            )
        )
    return found


LAST = ("head", "head_bias")  # of the computation


def leaves(params: Params) -> dict[str, Weight]:
    """Path -> leaf, in the order of the computation. What is absent is left out."""
    found = {"embedding": params.embedding, "positions": params.positions}
    for number, layer in enumerate(params.layers):
        found |= {
            f"layers.{number}.{name}": leaf for name, leaf in zip(Layer._fields, layer, strict=True)
        }
    ends = (name for name in Params._fields if name not in (*found, "layers"))
    found |= {name: getattr(params, name) for name in sorted(ends, key=LAST.__contains__)}
    return {path: leaf for path, leaf in found.items() if not is_absent(leaf)}


def assemble(config: Config, leaf: Callable[[str], Weight]) -> Params:
    """The tree whose leaf at each path is `leaf(path)`: `leaves(assemble(config,
    leaves(params).get)) == leaves(params)`.
    """
    needed = transformer.shapes(config)
    one = lambda path, shape: ABSENT if is_absent(shape) else leaf(path)
    rows = (
        Layer(
            *(
                one(f"layers.{number}.{name}", shape)
                for name, shape in zip(Layer._fields, layer, strict=True)
            )
        )
        for number, layer in enumerate(needed.layers)
    )
    layers = tuple(rows)
    ends = {name: one(name, getattr(needed, name)) for name in Params._fields if name != "layers"}
    return Params(layers=layers, **ends)
