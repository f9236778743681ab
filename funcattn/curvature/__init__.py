"""Curvature of any scalar function of a tree: products with its Hessian, and what they tell.

The Hessian of a loss has as many rows as the model has weights, and is never written down. Its
product with a vector is one derivative more, `jvp(grad(f))`, and everything here is made of such
products. A vector is a tree like params; an operator is a function of a vector:

    hessian = partial(fa.curvature.hvp, loss, params, batches=texts)     v -> H v
    run = fa.curvature.lanczos(key, hessian, params, 32)                 its extreme eigenvalues
    shape = fa.curvature.spectrum(key, hessian, params)                  their density
    x = fa.curvature.solve(hessian, gradient, damping=0.1).x             (H + 0.1)^-1 g

products          hvp, ggn, fisher, empirical_fisher, sampled_fisher, jvp, vjp; summed
tridiagonal       lanczos, eigenvalues
density           spectrum
linear_systems    cg, solve, lissa
estimates         trace, diagonal
influences        influence: of training examples on a loss
tangent_kernel    ntk

Texts stream: with `batches`, a product is the sum over them, of which one at a time is in memory.
Long runs show their progress, end early with what they have where Ctrl-C is pressed, and continue
from it by `state=`, to the bits of an unbroken run.
"""

from .density import Spectrum, spectrum
from .estimates import Diagonal, Trace, diagonal, trace
from .influences import influence
from .iteration import Matvec
from .linear_systems import ConjugateGradient, Solved, cg, lissa, solve
from .products import (
    empirical_fisher,
    fisher,
    ggn,
    hvp,
    jvp,
    sampled_fisher,
    summed,
    vjp,
)
from .tangent_kernel import ntk
from .tridiagonal import Lanczos, Ritz, eigenvalues, lanczos

__all__ = [
    "ConjugateGradient",
    "Diagonal",
    "Lanczos",
    "Matvec",
    "Ritz",
    "Solved",
    "Spectrum",
    "Trace",
    "cg",
    "diagonal",
    "eigenvalues",
    "empirical_fisher",
    "fisher",
    "ggn",
    "hvp",
    "influence",
    "jvp",
    "lanczos",
    "lissa",
    "ntk",
    "sampled_fisher",
    "solve",
    "spectrum",
    "summed",
    "trace",
    "vjp",
]
