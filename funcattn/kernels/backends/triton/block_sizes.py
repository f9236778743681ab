"""Sizes of blocks worth trying, by kernel, card, dtype and features, the best guess first.

Which is fastest is for a timing to say (`tuning`). The guess is from machine code, which tests/ahead.py reads: instructions for a
pair of a query and a key, and what a thread spills from its registers. Cards from Hopper on multiply by warp groups, 4 warps that
want 64 rows of their own: with fewer rows products are made in smaller pieces, or the old way at half the rate.
"""

from typing import Any, NamedTuple


class Blocks(NamedTuple):
    """Rows that a program owns, rows of the other side it takes at a time, warps that work on it, and loads in flight."""

    own: int
    other: int
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """What Triton's launcher takes."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


SMALLEST = Blocks(16, 16)  # what a matrix product takes
Table = dict[int, tuple[Blocks, ...]]  # by features: the greatest number that an entry is for

# of attend, by the wider of keys and values

ATTEND: Table = {
    64: (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)),
    256: (Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
}
ATTEND_GROUPS: Table = {
    64: (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 128, 4, 3), Blocks(64, 64, 4, 3)),
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

# of attend and its tangent at once; wider heads leave a thread too few registers, and kilobytes are spilled

PUSH: Table = {
    64: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2)),
    128: (Blocks(128, 16, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2)),
}
PUSH_GROUPS: Table = {
    64: (Blocks(128, 64, 8, 2), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
}
PUSH_FLOAT32: Table = {}  # two passes issue fewer instructions, or about as many and fetch less of what was spilled

# of a sweep, by all features that it reads and sums in one block, those of float32 fourfold: they are three products

SWEEP: Table = {
    320: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(128, 32, 4, 2), Blocks(64, 32, 4, 2)),
    384: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    448: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    512: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    896: (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 32, 4, 2)),
    1024: (Blocks(128, 16, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 32, 4, 2)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
}
SWEEP_GROUPS: Table = {
    448: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(128, 128, 8, 2), Blocks(64, 32, 4, 2)),
    896: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    1024: (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2)),
    1280: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    1536: (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 8, 1)),
    1792: (Blocks(128, 16, 8, 2), Blocks(64, 16, 4, 2), Blocks(32, 32, 8, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(64, 16, 4, 2), Blocks(32, 16, 4, 1)),
}
SWEEP_FLOAT32: Table = {
    640: (Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    1024: (Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
}
SWEEP_FLOAT32_GROUPS: Table = {
    1600: (Blocks(128, 32, 8, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 8, 1)),
    2048: (Blocks(128, 16, 8, 1), Blocks(64, 16, 4, 1), Blocks(32, 32, 8, 1)),
    2176: (Blocks(64, 16, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 8, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(64, 16, 4, 1), Blocks(32, 16, 4, 1)),
}

# of numbers of two bytes on older cards and by warp groups, of float32 likewise

ATTENDS = ATTEND, ATTEND_GROUPS, ATTEND_FLOAT32, ATTEND_FLOAT32_GROUPS
PUSHES = PUSH, PUSH_GROUPS, PUSH_FLOAT32, PUSH_FLOAT32
SWEEPS = SWEEP, SWEEP_GROUPS, SWEEP_FLOAT32, SWEEP_FLOAT32_GROUPS


def of(tables: tuple[Table, Table, Table, Table], exact: bool, groups: bool, features: int) -> tuple[Blocks, ...]:
    """The entry of a kernel's tables for so many features; none where they are more than the table has.

    Args:
        exact: whether numbers are float32, not of two bytes.
        groups: whether the card multiplies by warp groups.
    """
    table = tables[2 * exact + groups]
    return next((blocks for most, blocks in table.items() if features <= most), ())
