"""The density of eigenvalues, by stochastic Lanczos quadrature.

    density(t) = 1/N sum_i delta(t - lambda_i) = E_v [v . delta(t - A) v] / N
               ~ mean over probes p of sum_k weight_pk Gaussian(t - node_pk; width)

Each probe is a run of Lanczos from a random vector; its Ritz values are the nodes of a Gauss
quadrature, the squared first components of the eigenvectors its weights.

Source: Golub and Welsch, Calculation of Gauss quadrature rules, 1969; Ubaru, Chen and Saad, Fast
    estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017; Ghorbani et al., An
    investigation into neural net optimization via Hessian eigenvalue density, arXiv:1901.10159.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door
from ..randomness import fold_in
from ..records import ABSENT, Tree, is_absent, record
from .iteration import Matvec, advance, check_count, check_vector
from .tridiagonal import Lanczos, begin, eigenvalues, extend, is_exhausted

BLUE, RED, GREY = "#3b6ea5", "#c8553d", "#8888"


@record
class Spectrum(NamedTuple):
    """Probes of a spectrum: the result of `spectrum`, and the state from which it continues.

    runs: one Lanczos a probe. Of a finished one alpha and beta remain, and neither residual nor
        basis; the last one may be unfinished.
    """

    runs: tuple[Lanczos, ...]

    def __repr__(self) -> str:
        nodes, _ = self.quadrature()
        steps = " + ".join(str(run.alpha.shape[-1]) for run in self.runs)
        return f"Spectrum({steps} steps, from {float(nodes[0]):.4g} to {float(nodes[-1]):.4g})"

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes, ascending, and their weights, which sum to 1: float64 (M,), M steps in all.

        sum_m weights_m g(nodes_m) estimates the mean of g over all eigenvalues.
        """
        found = [eigenvalues(run) for run in self.runs if run.alpha.shape[-1]]
        nodes, order = torch.cat([ritz.values for ritz in found]).sort()
        return nodes, torch.cat([ritz.weights for ritz in found])[order] / len(found)

    def density(
        self, grid: Tensor | None = None, *, width: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The density of eigenvalues on a grid, each node a Gaussian.

        Args:
            grid: points (n,); None takes 1001 over the spectrum.
            width: standard deviation of the Gaussians; None is 1/100 of the spectrum.

        Returns:
            (grid, density), each float64 (n,). The integral over all numbers is 1.
        """
        nodes, weights = self.quadrature()
        extent = float(nodes[-1] - nodes[0]) or abs(float(nodes[0])) or 1.0
        sigma = extent / 100 if width is None else width
        if not sigma > 0:
            remedy = "It is the standard deviation of a Gaussian."
            errors.fail("density", "width", "positive", width, remedy)
        if grid is None:
            low, high = float(nodes[0]) - 5 * sigma, float(nodes[-1]) + 5 * sigma
            grid = torch.linspace(low, high, 1001, dtype=torch.float64, device=nodes.device)
        scaled = (grid.to(nodes).unsqueeze(-1) - nodes) / sigma
        gaussians = torch.exp(-scaled.square() / 2) / (sigma * math.sqrt(2 * math.pi))
        return grid.to(nodes), gaussians @ weights

    def plot(self, axes: Any = None, *, width: float | None = None, label: str = "") -> Any:
        """Draw the density, and a tick at each node; needs matplotlib.

        The density is on a logarithmic scale, where single large eigenvalues are seen beside the
        bulk. Negative nodes are red.

        Args:
            axes: of matplotlib; None makes a figure.
            width: as in `density`.
            label: of the line in a legend.

        Returns:
            The axes.
        """
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot needs matplotlib: pip install matplotlib.") from error
            axes = pyplot.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")[1]
        nodes, weights = (x.cpu() for x in self.quadrature())
        grid, density = (x.cpu() for x in self.density(width=width))
        floor = float(weights.clamp(min=1e-12).min()) * float(density.max())
        lower = max(floor, 1e-9 * float(density.max()))
        line = axes.plot(grid, density.clamp(min=lower), color=BLUE, linewidth=1.6, label=label)
        axes.fill_between(
            grid, lower, density.clamp(min=lower), color=line[0].get_color(), alpha=0.15
        )
        for sign, color in ((nodes < 0, RED), (nodes >= 0, BLUE)):
            axes.plot(
                nodes[sign], torch.full_like(nodes[sign], lower), "|", color=color, markersize=9
            )
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set(yscale="log", ylim=(lower * 0.7, None), xlabel="eigenvalue", ylabel="density")
        return axes


@door
def spectrum(
    key: Tensor,
    matvec: Matvec,
    like: Tree,
    *,
    steps: int = 32,
    probes: int = 4,
    reorthogonalize: bool = True,
    state: Spectrum | tuple[()] = ABSENT,
) -> Spectrum:
    """The density of eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    A bar shows its progress. A KeyboardInterrupt ends it after the last whole step, with a warning.

    Args:
        key: int64 (2,). Probe p begins with normal_like(fold_in(key, p), like).
        matvec: the product of a symmetric matrix with a vector.
        like: a tree of floating tensors like a vector, such as params.
        steps: products of a probe; the resolution of the density.
        probes: random vectors, in all with those of the state; their mean is the estimate.
        reorthogonalize: as in `lanczos`. The vectors of one probe at a time are in memory.
        state: a Spectrum to continue, with the same key: an unfinished probe is finished, and
            further ones are run.

    Returns:
        Spectrum(runs), with `density(grid)`, `quadrature()` and `plot()`.

    Raises:
        ValueError: as `lanczos`.

    Example:
        >>> import torch, funcattn as fa
        >>> matrix = torch.diag(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        >>> shape = spectrum(fa.key(0), lambda v: matrix @ v, torch.zeros(4), steps=2, probes=40)
        >>> nodes, weights = shape.quadrature()
        >>> round(float(weights[nodes > 4].sum()), 1)  # one eigenvalue of four, estimated
        0.3

    Law: with as many steps as dimensions, the density is that of the dense eigenvalues, weighted by
        the probe (test_density.py::test_the_density_is_that_of_the_dense_eigenvalues); continued
        probes have the bits of an unbroken run
        (test_density.py::test_a_spectrum_that_is_continued_has_the_bits_of_an_unbroken_one).
    """
    check_vector("spectrum", "like", like)
    check_count("spectrum", "steps", steps, 1)
    check_count("spectrum", "probes", probes, 1)
    if not is_absent(state) and not isinstance(state, Spectrum):
        remedy = "Pass what spectrum returned."
        errors.fail("spectrum", "state", "a Spectrum", type(state).__name__, remedy, TypeError)
    runs: tuple[Lanczos, ...] = () if is_absent(state) else state.runs

    def step(runs: tuple[Lanczos, ...]) -> tuple[Lanczos, ...]:
        if not runs or is_absent(runs[-1].residual):
            runs = (*runs, begin(fold_in(key, len(runs)), like))
        run = extend("spectrum", runs[-1], matvec, reorthogonalize, reorthogonalize)
        if run.alpha.shape[-1] >= steps or is_exhausted(run):
            run = Lanczos(run.alpha, run.beta, ABSENT, ())
        return (*runs[:-1], run)

    finished = lambda runs: len(runs) >= probes and is_absent(runs[-1].residual)
    taken = sum(run.alpha.shape[-1] for run in runs)
    most = max(0, probes * steps - taken)
    return Spectrum(advance(step, runs, most, "spectrum", finished))
