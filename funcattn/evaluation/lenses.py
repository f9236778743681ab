"""Lenses: the logits that the residual after each layer would have, were it the last.

    logit lens        logits_l = head(norm(h_l))       h_l the residual (*lead, T, E) after layer l
    Jacobian lens     logits_l = head(norm(J_l h_l))   J_l of `jacobian_lens`

norm is the last norm of the model. Its scale is that of each residual: without it the logits are of
another distribution, and the head, which was trained behind it, reads noise.

Source: nostalgebraist, interpreting GPT: the logit lens, LessWrong, 2020; Belrose et al., Eliciting
    latent predictions from transformers with the tuned lens, arXiv:2303.08112.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import transformer, tree
from ..core import errors
from ..core.doors import door, what_is
from ..models import Model
from ..records import ABSENT, is_absent, record
from ..rematerialization import remat
from ..tree import Tree
from .activations import hear
from .jacobians import RESIDUAL, JacobianLens


@record
class LogitLens(NamedTuple):
    """What `logit_lens` returns: of each layer and position the likeliest tokens, and a target's.

    ids: int64 (L, *lead, T, k): the likeliest tokens, the likeliest first.
    log_probs: (L, *lead, T, k), float32 at least: their log-probabilities.
    targets: int64 (*lead, T): the tokens that were asked for.
    target_log_probs: (L, *lead, T): their log-probabilities.
    ranks: int64 (L, *lead, T): how many tokens are likelier than the target; 0 is the likeliest.
    entropies: (L, *lead, T): of the distributions, in nats.
    """

    ids: Tensor
    log_probs: Tensor
    targets: Tensor
    target_log_probs: Tensor
    ranks: Tensor
    entropies: Tensor


@door
def logit_lens(
    model: Model,
    params: Tree,
    tokens: Tensor,
    *,
    lens: JacobianLens | tuple[()] = ABSENT,
    targets: Tensor | None = None,
    k: int = 5,
    chunk: int = 512,
) -> LogitLens:
    """The tokens that each layer would predict: its residual, normalized, through the head.

        log p_l = log softmax(model.logits(params, norm(h_l))),       norm(J_l h_l) with a lens

    `model.logits` takes the state after the last norm, so the residual of a layer is normalized
    first, as the model does at its end. The last row is the model's own prediction. Logits are in
    memory for `chunk` positions of one layer at a time, never (L, T, V).

    Args:
        model, params: a decoder and its weights, also patched or compiled.
        tokens: integers (*lead, T).
        lens: from `jacobian_lens`, with whole matrices; `()` is the identity, the logit lens.
        targets: integers (*lead, T), whose log-probability and rank are wanted after each token;
            None is what the model itself finds likeliest at its end.
        k: how many of the likeliest tokens are returned.
        chunk: positions whose logits (chunk, V) are in memory at a time; for derivatives they are
            recomputed.

    Returns:
        LogitLens(ids, log_probs, targets, target_log_probs, ranks, entropies), L layers first.
        `lens_table(found, tokenizer)` shows it.

    Raises:
        ValueError: a k that is not in 1..V, targets of another shape or outside of the vocabulary,
            a lens of another model, a model without taps or a Config. TypeError: arguments of
            another kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=3))
        >>> logit_lens(model, model.init(fa.key(0)), torch.arange(4), k=2).ids.shape
        torch.Size([3, 4, 2])

    Law: the last layer says what the model says, and each layer what a model without those after it
        would (test_lenses.py::test_a_layer_says_what_a_model_that_ends_there_would).
    """
    if not errors.is_count(chunk, 1):
        errors.fail("logit_lens", "chunk", "at least 1", chunk, "Positions held at a time.")
    last, states = _states(model, params, tokens)
    if not is_absent(lens):
        states = _transported(states, lens)
    states = [*(transformer.final_norm(model.config, params, x) for x in states), last]
    ends = tree.partition(params, lambda path, _: not path.startswith("layers."))[0]
    V = model.logits(ends, last.flatten(0, -2)[:0]).shape[-1]
    if not errors.is_count(k, 1) or k > V:
        errors.fail("logit_lens", "k", f"in 1..V with V = {V}", k, "Ask for a few tokens.")
    targets = _targets(model, ends, last, targets, V, chunk)
    seen = [_looked(model, ends, x, targets, k, chunk) for x in states]
    ids, log_probs, target_log_probs, ranks, entropies = map(torch.stack, zip(*seen, strict=True))
    return LogitLens(ids, log_probs, targets, target_log_probs, ranks, entropies)


def _states(model: Model, params: Tree, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The state (*lead, T, E) that the head reads, and the residuals after all layers but one."""
    if model.config is None:
        remedy = "Its last norm is that of the Config: make the model with fa.decoder(config)."
        errors.fail("logit_lens", "model", "from fa.decoder", what_is(model), remedy)
    seen: list[Tensor] = []

    def keep(name: str, x: Tensor) -> None:
        if RESIDUAL.fullmatch(name):
            seen.append(x)

    (last, _), _ = hear("logit_lens", lambda: model.hidden(params, tokens), {}, keep)
    if not seen:
        remedy = "A decoder has them; a model of your own calls fa.taps.tap(name, x)."
        errors.fail("logit_lens", "model", "one with taps layers.N.output", "one without", remedy)
    return last, seen[:-1]


def _transported(states: list[Tensor], lens: JacobianLens) -> list[Tensor]:
    """J_l h_l for each layer."""
    E = states[0].shape[-1] if states else 0
    if tuple(lens.matrices.shape) != (len(states), E, E):
        remedy = "Fit it for this model, without directions: jacobian_lens(model, params, texts)."
        wanted = f"of matrices (L - 1, E, E) = {(len(states), E, E)}"
        errors.fail("logit_lens", "lens", wanted, errors.shape(lens.matrices), remedy)
    carry = lambda x, J: (x.to(J.dtype) @ J.mT).to(x.dtype)
    return [carry(x, J) for x, J in zip(states, lens.matrices, strict=True)]


def _targets(
    model: Model, ends: Tree, last: Tensor, targets: Tensor | None, V: int, chunk: int
) -> Tensor:
    if targets is None:
        rows = last.detach().flatten(0, -2).split(chunk)
        best = [model.logits(ends, row).argmax(-1) for row in rows]
        return torch.cat(best).unflatten(0, last.shape[:-1])
    if not isinstance(targets, Tensor) or targets.dtype not in tree.INTEGERS:
        remedy = "Give an id for each position: after each token, which one?"
        errors.fail("logit_lens", "targets", "integers", what_is(targets), remedy, TypeError)
    if targets.shape != last.shape[:-1]:
        remedy = "Give an id for each position; torch.full_like(tokens, id) asks for one token."
        wanted = f"{errors.shape(last[..., 0])} as tokens"
        errors.fail("logit_lens", "targets", wanted, errors.shape(targets), remedy)
    if errors.is_true((targets < 0) | (targets >= V)):
        remedy = "Encode with the tokenizer of this model."
        errors.fail("logit_lens", "targets", f"ids in 0..{V - 1}", "another", remedy)
    return targets.long()


def _looked(
    model: Model, ends: Tree, state: Tensor, targets: Tensor, k: int, chunk: int
) -> tuple[Tensor, ...]:
    """Ids, log-probabilities, the target's, its rank, and the entropy, of states (*lead, T, E)."""

    def look(ends: Tree, rows: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        logits = model.logits(ends, rows)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        of_target = log_p.gather(-1, wanted.unsqueeze(-1))
        best, ids = log_p.topk(k, -1)
        # where logits are NaN, V: a rank that no token has
        unknown, V = of_target.isnan().squeeze(-1), log_p.shape[-1]
        rank = torch.where(unknown, V, (log_p > of_target).sum(-1))
        # a token of probability 0 adds nothing: exp(log p) log p is NaN there
        entropy = -(log_p.exp() * torch.where(log_p == float("-inf"), 0, log_p)).sum(-1)
        return ids, best, of_target.squeeze(-1), rank, entropy

    rows, wanted = state.flatten(0, -2), targets.flatten()
    again = look if len(wanted) <= chunk else remat(look)
    blocks = zip(rows.split(chunk), wanted.split(chunk), strict=True)
    found = zip(*(again(ends, *block) for block in blocks), strict=True)
    return tuple(torch.cat(parts).unflatten(0, targets.shape) for parts in found)
