"""The spectrum against the dense eigenvalues of the Hessian of a decoder of 136 weights."""

import math
from functools import partial

import dense_curvature as dense
import pytest
import torch
from dense_curvature import FLAT, PARAMS, N, close, ravel

import funcattn as fa
from funcattn import curvature


def matrix(v):
    return dense.dense_hessian() @ v


def weighted(key):
    """The dense eigenvalues, and the squared parts of the normalized probe of a key in each."""
    values, vectors = torch.linalg.eigh(dense.dense_hessian())
    probe = fa.random.normal_like(key, FLAT)
    return values, (vectors.mT @ (probe / probe.norm())).square()


def test_the_density_is_that_of_the_dense_eigenvalues():
    shape = curvature.spectrum(fa.key(1), matrix, FLAT, steps=N, probes=2)
    both = [weighted(fa.fold_in(fa.key(1), p)) for p in range(2)]
    values = torch.cat([v for v, _ in both])
    weights = torch.cat([w for _, w in both]) / 2
    width = 0.02 * float(values.max() - values.min())
    grid = torch.linspace(float(values.min()), float(values.max()), 50).double()
    gaussians = torch.exp(-(((grid[:, None] - values) / width) ** 2) / 2)
    wanted = gaussians @ weights / (width * math.sqrt(2 * math.pi))
    found_grid, found = shape.density(grid, width=width)
    assert torch.equal(found_grid, grid)
    close(found, wanted)


def test_a_quadrature_is_exact_for_polynomials_of_degree_below_twice_the_steps():
    key, steps = fa.key(2), 5
    shape = curvature.spectrum(
        key, partial(curvature.hvp, dense.loss, PARAMS), PARAMS, steps=steps, probes=1
    )
    nodes, weights = shape.quadrature()
    assert len(nodes) == steps
    values, parts = torch.linalg.eigh(dense.dense_hessian())
    probe = ravel(fa.random.normal_like(fa.fold_in(key, 0), PARAMS))
    parts = (parts.mT @ (probe / probe.norm())).square()
    unit = values.abs().max()
    for degree in range(2 * steps):
        wanted = (parts * (values / unit) ** degree).sum()
        torch.testing.assert_close(
            (weights * (nodes / unit) ** degree).sum(), wanted, rtol=0, atol=1e-8
        )


def test_a_density_integrates_to_one():
    shape = curvature.spectrum(fa.key(1), matrix, FLAT, steps=6, probes=3)
    nodes, _ = shape.quadrature()
    line = torch.linspace(float(nodes[0]) - 3, float(nodes[-1]) + 3, 20001).double()
    grid, density = shape.density(line, width=0.3)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)
    grid, density = shape.density()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-5)


def test_a_spectrum_that_is_continued_has_the_bits_of_an_unbroken_one():
    whole = curvature.spectrum(fa.key(1), matrix, FLAT, steps=4, probes=3)
    part = curvature.spectrum(fa.key(1), matrix, FLAT, steps=4, probes=2)
    more = curvature.spectrum(fa.key(1), matrix, FLAT, steps=4, probes=3, state=part)
    assert fa.tree.allclose(more, whole, 0, 0)
    same = curvature.spectrum(fa.key(1), matrix, FLAT, steps=4, probes=3, state=whole)
    assert fa.tree.allclose(same, whole, 0, 0)
    assert all(run.basis == run.residual == () for run in whole.runs)


def test_probes_of_a_space_that_is_soon_exhausted_are_finished():
    diagonal = torch.tensor([1.0, 1, 1, 4, 4, 4]).double()
    shape = curvature.spectrum(fa.key(0), lambda v: diagonal * v, diagonal, steps=5, probes=3)
    assert [len(run.alpha) for run in shape.runs] == [2, 2, 2]
    nodes, _ = shape.quadrature()
    close(nodes, torch.tensor([1.0, 1, 1, 4, 4, 4]).double(), 1e-12)


def test_a_plot_shows_the_density_and_its_nodes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    shape = curvature.spectrum(fa.key(1), matrix, FLAT, steps=6, probes=2)
    axes = shape.plot(figure.subplots(), label="loss")
    assert axes.get_yscale() == "log"
    density, negative, positive, _ = (line.get_xydata() for line in axes.get_lines())
    nodes, _ = shape.quadrature()
    assert sorted([*negative[:, 0], *positive[:, 0]]) == pytest.approx(nodes.tolist())
    assert max(density[:, 1]) == pytest.approx(float(shape.density()[1].max()))


def test_a_spectrum_prints_its_range():
    shape = curvature.spectrum(fa.key(0), lambda v: 2 * v, torch.zeros(3), steps=2, probes=2)
    assert repr(shape) == "Spectrum(1 + 1 steps, from 2 to 2)"


same = lambda v: v
BAD = [
    (
        lambda: curvature.spectrum(fa.key(0), same, FLAT, steps=0),
        "spectrum: steps should be an int, 1 or more, got 0",
    ),
    (
        lambda: curvature.spectrum(fa.key(0), same, FLAT, probes=0.5),
        "spectrum: probes should be an int, 1 or more, got 0.5",
    ),
    (
        lambda: curvature.spectrum(fa.key(0), same, {}),
        "spectrum: like should be a tree with elements",
    ),
    (
        lambda: curvature.spectrum(fa.key(0), same, FLAT, probes=1).density(width=0.0),
        "density: width should be positive, got 0.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_is_one_clear_error(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
