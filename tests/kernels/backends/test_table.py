"""The table of backends: which one computes an operation of the closed family."""

import pytest
import torch
from torch.func import grad, jvp

import funcattn as fa
from funcattn import masks
from funcattn.kernels.backends import table, torch_attend, torch_blocks
from funcattn.kernels.backends.table import ATEN, BACKENDS, TORCH_BLOCKS, Backend
from funcattn.kernels.closed import operators, specs

T, D = 20, 8
Q, K, V = fa.random.normal(fa.key(0), (3, 2, T, D), dtype=torch.float64)
attention = lambda *x, mask=None: fa.attention(*x, mask, kernel="flash")
loss = lambda q: attention(q, K, V, mask=masks.causal(T)).square().sum()
PROGRAMS = {
    "value": lambda: attention(Q, K, V),
    "gradient": lambda: grad(loss)(Q),
    "jvp": lambda: jvp(attention, (Q, K, V), (K, V, Q))[1],
    "hvp": lambda: jvp(grad(loss), (Q,), (K,))[1],
    "statistics": lambda: fa.kernels.partial(Q, K, V, kernel="flash").out,
}


def jvp_of_blocks(q, k, v, tangents, mask, scale):
    """The value and its tangent, made of the value and a contraction on torch_blocks."""
    there = [x is not None for x in tangents]
    spec = specs.AttendSpec(scale, len(mask), kernel="blocks alone")
    return operators.attend_jvp(
        spec, there, [q, k, v, *mask, *(x for x in tangents if x is not None)]
    )


def recorder(calls: list[str], returns_none: bool = False, reason: str = "") -> Backend:
    """A backend that notes which operations are asked of it."""

    def noting(name, f):
        return lambda *x: (calls.append(name), None if returns_none else f(*x))[1]

    return Backend(
        "recorder",
        attend=noting("attend", torch_attend.attend),
        why_not_attend=lambda *x: reason,
        contract=noting("contract", TORCH_BLOCKS.contract),
        why_not_contract=lambda *x: reason,
        attend_jvp=noting("attend_jvp", jvp_of_blocks),
        why_not_attend_jvp=lambda *x: reason,
        statistics=lambda *x: (calls.append("statistics"), torch_blocks.statistics(*x))[1],
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_backend_of_the_table_runs_and_changes_no_number(monkeypatch, program):
    """One value and its place in a row is all that a new backend needs."""
    wanted, calls = PROGRAMS[program](), []
    monkeypatch.setitem(BACKENDS, "blocks alone", (TORCH_BLOCKS,))
    monkeypatch.setitem(BACKENDS, "flash", (recorder(calls), TORCH_BLOCKS))
    torch.testing.assert_close(PROGRAMS[program](), wanted, rtol=1e-12, atol=1e-12)
    asked = {"value": {"attend"}, "gradient": {"attend", "contract"}, "jvp": {"attend_jvp"}}
    asked |= {"hvp": {"attend_jvp", "contract"}, "statistics": {"attend", "statistics"}}
    assert asked[program] <= set(calls)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_backend_with_a_reason_is_not_asked(monkeypatch, program):
    calls = []
    monkeypatch.setitem(
        BACKENDS, "flash", (recorder(calls, reason="it is a test"), ATEN, TORCH_BLOCKS)
    )
    PROGRAMS[program]()
    assert calls == []


@pytest.mark.parametrize("program", ["value", "gradient", "jvp", "hvp"])
def test_where_a_backend_returns_none_the_next_runs(monkeypatch, program):
    wanted, calls = PROGRAMS[program](), []
    monkeypatch.setitem(BACKENDS, "flash", (recorder(calls, returns_none=True), ATEN, TORCH_BLOCKS))
    torch.testing.assert_close(PROGRAMS[program](), wanted, rtol=1e-12, atol=1e-12)
    assert calls


def test_compiled_code_asks_the_table_too(monkeypatch):
    calls = []
    wanted = attention(Q, K, V)
    monkeypatch.setitem(BACKENDS, "flash", (recorder(calls), TORCH_BLOCKS))
    found = torch.compile(lambda q: attention(q, K, V), backend="aot_eager", fullgraph=True)(Q)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert calls == ["attend"]


def test_torch_blocks_ends_every_row_and_runs_everything():
    for row in BACKENDS.values():
        assert row[-1] is TORCH_BLOCKS
    assert TORCH_BLOCKS.attend
    assert TORCH_BLOCKS.contract
    assert TORCH_BLOCKS.statistics
    assert {f for name, f in vars(TORCH_BLOCKS).items() if name.startswith("why_not")} == {
        table._never
    }


def test_torchs_fused_kernel_declines_what_it_would_compute_wrongly():
    start, stop = masks.causal(T)
    assert ATEN.attend(Q, K, V, (), None, 1.0) is not None
    assert ATEN.attend(Q, K, V, (start, stop), None, 1.0) is not None
    assert ATEN.attend(Q, K, V, (start, stop + 1), None, 1.0) is None
    spoilt = torch.where(torch.arange(T).unsqueeze(-1) == T - 1, torch.nan, V)
    # a hidden NaN has reached a row
    assert ATEN.attend(Q, K, spoilt, (start, stop), None, 1.0) is None
    assert ATEN.why_not_attend(Q, K, V, (), Q[0] @ K[0].mT)
    assert ATEN.why_not_attend(Q, K, V[..., :3], (), None)
    out, lse = ATEN.attend(Q, K, V, (), None, 1.0)
    gradients = lambda lse: ATEN.attend_vjp(Q, K, V, (), lse, out, out, 1.0, [Q.shape] * 3)
    assert gradients(lse) is not None
    assert gradients(lse + 1e9) is None  # one number no longer holds the log of the normalizer
