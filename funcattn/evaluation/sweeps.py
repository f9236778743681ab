"""Activation patching at every layer and position: where a text's answer is computed.

    effects[l, t] = metric(logits of `tokens`, with x_l[t] replaced by that of `source`)

x_l is an activation of layer l. Positions are mapped by vmap; below the patched layer nothing is
mapped, so those layers run once for a chunk of positions.

Source: Meng et al., Locating and editing factual associations in GPT, arXiv:2202.05262, causal
    tracing; Zhang and Nanda, Towards best practices of activation patching, arXiv:2309.16042.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import progress
from ..core import errors
from ..core.doors import door, what_is
from ..models import Model
from ..records import record
from ..tree import Tree
from .activations import Where, hear, trace

RESIDUALS = r"layers\.\d+\.output"


@record
class Sweep(NamedTuple):
    """What `patching_sweep` returns.

    effects: (N, T): the metric where activation n is replaced at position t.
    before: (): the metric of the text as it is.
    source: (): the metric of the text that activations come from.
    """

    effects: Tensor
    before: Tensor
    source: Tensor


@door
def patching_sweep(
    model: Model,
    params: Tree,
    tokens: Tensor,
    source: Tensor,
    metric: Callable[[Tensor], Tensor],
    where: Where = RESIDUALS,
    *,
    chunk: int = 32,
) -> Sweep:
    """Replace one activation at one position by that of another text, for all of them in turn.

        effects[n, t] = metric(logits[-1]),       x_n[t] <- x_n[t] of source

    Args:
        model, params: a decoder and its weights, not compiled.
        tokens: integers (T,), the text that is run.
        source: integers (T,), the text that activations come from.
        metric: logits (V,) after the last token -> a scalar, such as the difference of two logits.
        where: which taps, as in `trace`; by default the residual after each layer.
        chunk: positions that are run at a time.

    Returns:
        Sweep(effects (N, T), before (), source ()). `heat_map(sweep.effects, names, labels)`
        shows it.

    Raises:
        ValueError: texts of different lengths, taps that do not exist, a metric that is no scalar.
            TypeError: arguments of another kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=3))
        >>> params, text = model.init(fa.key(0)), torch.arange(5)
        >>> difference = lambda logits: logits[7] - logits[9]
        >>> patching_sweep(model, params, text, text.flip(0), difference).effects.shape
        torch.Size([3, 5])

    Law: each is a run of its own with `patch`
        (test_sweeps.py::test_a_sweep_is_one_patch_at_a_time).
    """
    for name, text in (("tokens", tokens), ("source", source)):
        if text.dim() != 1 or not len(text):
            remedy = "Many pairs of texts are vmap, or a loop."
            errors.fail("patching_sweep", name, "a text (T,)", what_is(text), remedy)
    if len(source) != len(tokens):
        remedy = "Positions correspond: choose texts of as many tokens, such as one word replaced."
        wanted = f"of T = {len(tokens)} tokens, as tokens"
        errors.fail("patching_sweep", "source", wanted, len(source), remedy)
    if not errors.is_count(chunk, 1):
        errors.fail("patching_sweep", "chunk", "at least 1", chunk, "Positions run at a time.")
    theirs, clean = trace(model, params, source, where)

    def measured(logits: Tensor) -> Tensor:
        found = metric(logits)
        if not isinstance(found, Tensor) or found.dim():
            remedy = "Such as lambda logits: logits[a] - logits[b]."
            errors.fail("patching_sweep", "metric", "a scalar tensor", what_is(found), remedy)
        return found

    own = model.logits(params, model.hidden(params, tokens)[0][..., -1, :])
    before, after = measured(own), measured(theirs[-1])

    def patched(name: str, place: Tensor) -> Tensor:
        here = (torch.arange(len(tokens), device=tokens.device) == place).unsqueeze(-1)
        changes = {name: lambda x: torch.where(here, clean[name], x)}
        run = lambda: model.hidden(params, tokens)[0][..., -1, :]
        return measured(model.logits(params, hear("patching_sweep", run, changes, _ignore)[0]))

    places = torch.arange(len(tokens), device=tokens.device)
    at = lambda name: vmap(lambda place: patched(name, place), chunk_size=chunk)(places)
    effects = [at(name) for name in progress.track(clean, "patching", len(clean))]
    return Sweep(torch.stack(effects), before, after)


def _ignore(name: str, x: Tensor) -> None:
    return None
