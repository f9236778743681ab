"""The Jacobian lens: the mean derivative of the final residual in the residual after a layer.

    J_l = mean over texts of  1/|P|  sum over t, t' in P of  d h_L[t'] / d h_l[t]       (E, E)

h_l (T, E) is the residual after layer l, h_L the one after the last layer, before the last norm. P
are the positions of a text from `skip` on, without the last. A position influences only later ones,
so the sum is over t' >= t; effects on all of them are added, and positions and texts averaged.

The double sum is one derivative: that of sum_t' h_L[t'] in a vector e that is added to h_l at all
positions of P. With such a vector for every layer, one vjp gives one row of every J_l: a text costs
one forward pass, and E backward passes, mapped by vmap, for all layers together. Forward mode would
take E passes for each layer.

Source: Gurnee et al., Verbalizable representations form a global workspace in language models,
    Transformer Circuits Thread, 2026 (transformer-circuits.pub/2026/workspace); the estimator is
    that of its implementation, github.com/anthropics/jacobian-lens.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from .. import progress, transformer
from ..core import errors
from ..core.doors import door, what_is
from ..models import Model
from ..records import ABSENT, is_absent, record
from ..tree import Tree
from .activations import hear

RESIDUAL = re.compile(r"layers\.\d+\.output")


@record
class JacobianLens(NamedTuple):
    """What `jacobian_lens` returns: a matrix for each layer but the last, whose is the identity.

    matrices: (L - 1, E, E): row i of matrices[l] is the derivative of entry i of the final residual
        in the residual after layer l. With `directions` (M, E): directions @ J, (L - 1, M, E).
    texts: (), of the dtype of matrices: how many texts the mean is over.
    """

    matrices: Tensor
    texts: Tensor


class Residuals(NamedTuple):
    """The taps of the residual after each layer, in order, and a value of the last of them."""

    names: tuple[str, ...]
    last: Tensor


@door
def jacobian_lens(
    model: Model,
    params: Tree,
    texts: Tensor | Sequence[Tensor],
    *,
    directions: Tensor | tuple[()] = ABSENT,
    skip: int = 16,
    chunk: int = 64,
) -> JacobianLens:
    """Fit a Jacobian lens: the mean transport of each layer's residual to the final one.

        J_l = mean_text 1/|P| sum_(t, t' in P) d h_L[t'] / d h_l[t],      P = skip .. T - 2

    `logit_lens(..., lens=lens)` reads a text through it. Derivatives are in activations, so
    quantized weights serve as they are. Texts are read one after the other: memory is that of one.

    Args:
        model, params: a decoder and its weights.
        texts: integers (T,) each, or (N, T) for texts of one length. Of T tokens each, the first
            `skip` and the last are left out.
        directions: (M, E), rows to multiply the matrices by; `()` gives the whole matrices. The
            rows of the head for M tokens give the lens vectors of these tokens, the directions in
            each layer that promote them, for M backward passes a text in place of E.
        skip: leading positions that are left out; the first ones attend to themselves, and are
            unlike the rest.
        chunk: directions that are pulled back at a time.

    Returns:
        JacobianLens(matrices (L - 1, E, E), texts), float32 at least.

    Raises:
        ValueError: a text of fewer than skip + 2 tokens, no texts, directions of another width, a
            model of one layer or without taps. TypeError: arguments of another kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=3))
        >>> params = model.init(fa.key(0))
        >>> texts = fa.random.randint(fa.key(1), (2, 8), 0, 256)
        >>> jacobian_lens(model, params, texts, skip=2)
        JacobianLens(matrices=float32[2,64,64], texts=float32[])

    Law: row i is a vjp of its own for each text, through exact and through quantized weights
        (test_jacobians.py::test_a_lens_is_as_many_vjps_as_the_residual_is_wide).
    Source: Gurnee et al., Verbalizable representations form a global workspace in language models,
        2026, transformer-circuits.pub/2026/workspace.
    """
    rows = _texts(texts, skip)
    if not errors.is_count(chunk, 1):
        remedy = "Directions that are pulled back at a time: 64, or fewer for less memory."
        errors.fail("jacobian_lens", "chunk", "at least 1", chunk, remedy)
    names, last = residuals("jacobian_lens", model, params, rows[0][:1])
    if len(names) < 2:
        remedy = "The lens is from a layer to the last one."
        errors.fail("jacobian_lens", "model", "of two layers or more", len(names), remedy)
    basis = _basis(directions, last)
    total = torch.zeros(
        (len(names) - 1, *basis.shape),
        dtype=torch.promote_types(last.dtype, torch.float32),
        device=last.device,
    )
    blocks = (len(basis) + chunk - 1) // chunk
    pulled = _pulled(model, params, rows, names, basis, skip, chunk)
    parts: list[Tensor] = []
    for part in progress.track(pulled, "fitting", len(rows) * blocks):
        parts.append(part.to(total.dtype))
        if len(parts) == blocks:
            total, parts = total + torch.cat(parts, -2), []
    return JacobianLens(total / len(rows), torch.full_like(total[0, 0, 0], len(rows)))


def residuals(door: str, model: Model, params: Tree, tokens: Tensor) -> Residuals:
    """The residuals after each layer, found in a forward pass of these tokens."""
    if model.config is not None:
        transformer.check_one(door, model.config)
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if RESIDUAL.fullmatch(name):
            seen[name] = x

    hear(door, lambda: model.hidden(params, tokens), {}, keep)
    if not seen:
        remedy = "A decoder has them; a model of your own calls fa.taps.tap(name, x)."
        errors.fail(door, "model", "one with taps layers.N.output", "one without", remedy)
    return Residuals(tuple(seen), list(seen.values())[-1])


def _pulled(
    model: Model,
    params: Tree,
    texts: Sequence[Tensor],
    names: tuple[str, ...],
    basis: Tensor,
    skip: int,
    chunk: int,
) -> Iterator[Tensor]:
    """For each text, and each chunk of m rows of the basis, (L - 1, m, E) of its own lens."""
    *sources, final = names
    zeros = basis.new_zeros(len(sources), basis.shape[-1])
    # The last token is read by nothing before it, unless angles follow the length of the text.
    inner = texts if transformer.follower(model) else [text[:-1] for text in texts]
    for whole, text in zip(texts, inner, strict=True):
        T = whole.shape[-1]
        place = torch.arange(len(text), device=text.device)
        chosen = ((place >= skip) & (place < T - 1)).unsqueeze(-1)

        def summed(nudges: Tensor, text: Tensor = text, chosen: Tensor = chosen) -> Tensor:
            """The sum of the final residual, each layer's residual moved by its nudge (E,)."""
            move = lambda nudge: lambda x: x + torch.where(chosen, nudge, 0).to(x.dtype)
            changes = {name: move(nudge) for name, nudge in zip(sources, nudges, strict=True)}
            found: dict[str, Tensor] = {}

            def keep(name: str, x: Tensor) -> None:
                if name == final:
                    found[name] = x

            hear("jacobian_lens", lambda: model.hidden(params, text), changes, keep)
            return torch.where(chosen, found[final], 0).sum(-2)

        pull = vjp(summed, zeros)[1]
        for block in basis.split(chunk):
            yield vmap(pull, out_dims=-2)(block)[0] / (T - 1 - skip)


def _basis(directions: Tensor | tuple[()], last: Tensor) -> Tensor:
    """The directions (M, E) that are pulled back, in the dtype of the residual."""
    E = last.shape[-1]
    if is_absent(directions):
        return torch.eye(E, dtype=last.dtype, device=last.device)
    if (
        not isinstance(directions, Tensor)
        or directions.dim() != 2
        or directions.shape[-1] != E
        or not directions.is_floating_point()
    ):
        remedy = (
            "Such as rows of the head: fa.layers.embed(params.embedding, ids) where it is tied."
        )
        wanted = f"floating (M, E) with E = {E}"
        errors.fail("jacobian_lens", "directions", wanted, what_is(directions), remedy)
    return directions.to(last.dtype)


def _texts(texts: Tensor | Sequence[Tensor], skip: int) -> list[Tensor]:
    """The texts, (T,) each."""
    if not errors.is_count(skip, 0):
        errors.fail("jacobian_lens", "skip", "0 or more positions", skip, "Use 16 or fewer.")
    if isinstance(texts, Tensor) and texts.dim() not in (1, 2):
        remedy = "Give one text, texts of one length, or a list of texts (T,)."
        errors.fail("jacobian_lens", "texts", "(T,) or (N, T)", what_is(texts), remedy)
    rows = [texts] if isinstance(texts, Tensor) and texts.dim() == 1 else list(texts)
    if not rows:
        errors.fail("jacobian_lens", "texts", "one or more", "none", "Give some tens of texts.")
    for row in rows:
        if not isinstance(row, Tensor) or row.dim() != 1:
            remedy = "Encode each: torch.tensor(tokenizer.encode(text))."
            errors.fail("jacobian_lens", "texts", "(T,) each", what_is(row), remedy, TypeError)
        if len(row) < skip + 2:
            remedy = (
                "Leave short ones out, or pass a smaller skip: the last position is left out too."
            )
            wanted = f"of skip + 2 = {skip + 2} tokens or more"
            errors.fail("jacobian_lens", "texts", wanted, f"one of {len(row)}", remedy)
    return rows
