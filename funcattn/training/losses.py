"""The loss of a language model: the mean cross-entropy of next tokens.

    loss = - mean over the targets that count of log p(tokens[t + 1] | tokens[0..t])

Logits (*lead, T, V) would be the largest tensor of training. The loss is computed with its gradient
for a block of positions at a time (see `funcattn.vocabulary`), so that only one block is in memory;
this composes with every transform.
"""

import torch
from torch import Tensor

from .. import collectives, masks, transformer, tree
from ..caches import CONTEXT
from ..collectives import axis_size, local_slice, psum
from ..core import errors
from ..core.doors import door
from ..kernels import zigzag
from ..kernels.dtypes import accumulation_dtype
from ..models import Model
from ..transformer import DATA, follower
from ..tree import Tree


@door
def loss(
    model: Model,
    params: Tree,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """The mean cross-entropy, in nats, of each next token.

    Args:
        model, params: a decoder (`fa.decoder`) and its weights. Log-probabilities are in float32 at
            least.
        tokens: integers (*lead, T), T at least 2: T - 1 inputs, and T - 1 targets that are one
            token ahead of them.
        mask: bool, broadcasts to (*lead, T - 1), True where the target tokens[..., 1:] counts. None
            counts all.
        segments: integers (*lead, T), the document of each token, where several are packed in a
            row. Attention stays inside a document, positions begin again at each, and no target is
            of another document than its input.

    Returns:
        A scalar, float32 at least. Where no target counts: an error, or NaN where values cannot be
        read.

    Raises:
        ValueError: sizes, ids outside of the vocabulary, or no target that counts.
        TypeError: arguments of another type.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> round(float(loss(model, model.init(fa.key(0)), torch.arange(12).view(2, 6))),
        ...     1)  # log 256 = 5.5
        5.6

    Where axes of a mesh are bound (see funcattn.sharding), tokens are this device's rows, and the
    loss is that of all rows: sums and counts are summed over "data", and over "tensor" logits stay
    sharded over the vocabulary. Over "context" every device is given whole rows, and takes its
    slice of their inputs, whose number must be a multiple of 2 n.

    Law: packed documents lose what they lose alone
        (test_training.py::test_packed_documents_lose_what_they_lose_alone).
    Law: grad, jvp, vmap(grad) and hvp are exact
        (test_training.py::test_derivatives_of_the_loss_are_those_of_the_reference).
    """
    errors.is_decoder("loss", model)
    _check(tokens, mask, segments)
    if tokens.device.type == "cpu":  # on a GPU it would synchronize at every step
        collectives.agree("loss", {"tokens": tokens, "mask": mask, "segments": segments}, params)
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    counts = None if mask is None else mask.expand(targets.shape)
    if axis_size(CONTEXT) > 1:
        if segments is not None:
            errors.fail(
                "loss",
                "segments",
                "None over 'context'",
                "some",
                "Pack documents over 'data', or leave them whole.",
            )
        inputs, targets = _part(inputs), _part(targets)
        counts = None if counts is None else _part(counts)
    # Where rotary angles follow the length of the text, its last token counts too.
    whole = follower(model) is not None and axis_size(CONTEXT) == 1
    inputs = tokens if whole else inputs
    if segments is None:
        hidden = model.hidden(params, inputs)[0]
    else:
        ids, T = segments[..., : inputs.shape[-1]], inputs.shape[-1]
        documents = masks.segments(ids)
        seen = masks.intersection(
            documents,
            masks.causal(T, offset=torch.zeros((), dtype=torch.int64, device=tokens.device)),
        )
        places = torch.arange(T, device=tokens.device) - documents.start.squeeze(-1)
        hidden = model.hidden(params, inputs, mask=seen, positions=places)[0]
        same = segments[..., :-1] == segments[..., 1:]
        counts = same if counts is None else counts & same
    hidden = hidden[..., : targets.shape[-1], :]
    alone = axis_size(DATA) * axis_size(CONTEXT) == 1
    if (
        alone
        and counts is not None
        and errors.value(counts) is not None
        and not errors.is_true(counts)
    ):
        errors.fail(
            "loss",
            "mask",
            "true of some target",
            "none that counts",
            "Leave out batches without targets.",
        )
    summed = _summed(
        model,
        params,
        hidden.flatten(0, -2),
        targets.flatten(),
        None if counts is None else counts.flatten(),
    )
    if alone:
        return summed / (targets.numel() if counts is None else counts.sum())
    everywhere = lambda x: psum(psum(x, DATA), CONTEXT)
    return everywhere(summed) / (
        targets.numel() * axis_size(DATA) * axis_size(CONTEXT)
        if counts is None
        else everywhere(counts.sum())
    )


def _part(x: Tensor) -> Tensor:
    """This device's positions of rows that are whole on every device."""
    return local_slice(zigzag(x, axis_size(CONTEXT)), CONTEXT, dim=-1)


def _summed(
    model: Model, params: Tree, hidden: Tensor, targets: Tensor, counts: Tensor | None
) -> Tensor:
    """The sum of cross-entropies of hidden (N, E) against targets (N,), of rows that count."""
    V = transformer.vocabulary_size(model, params, hidden)
    if errors.is_true((targets < 0) | (targets >= V)):
        errors.fail(
            "loss",
            "tokens",
            f"ids in 0..{V - 1}",
            "another",
            "Encode with the tokenizer of this model.",
        )
    weights = torch.ones(len(targets), dtype=accumulation_dtype(hidden), device=hidden.device)
    if counts is not None:
        weights = counts.to(weights.dtype)
        hidden = torch.where(counts.unsqueeze(-1), hidden, 0)  # a zero weight times NaN is NaN
    return transformer.weighted_loss(model, params, hidden, targets.long(), weights)


def _check(tokens: Tensor, mask: Tensor | None, segments: Tensor | None) -> None:
    integer = lambda x: isinstance(x, Tensor) and x.dtype in tree.INTEGERS
    kind = lambda x: getattr(x, "dtype", type(x).__name__)
    if not integer(tokens):
        errors.fail(
            "loss",
            "tokens",
            "an integer tensor",
            kind(tokens),
            "Pass token ids (*lead, T).",
            TypeError,
        )
    if tokens.dim() < 1 or tokens.shape[-1] < 2 or not tokens.numel():
        remedy = "A row of T tokens has T - 1 inputs and their targets."
        errors.fail("loss", "tokens", "(*lead, T) with T at least 2", errors.shape(tokens), remedy)
    wanted = (*tokens.shape[:-1], tokens.shape[-1] - 1)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        errors.fail(
            "loss",
            "mask",
            "booleans",
            kind(mask),
            "Say which targets count: mask.bool().",
            TypeError,
        )
    if mask is not None and not _fits(mask.shape, wanted):
        errors.fail(
            "loss",
            "mask",
            f"such that it broadcasts to {wanted}, the targets",
            errors.shape(mask),
            "Use tokens[..., 1:].",
        )
    if segments is not None and not integer(segments):
        errors.fail(
            "loss", "segments", "integers", kind(segments), "Number the documents.", TypeError
        )
    if segments is not None and segments.shape != tokens.shape:
        errors.fail(
            "loss",
            "segments",
            f"{errors.shape(tokens)} as tokens are",
            errors.shape(segments),
            "One number a token.",
        )


def _fits(shape: torch.Size, wanted: tuple[int, ...]) -> bool:
    return len(shape) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False)
    )
