"""The kernels written in Triton: on a GPU where there is one, else on CPU under Triton's interpreter; the same tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from torch.func import grad, hessian, jvp, vmap

import funcattn as fa
from funcattn import masks
from funcattn.kernels import algebra, blocks
from funcattn.kernels.algebra import ONES, K, Output, Pair, Q, Sweep, Term
from funcattn.masks import Mask
from funcattn.records import Attended
from funcattn.testing import dense, laws, strategies
from funcattn.testing.agreement import agree, amplitudes

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from funcattn.kernels.triton import addresses, launching, programs, tuning

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDING = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The smallest blocks a matrix product takes, 16 x 16, so that small inputs cross several."""
    monkeypatch.setattr(tuning, "of_attend", lambda q, v: (tuning.SMALLEST,))
    monkeypatch.setattr(tuning, "of_sweep", lambda program: (tuning.SMALLEST,))


def normal(number: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape).to(dtype)


def kernel(q, k, v, mask=None, **options):
    """attend by Triton where Triton runs, for inputs and results on CPU."""
    there = fa.to(DEVICE)
    out, lse = fa.attend(*(x.to(DEVICE) for x in (q, k, v)), None if mask is None else there(mask), kernel="triton", **options)
    return Attended(out.cpu(), lse.cpu())


def attention(q, k, v, mask=None, **options):
    """attention by Triton, likewise."""
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    mask = None if mask is None else fa.to(DEVICE)(mask)
    return fa.attention(*(x.to(DEVICE) for x in (q, k, v)), mask, kernel="triton", **moved).cpu()


# The laws of every kernel, on small shapes of any kind and on one of several blocks.


def several_blocks(dtype: torch.dtype = torch.float32) -> strategies.Problem:
    """37 queries, 53 keys, two query heads on one key; a window and sinks (two intervals), and a query that sees nothing."""
    T, S = 37, 53
    mask = masks.causal(T, offset=10) & (masks.window(T, 12, offset=10) | masks.sinks(T, 2))
    row = torch.arange(T).unsqueeze(-1) == 20
    mask = Mask(torch.where(row, 0, mask.start), torch.where(row, 0, mask.stop))
    q, k, v = normal(1, 2, T, 5, dtype=dtype), normal(2, 1, S, 5, dtype=dtype), normal(3, 1, S, 18, dtype=dtype)
    return strategies.Problem(q, k, v, mask, fa.key(4))


@pytest.mark.parametrize("law", laws.kernel, ids=lambda law: law.__name__)
def test_every_law_holds_over_several_blocks(law):
    law(kernel, *several_blocks())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("law", [law for law in laws.kernel if "agrees" in law.__name__], ids=lambda law: law.__name__)
def test_narrow_dtypes_agree_within_their_rounding(law, dtype):
    law(kernel, *several_blocks(dtype))


@pytest.mark.parametrize("law", laws.kernel, ids=lambda law: law.__name__)
def test_every_law_holds_of_small_shapes(law):
    small = strategies.problems(dtype=torch.float32, leads=1, no_keys=True, booleans=False)

    @settings(max_examples=30 if GPU else 2, phases=[Phase.generate, Phase.shrink] if GPU else [Phase.generate])
    @given(small)
    def run(problem):
        law(kernel, *problem)

    run()
