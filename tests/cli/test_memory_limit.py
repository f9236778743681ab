"""The limit of memory: every pass reads all of the bytes, and the fastest one counts."""

import pytest
import torch

from funcattn.cli import memory_limit


def test_the_fastest_pass_is_the_limit():
    held = 5 * 4 * memory_limit.WIDTH
    count = held + 4
    seconds = {"reading: sum": 0.5, "reading: maximum": 0.25, "eager": 0.1}
    assert memory_limit.bandwidth(count, seconds) == held / 0.25


@pytest.mark.parametrize("count", [1, 10 * 4 * memory_limit.WIDTH])
def test_every_pass_reads_all_of_the_bytes(count):
    rows = max(1, count // (4 * memory_limit.WIDTH))
    total, most, product = (call() for call in memory_limit.reads(count).values())
    assert (total, most) == (rows * memory_limit.WIDTH, 1)
    torch.testing.assert_close(product, torch.full((rows,), float(memory_limit.WIDTH)))
