"""GPTQ: codes packed along the inputs, zero points, and the group of each input.

    qweight (K b / 32, N)   scales (G, N)   qzeros (G, N b / 32)   g_idx (K,)
    w[n, k] = (code[k, n] - zero[g_idx[k], n]) scales[g_idx[k], n]

checkpoint_format "gptq" stores words of zero points less one in each code, as whole integers;
"gptq_v2" stores them as they are. With act-order (desc_act) the groups are of inputs that are not
neighbours: they become neighbours by a permutation, which the record keeps.

Source: Frantar et al., GPTQ, arXiv:2210.17323; the modules of GPTQModel and AutoGPTQ.
"""

from collections.abc import Mapping, Sequence

import torch

from ....layers import Weight
from ...families.tables import Json
from . import codes
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

CHANGES = ("rotation", "adapter", "is_marlin_format")  # what changes the product or the layout


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of GPTQ."""
    for field in CHANGES:
        if settings.get(field):
            wrong(f"{field} in {SETTINGS}", "absent", repr(settings[field])[:200], CONVERT)
    said(settings, "pack_dtype", ["int32"], "int32")
    said(settings, "format", ["gptq", "gptq_v2"], "gptq")
    modules = tensors.ending(".qweight")
    own = _overrides(modules, settings)
    return [_one(module, {**settings, **own.get(module, {})}, tensors) for module in modules]


def _one(module: str, own: Mapping[str, Json], tensors: Tensors) -> Stored:
    bits = said(own, "bits", [2, 4, 8], 4)
    kind = said(own, "checkpoint_format", ["gptq", "gptq_v2"], own.get("format") or "gptq")
    names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    rows, N = tensors.shape(names["qweight"], WORDS, (None, None))
    K = rows * 32 // bits
    size = group_of(own, K, names["qweight"])
    if N * bits % 32:
        tensors.refuse(names["qweight"], f"of a multiple of {32 // bits} outputs", (rows, N))
    tensors.shape(names["scales"], FLOATS, (K // size, N))
    tensors.shape(names["qzeros"], WORDS, (K // size, N * bits // 32))
    order = f"{module}.g_idx"
    if order in tensors.found or (own.get("desc_act") and size < K):
        tensors.shape(order, ("I32", "I64"), (K,))
        names["g_idx"] = order

    def read(tensor: Read) -> Weight | Dense:
        by_column = codes.bytes_of(tensor(names["qweight"]).mT)  # (N, K bits / 8)
        words = tensor(names["qzeros"])
        if kind == "gptq":
            words = words.view(torch.int32) + codes.ONES[bits]
        points = codes.unpacked(codes.bytes_of(words), bits).mT.contiguous()
        scale = tensor(names["scales"]).mT.contiguous()
        group = tensor(order).long() if "g_idx" in names else None
        plain = torch.arange(K) // size
        if group is not None and not torch.equal(group, plain):
            if group.min() < 0 or group.max() >= K // size:
                tensors.refuse(order, f"of groups 0 to {K // size - 1}", "others")
            return codes.ordered(codes.unpacked(by_column, bits), scale, points, group, bits)
        if bits == 8:
            return codes.eight_bits(by_column, scale, points)
        pairs = by_column if bits == 4 else codes.paired(codes.unpacked(by_column, bits))
        return codes.four_bits(pairs, scale, points)

    return Stored(f"{module}.weight", (N, K), tuple(names.values()), read)


def _overrides(
    modules: Sequence[str], settings: Mapping[str, Json]
) -> dict[str, Mapping[str, Json]]:
    """Module -> its own settings: those of the first pattern of `dynamic` that matches it.

    Patterns of modules that are not quantized ("-:") say nothing more: these have no codes.
    """
    rules = settings.get("dynamic") or {}
    if not isinstance(rules, dict) or len(rules) > MAX_PATTERNS:
        wrong(f"dynamic in {SETTINGS}", f"at most {MAX_PATTERNS} patterns", repr(rules)[:200])
    found: dict[str, Mapping[str, Json]] = {}
    for pattern, rule in rules.items():
        if not isinstance(rule, dict):
            wrong(f"dynamic in {SETTINGS}", "patterns with settings", repr(rule)[:200])
        if not pattern.startswith("-:"):
            for module in beginning(pattern.removeprefix("+:"), modules, "dynamic"):
                found.setdefault(module, rule)
    return found
