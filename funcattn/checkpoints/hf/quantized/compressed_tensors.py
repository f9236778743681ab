"""compressed-tensors: config_groups say of modules how their weights are stored.

    pack-quantized       weight_packed (N, K b / 32), weight_scale (N, G), weight_shape (2,),
                         weight_zero_point (N b / 32, G): w = (code - 2^(b-1) - zero) scale
    int-quantized        weight int8 (N, K), weight_scale of rows, groups or one, weight_zero_point
    float-quantized      weight float8 (N, K), weight_scale of rows, blocks or one
    nvfp4-pack-quantized weight_packed (N, K / 2), weight_scale float8 (N, K / 16),
                         weight_global_scale (1,): w = fp4[code] weight_scale / weight_global_scale
    mxfp4-pack-quantized weight_packed (N, K / 2), weight_scale (N, K / 32), exponents of 2

Activations are not rounded here, whatever input_activations says.

Source: the compressors of github.com/vllm-project/compressed-tensors.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from ....layers import Weight
from ...families.tables import Json
from . import codes, float8
from .stored import (
    CONVERT,
    FLOATS,
    MAX_PATTERNS,
    SETTINGS,
    WORDS,
    Dense,
    Read,
    Stored,
    Tensors,
    beginning,
    group_of,
    said,
    wrong,
)

PACKED, PLAIN = ".weight_packed", ".weight"
OF_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
)
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
Args = Mapping[str, Json]


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of compressed-tensors."""
    said(settings, "format", FORMATS, None)
    said(settings, "quantization_status", ["compressed", "frozen"], "compressed")
    for field in ("sparsity_config", "transform_config"):
        given = settings.get(field)
        if given and not (isinstance(given, dict) and given.get("format") == "dense"):
            wrong(f"{field} in {SETTINGS}", "absent", repr(settings[field])[:200], CONVERT)
    coded = [
        module
        for module in tensors.ending(PLAIN)
        if tensors.found[module + PLAIN].type in ("I8", *float8.EIGHT)
    ]
    modules = [*tensors.ending(PACKED), *coded]
    ignored = settings.get("ignore") or []
    if not isinstance(ignored, list):
        wrong(f"ignore in {SETTINGS}", "a list of names", repr(ignored)[:200])
    for name in ignored:
        if name in modules:
            wrong(f"ignore in {SETTINGS}", f"without {name}, which has codes", "it in there")
    schemes = _schemes(settings, modules)
    return [_one(module, schemes[module], tensors) for module in modules]


def _schemes(settings: Mapping[str, Json], modules: Sequence[str]) -> dict[str, Args]:
    """Module -> the arguments of its weights: by its name, else by a pattern, else by its class."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(one, dict) for one in groups.values()):
        wrong(f"config_groups in {SETTINGS}", "groups of modules", repr(groups)[:200], CONVERT)
    ranked: tuple[dict[str, Args], ...] = ({}, {}, {})
    patterns = 0
    for group in groups.values():
        weights = group.get("weights")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            wrong(f"targets in {SETTINGS}", "names", repr(targets)[:200], CONVERT)
        if weights is None:
            continue  # of activations alone
        if not isinstance(weights, dict):
            wrong(f"weights in {SETTINGS}", "an object", repr(weights)[:200], CONVERT)
        for target in targets:
            if target.startswith("re:"):
                patterns += 1
                if patterns > MAX_PATTERNS:
                    wrong(f"targets in {SETTINGS}", f"at most {MAX_PATTERNS} patterns", "more")
                rank, chosen = 1, beginning(target[3:], modules, "targets")
            elif target in ("Linear", "Embedding"):
                is_embedding = lambda module: module.rpartition(".")[2].startswith("embed")
                rank = 2
                chosen = [one for one in modules if is_embedding(one) == (target == "Embedding")]
            else:
                rank, chosen = 0, [target] if target in modules else []
            for module in chosen:
                ranked[rank].setdefault(module, weights)
    found = {**ranked[2], **ranked[1], **ranked[0]}
    for module in modules:
        if module not in found:
            wrong(f"targets in {SETTINGS}", f"with {module}, which has codes", "without it")
    return found


def _one(module: str, args: Args, tensors: Tensors) -> Stored:
    said(args, "dynamic", [False], False)
    said(args, "actorder", ["group", "weight", "static", "dynamic", False], False)
    kind, bits = said(args, "type", ["int", "float"], "int"), said(args, "num_bits", [4, 8], 8)
    packed = module + PACKED in tensors.found
    if kind == "float" and bits == 4:
        made = _fp4(module, args, tensors)
    elif packed and kind == "int":
        made = _packed(module, args, tensors, bits)
    else:
        made = _plain(module, args, tensors, kind)
    others = [f"{module}.{part}" for part in OF_ACTIVATIONS]
    parts = (*made.parts, *(name for name in others if name in tensors.found))
    return Stored(made.name, made.shape, parts, made.read)


def _grid(args: Args, tensors: Tensors, scale: str, N: int, K: int) -> tuple[int, int]:
    """Rows and columns of a block with one scale, whose number in the file is checked."""
    size = args.get("group_size")
    grouped = isinstance(size, int) and size > 0
    usual = "group" if grouped else "tensor" if size is None else "channel"
    strategy = said(
        args, "strategy", ["tensor", "channel", "group", "block", "tensor_group"], usual
    )
    block = args.get("block_structure")
    if strategy == "block" and not float8.is_block(block):
        wrong(f"block_structure in {SETTINGS}", "two sizes", repr(block), CONVERT)
    of_groups = (1, group_of(args, K, scale)) if "group" in strategy else (1, K)
    rows, columns = {"tensor": (N, K), "block": block}.get(strategy) or of_groups
    wanted = (-(-N // rows), -(-K // columns))
    given = tensors.shape(scale, FLOATS)
    flat = {"tensor": [(), (1,)], "channel": [(N,)]}.get(strategy, [])
    if given not in [wanted, *flat]:
        tensors.refuse(scale, f"of shape {wanted} for ({N}, {K}) by {strategy}", given)
    return rows, columns


def _packed(module: str, args: Args, tensors: Tensors, bits: int) -> Stored:
    packed, scale = module + PACKED, f"{module}.weight_scale"
    zero, shape, order = (f"{module}.weight_{part}" for part in ("zero_point", "shape", "g_idx"))
    N, words = tensors.shape(packed, WORDS, (None, None))
    K = words * 32 // bits
    rows, columns = _grid(args, tensors, scale, N, K)
    if rows > 1 and N > 1 and rows != N:
        wrong(f"strategy in {SETTINGS}", "'group', 'channel' or 'tensor'", "'block'", CONVERT)
    G = K // columns
    tensors.shape(shape, ("I64", "I32"), (2,))
    symmetric = said(args, "symmetric", [True, False], True)
    parts = [packed, scale, shape]
    if not symmetric:
        tensors.shape(zero, WORDS, (-(-N * bits // 32), G))
        parts.append(zero)
    if order in tensors.found:
        tensors.shape(order, ("I32", "I64"), (K,))
        parts.append(order)

    def read(tensor: Read) -> Weight | Dense:
        if (told := tensor(shape).tolist()) != [N, K]:
            tensors.refuse(shape, f"{[N, K]}, as {packed} has it", told)
        coded = codes.bytes_of(tensor(packed))
        by = tensor(scale).reshape(-1, G).expand(N, G).contiguous()
        points = _points(tensor, None if symmetric else zero, bits, N)
        if order in parts and not torch.equal(tensor(order).long(), torch.arange(K) // columns):
            group = tensor(order).long()
            if group.min() < 0 or group.max() >= G:
                tensors.refuse(order, f"of groups 0 to {G - 1}", "others")
            return codes.ordered(codes.unpacked(coded, bits), by, points, group, bits)
        return (codes.four_bits if bits == 4 else codes.eight_bits)(coded, by, points)

    return Stored(module + PLAIN, (N, K), tuple(parts), read)


def _points(tensor: Read, name: str | None, bits: int, N: int) -> torch.Tensor | int:
    """Zero points of codes that begin at 0, (N, G): packed like the codes, along the outputs."""
    if name is None:
        return 2 ** (bits - 1)
    return codes.unpacked(codes.bytes_of(tensor(name).mT), bits).mT[:N].contiguous()


def _plain(module: str, args: Args, tensors: Tensors, kind: str) -> Stored:
    """int8 and float8 codes in the place of the weight."""
    name, scale = module + PLAIN, f"{module}.weight_scale"
    said(args, "num_bits", [8], 8)
    types = float8.EIGHT if kind == "float" else ("I8",)
    N, K = tensors.shape(name, types, (None, None))
    rows, columns = _grid(args, tensors, scale, N, K)
    zero = f"{module}.weight_zero_point"
    shifted = not said(args, "symmetric", [True, False], True)
    sizes = (-(-N // rows), -(-K // columns))
    if shifted or zero in tensors.found:
        given = tensors.shape(zero, ("I8", "F8_E4M3"))
        if given != tensors.found[scale].shape:
            tensors.refuse(zero, f"of shape {tensors.found[scale].shape}", given)

    def read(tensor: Read) -> Weight | Dense:
        by, coded = tensor(scale).reshape(sizes), tensor(name)
        if zero in tensors.found and (points := tensor(zero).reshape(sizes)).float().any():
            if kind == "float" or rows not in (1, N):
                tensors.refuse(zero, "of zeros", "others")
            spread = by.expand(N, -1).contiguous(), points.expand(N, -1).contiguous()
            return codes.eight_bits(coded, *spread)
        return codes.scaled_by_blocks(coded, by, rows, columns)

    parts = [name, scale, *([zero] if zero in tensors.found else [])]
    return Stored(name, (N, K), tuple(parts), read)


def _fp4(module: str, args: Args, tensors: Tensors) -> Stored:
    """4-bit floats with scales in float8 and one for all, or with powers of 2."""
    names = [module + PACKED, f"{module}.weight_scale", f"{module}.weight_global_scale"]
    N, half = tensors.shape(names[0], ("U8",), (None, None))
    size = said(args, "group_size", [16, 32], 16)
    said(args, "symmetric", [True], True)
    if 2 * half % size:
        tensors.refuse(names[0], f"of groups of {size} columns", (N, half))
    types = ("F8_E4M3",) if size == 16 else ("U8", "F8_E8M0")
    tensors.shape(names[1], types, (N, 2 * half // size))
    if size == 16:
        tensors.shape(names[2], ("F32",), (1,))

    def nvfp4(tensor: Read) -> Weight | Dense:
        return codes.two_level_fp4(*map(tensor, names))

    def mxfp4(tensor: Read) -> Weight | Dense:
        return codes.fp4(tensor(names[0]), codes.powers(tensor(names[1]).view(torch.uint8)))

    read: Callable[[Read], Weight | Dense] = nvfp4 if size == 16 else mxfp4
    return Stored(module + PLAIN, (N, 2 * half), tuple(names[: 3 if size == 16 else 2]), read)
