"""Candidate block sizes by kernel, GPU generation, dtype and features, the best estimate first.

Timing decides which is fastest (`tuning`). The estimates are from machine code, which
tests/ahead.py reads: instructions per pair of query and key, and bytes that a thread spills from
registers. GPUs from Hopper on multiply by warp groups, 4 warps that need 64 rows: with fewer rows
products are split, or use the older instructions at half the rate.
"""

from typing import Any, NamedTuple


class Blocks(NamedTuple):
    """Rows per program, rows of the other side per step, warps per program, and pipeline stages."""

    own: int
    other: int
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """Keyword arguments of Triton's launcher."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


SMALLEST = Blocks(16, 16)  # the minimum of a matrix product
# the key is the largest number of features that an entry applies to
Table = dict[int, tuple[Blocks, ...]]

# of attention, by the larger head size of keys and values

ATTEND: Table = {
    64: (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)),
    128: (
        Blocks(128, 128, 8, 2),
        Blocks(128, 64, 8, 3),
        Blocks(64, 64, 4, 3),
        Blocks(64, 32, 4, 2),
    ),
    256: (Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
}
ATTEND_GROUPS: Table = {
    64: (
        Blocks(128, 64, 4, 3),
        Blocks(128, 128, 8, 3),
        Blocks(64, 128, 4, 3),
        Blocks(64, 64, 4, 3),
    ),
    128: (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    256: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2)),
}
ATTEND_FLOAT32: Table = {
    64: (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
    128: (Blocks(32, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(32, 16, 4, 1)),
    256: (Blocks(32, 16, 8, 1),),
}
ATTEND_FLOAT32_GROUPS: Table = {
    64: (Blocks(128, 32, 8, 1), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 32, 8, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 8, 1)),
    256: (Blocks(32, 16, 8, 1),),
}

# Of attention with its tangent; with larger heads kilobytes of registers are spilled.

ATTEND_JVP: Table = {
    64: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2)),
    128: (Blocks(128, 16, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2)),
}
ATTEND_JVP_GROUPS: Table = {
    64: (Blocks(128, 64, 8, 2), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
}
# two passes issue fewer instructions, or about as many with fewer spilled loads
ATTEND_JVP_FLOAT32: Table = {}

# Of a contraction, by all features read and summed in one block; float32 counts fourfold (3
# products).

CONTRACT: Table = {
    320: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(128, 32, 4, 2), Blocks(64, 32, 4, 2)),
    384: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    448: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    512: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    896: (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 32, 4, 2)),
    1024: (Blocks(128, 16, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 32, 4, 2)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
}
CONTRACT_GROUPS: Table = {
    448: (
        Blocks(128, 64, 8, 2),
        Blocks(64, 64, 4, 2),
        Blocks(128, 128, 8, 2),
        Blocks(64, 32, 4, 2),
    ),
    640: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    # the gradient of keys and values of 128 features, which spills in wide blocks
    768: (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2)),
    896: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    1024: (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2)),
    1280: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    1536: (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 8, 1)),
    1792: (Blocks(128, 16, 8, 2), Blocks(64, 16, 4, 2), Blocks(32, 32, 8, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(64, 16, 4, 2), Blocks(32, 16, 4, 1)),
}
CONTRACT_FLOAT32: Table = {
    640: (Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    1024: (Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
}
CONTRACT_FLOAT32_GROUPS: Table = {
    1600: (Blocks(128, 32, 8, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 8, 1)),
    2048: (Blocks(128, 16, 8, 1), Blocks(64, 16, 4, 1), Blocks(32, 32, 8, 1)),
    2176: (Blocks(64, 16, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 8, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(64, 16, 4, 1), Blocks(32, 16, 4, 1)),
}

# Tables for 16-bit dtypes without and with warp groups, then for float32.

ATTENDS = ATTEND, ATTEND_GROUPS, ATTEND_FLOAT32, ATTEND_FLOAT32_GROUPS
ATTEND_JVPS = ATTEND_JVP, ATTEND_JVP_GROUPS, ATTEND_JVP_FLOAT32, ATTEND_JVP_FLOAT32
CONTRACTS = CONTRACT, CONTRACT_GROUPS, CONTRACT_FLOAT32, CONTRACT_FLOAT32_GROUPS


def of(
    tables: tuple[Table, Table, Table, Table], exact: bool, groups: bool, features: int
) -> tuple[Blocks, ...]:
    """The candidates in a kernel's tables for this number of features; () beyond the table.

    Args:
        tables: 16-bit dtypes without and with warp groups, then float32 without and with.
        exact: whether the dtype is float32.
        groups: whether the GPU multiplies by warp groups.
        features: the number of features.
    """
    table = tables[2 * exact + groups]
    return next((blocks for most, blocks in table.items() if features <= most), ())
