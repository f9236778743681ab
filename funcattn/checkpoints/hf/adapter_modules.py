"""The modules of an original model that PEFT adapts, and the leaves that are cut from each.

A module of (out, in) is one leaf or several: q, k and v may be rows of one matrix, or stand in
another order (rotary features that are neighbours). B and the magnitudes of an adapter have the
rows of the module, so a leaf takes those that its own rows are; A is that of all of them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import fail
from ...records import is_absent
from ...transformer import Config, Params
from .. import families
from ..families import PLAIN, Family, Source
from ..regular_files import read_json

ADAPTED = {  # leaves that go through layers.linear or layers.embed
    *("q", "k", "v", "o", "gate", "up", "down", "embedding", "head"),
    *("shared_gate", "shared_up", "shared_down", "shared_router"),
}
PREFIX = "base_model.model."  # PEFT's prefix of a model's names
LLAMA = families.LLAMA.tensors


class Module(NamedTuple):
    """A module of the original, and the leaves that are rows of it.

    rows: for each path the rows of the module that its leaf is, in order; None for all, as they
    are.
    """

    paths: tuple[str, ...]
    rows: tuple[Tensor | None, ...]


class Original(NamedTuple):
    """The names of a model in PEFT's files.

    modules: name -> what can be adapted. stored: name of a tensor -> the leaves that are in it.
    """

    modules: dict[str, Module]
    stored: dict[str, Source]


def original(
    function: str,
    params: Params,
    config: Config | None,
    family: str | None,
    base: object,
    named: Iterable[str] = (),
) -> Original:
    """The names of the original of params.

    Args:
        function: for errors.
        params: of the model.
        config: of the model; None takes the names of Llama, with one matrix a projection.
        family: model_type of the original; None is that of a folder `base`, else of the first
            family that expresses the config, which is what `fa.save` writes, and has the names.
        base: a path or a name, as an adapter says it.
        named: modules that the original has.
    """
    if config is None:
        if family is not None:
            remedy = "Give it too: config=loaded.config."
            fail(function, "config", "that of the model, beside a family", None, remedy)
        _check_plain(function, params)
        found = {path: LLAMA.get(_template(path)) for path in families.leaves(params)}
        sources = [
            Source((path,), (name.format(*path.split(".")[1:2]),), PLAIN)
            for path, name in found.items()
            if name is not None
        ]
        return _original(sources, None, _shapes(params))
    if not isinstance(config, Config):
        got = f"a {type(config).__name__}"
        fail(function, "config", "a Config", got, "That of fa.load: loaded.config.", TypeError)
    found = _family(family, base)
    if found is not None:
        return _named(config, found, params)
    several = (_named(config, one, params) for one in families.families_for(config))
    fits = (one for one in several if all(module_of(x, one.modules) in one.modules for x in named))
    return next(fits, None) or _named(config, families.family_for(config), params)


def _named(config: Config, family: Family, params: Params) -> Original:
    return _original(families.locate_tensors(family, config), config, _shapes(params))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in families.leaves(params).items()}


def _original(
    sources: Sequence[Source], config: Config | None, shapes: Mapping[str, tuple[int, ...]]
) -> Original:
    modules = {}
    for source in sources:
        stored = source.names[0]
        name = stored.removesuffix(".weight")
        leaves = {path.rpartition(".")[2] for path in source.paths}
        if len(source.names) > 1 or not leaves <= ADAPTED or name == stored:
            continue
        if any(len(shapes.get(path, ())) != 2 for path in source.paths):  # of experts
            continue
        if config is None or not source.is_changed:
            rows: tuple[Tensor | None, ...] | None = (None,) * len(source.paths)
        else:
            rows = _rows(config, source, shapes)
        if rows is not None:
            modules[name] = Module(source.paths, rows)
    return Original(modules, {source.names[0]: source for source in sources})


def _rows(
    config: Config, source: Source, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, ...] | None:
    """The rows of a module that each leaf is, found by unpacking numbered rows; None where leaves
    are no rows of it.
    """
    sizes = [shapes[path] for path in source.paths]
    out = sum(rows for rows, *_ in sizes)
    columns = 2 if out != 2 else 3
    numbered = torch.arange(out * columns).reshape(out, columns)
    for probe in (numbered, numbered.mT):  # the file may hold the transpose
        try:
            leaves = source.pack.unpack(config, [probe])
        except RuntimeError:  # of other sizes
            continue
        each = torch.arange(columns)
        if all(
            tuple(leaf.shape) == (size[0], columns) and bool((leaf - leaf[:, :1] == each).all())
            for leaf, size in zip(leaves, sizes, strict=True)
        ):
            return tuple(leaf[:, 0] // columns for leaf in leaves)
    return None


def _family(name: str | None, base: object) -> Family | None:
    """The family of a name, or of a folder that is there."""
    if name is not None:
        return families.family_of(name, "family of load_lora and save_lora")
    if isinstance(base, str) and base and os.path.isfile(Path(base) / "config.json"):
        said = families.tower_settings(read_json(Path(base) / "config.json")).get("model_type")
        return families.FAMILIES.get(said) if isinstance(said, str) else None
    return None


def _template(path: str) -> str:
    first, _, rest = path.partition(".")
    return path if first != "layers" else f"layers.{{}}.{rest.partition('.')[2]}"


def _check_plain(function: str, params: Params) -> None:
    """Raise where params are of a family whose names or matrices are not Llama's."""
    if not isinstance(params, Params):
        got = f"a {type(params).__name__}"
        fail(function, "params", "the Params of a decoder", got, "Such as those of fa.load.")
    strange = {
        "positions": not is_absent(params.positions),
        "norm_bias": not is_absent(params.norm_bias),
        "no gate": any(is_absent(layer.gate) for layer in params.layers),
        "one norm a layer": any(
            is_absent(layer.feed_forward_norm) and is_absent(layer.feed_forward_after_norm)
            for layer in params.layers
        ),
    }
    if found := [what for what, is_there in strange.items() if is_there]:
        remedy = "Its family has other names and matrices: give config=loaded.config."
        wanted = "that of the model, where params are not Llama's"
        fail(function, "config", wanted, f"None, and params with {found[0]}", remedy)


def module_of(name: str, names: Mapping[str, object]) -> str:
    """The name of a module or tensor of PEFT's as it is among `names`, also of a model that takes
    images too.
    """
    bare = name.removeprefix(PREFIX)
    return bare if bare in names else families.tower_name(bare) or bare
