"""A decoder of 136 weights in float64, and its curvature as dense matrices."""

import functools

import torch
import torch.nn.functional as F
from torch.func import hessian, jacrev

import funcattn as fa

MODEL = fa.decoder(
    fa.Config(vocabulary=7, width=4, layers=1, heads=2, kv_heads=1, head_size=2, feed_forward=4)
)
PARAMS = fa.cast(torch.float64)(MODEL.init(fa.key(0)))
FLAT, UNRAVEL = fa.tree.ravel(PARAMS)
N = len(FLAT)
TEXTS = torch.randint(
    0, 7, (4, 6), generator=torch.Generator("cpu").manual_seed(3), device="cpu"
).to(FLAT.device)


def logits(params, text=TEXTS[0]):
    return MODEL.logits(params, MODEL.hidden(params, text[:-1])[0])


def losses(params, text=TEXTS[0]):
    """One for each target."""
    return F.cross_entropy(logits(params, text), text[1:], reduction="none")


def loss(params, text=TEXTS[0]):
    return losses(params, text).mean()


def flat(f):
    """f of the vector of params."""
    return lambda vector, *rest: f(UNRAVEL(vector), *rest)


@functools.cache
def dense_hessian():
    """(N, N), of the loss of the first text."""
    return hessian(flat(loss))(FLAT)


@functools.cache
def dense_jacobian(f=logits):
    """(*out, N), of the first text."""
    return jacrev(flat(f))(FLAT)


def vector(seed):
    return fa.random.normal_like(fa.key(seed), PARAMS)


def ravel(tree):
    return fa.tree.ravel(tree)[0]


def close(found, wanted, tolerance=1e-8):
    """Compare with a dense result, relative to its largest element."""
    size = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(size, 1e-30))
