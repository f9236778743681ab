"""Iterations show a bar, end early with what they have, and continue to the same bits."""

import io
import types
import warnings
from functools import partial

import pytest
import torch

import funcattn as fa
from funcattn import curvature, progress
from funcattn.curvature import iteration

MATRIX = torch.diag(torch.arange(1.0, 9.0)) + 0.1
LIKE = {"a": torch.zeros(3), "b": (torch.zeros(5),)}


def matvec(v):
    flat, unravel = fa.tree.ravel(v)
    return unravel(MATRIX @ flat)


class Interrupted:
    """A product that Ctrl-C stops at its n-th call."""

    def __init__(self, n):
        self.left = n

    def __call__(self, v):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return matvec(v)


KEY = fa.key(0)
B = fa.random.normal_like(fa.key(1), LIKE)
RUNS = {
    "lanczos": lambda f, n, state=(): curvature.lanczos(KEY, f, LIKE, n, state=state),
    "spectrum": lambda f, n, state=(): curvature.spectrum(
        KEY, f, LIKE, steps=3, probes=2, state=state
    ),
    "cg": lambda f, n, state=(): curvature.cg(f, B, tolerance=0, max_steps=n, state=state),
    "trace": lambda f, n, state=(): curvature.trace(KEY, f, LIKE, draws=4, sketch=1, state=state),
    "diagonal": lambda f, n, state=(): curvature.diagonal(KEY, f, LIKE, draws=6, state=state),
}
runs = pytest.mark.parametrize("name", RUNS)


@runs
def test_an_interrupted_run_ends_with_what_it_has_and_continues_to_the_same_bits(name):
    run = RUNS[name]
    with pytest.warns(UserWarning, match=f"{name}: interrupted after . of . steps; .* state="):
        part = run(Interrupted(4), 6)
    taken = 2 if name == "trace" else 3  # a vector of the sketch is two products
    whole = run(matvec, 6)
    rest = run(matvec, 6 - taken, part)
    assert not fa.tree.allclose(part, whole, 0, 0)
    assert fa.tree.allclose(rest, whole, 0, 0)


@runs
def test_an_interrupt_before_the_first_step_is_raised(name):
    with pytest.raises(KeyboardInterrupt):
        RUNS[name](Interrupted(1), 6)


@runs
def test_a_warning_names_the_line_of_the_call(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RUNS[name](Interrupted(4), 6)
    assert [w.filename for w in caught] == [__file__]


@runs
def test_a_state_is_saved_and_loaded(name, tmp_path):
    part = RUNS[name](matvec, 3)
    torch.save(part, tmp_path / "state.pt")
    assert fa.tree.allclose(torch.load(tmp_path / "state.pt"), part, 0, 0)


@runs
def test_a_bar_shows_the_steps(name, monkeypatch):
    screen, now = io.StringIO(), [0.0]
    screen.isatty = lambda: True
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=screen, modules={}))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def slow(v):
        now[0] += 1.5
        return matvec(v)

    RUNS[name](slow, 6)
    steps = 5 if name == "trace" else 6
    assert f"{name} 4/{steps} " in screen.getvalue()
    assert screen.getvalue().endswith("\r")


@runs
def test_a_state_of_something_else_is_one_clear_error(name):
    with pytest.raises(TypeError, match=rf"{name}: state should be an? \w+, got float"):
        RUNS[name](matvec, 3, 3.0)


@runs
def test_a_product_that_is_not_finite_is_an_error(name):
    with pytest.raises(
        ValueError, match=rf"{name}: the result of matvec should be finite, got nan"
    ):
        RUNS[name](lambda v: fa.tree.scale(torch.nan, v), 3)


@runs
def test_a_product_of_another_space_is_an_error(name):
    with pytest.raises(ValueError, match=rf"{name}: the result of matvec should be of the struc"):
        RUNS[name](lambda v: v["a"], 3)


def test_half_precision_has_the_coarsest_rounding():
    mixed = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.bfloat16)}
    assert iteration.precision(mixed) == 2**-7


def test_an_operator_is_a_partial_application():
    f = lambda x: (x["a"] ** 4).sum() + x["b"][0].sum() ** 2
    x = fa.random.normal_like(fa.key(3), LIKE)
    run = curvature.lanczos(KEY, partial(curvature.hvp, f, x), x, 8)
    dense = torch.cat([12 * x["a"] ** 2, torch.tensor([10.0])])
    top = curvature.eigenvalues(run).values[-1]
    torch.testing.assert_close(top.float(), dense.max(), rtol=1e-5, atol=0)
