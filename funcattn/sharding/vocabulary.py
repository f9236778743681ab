"""The most likely tokens of a sharded vocabulary, without all logits on one device."""

import torch
from torch import Tensor

from .. import collectives, transformer
from ..collectives import all_gather, all_gather_invariant, axis_index
from ..core import errors
from ..core.doors import door
from ..models import Model, config_of, told, written
from ..transformer import TENSOR
from ..tree import Tree


def local_logits(model: Model, params: Tree, hidden: Tensor) -> Tensor | None:
    """The logits (*lead, V / n) of this device's vocabulary shard; None if it is not sharded."""
    config = config_of(model, "logits")
    if config is None or collectives.axis_size(TENSOR) == 1:
        return None
    head = transformer.lm_head(params)
    if head.shape[0] == config.vocabulary:
        return None
    return transformer.local_logits(config, head, hidden, params.head_bias)


@door
def candidates(model: Model, k: int) -> Model:
    """The model with logits of -inf for all but the k most likely tokens.

    Only k numbers of each device cross the mesh. A sampler that first keeps the k most likely
    (greedy, with k = 1; top_k(k), then others) draws the same tokens as from all logits.

    Args:
        model: from `fa.decoder`, compiled or not, before shard_map.
        k: how many; at least what the sampler keeps.

    Example:
        >>> import funcattn as fa
        >>> model = candidates(fa.decoder(fa.Config()), 3)
        >>> logits = model.logits(model.init(fa.key(0)), torch.ones(64))
        >>> int(logits.isfinite().sum())
        3

    Law: greedy and top_k draw the same tokens
        (test_sharding.py::test_candidates_draw_what_all_logits_draw).
    """
    config = config_of(model, "logits")
    if config is None:
        remedy = "Make it with fa.decoder(config), and replace or shard what comes of it."
        errors.fail("candidates", "model", "from fa.decoder", told(model), remedy, TypeError)
    V = config.vocabulary
    if not isinstance(k, int) or not 1 <= k <= V:
        errors.fail(
            "candidates", "k", f"from 1 to the {V} tokens", k, "Give what the sampler keeps."
        )

    def logits(params: Tree, hidden: Tensor) -> Tensor:
        local = local_logits(model, params, hidden)
        values, ids = _best(model.logits(params, hidden) if local is None else local, k)
        if local is not None:
            ids = all_gather(
                ids + axis_index(TENSOR).to(ids.device) * local.shape[-1], TENSOR, dim=-1
            )
            values = all_gather_invariant(values, TENSOR, dim=-1)
            values, places = _best(values, k)
            ids = ids.gather(-1, places)
        nothing = torch.full(
            (*values.shape[:-1], V), float("-inf"), dtype=values.dtype, device=values.device
        )
        return nothing.scatter(-1, ids, values)

    return model.wrap(
        written("candidates", k=k),
        lambda other: candidates(other, k),
        {"logits": logits},
        replaced=("logits",),
    )


def _best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest and their indices; of equal ones the lowest indices first."""
    if k == 1:
        place = logits.argmax(-1, keepdim=True)
        return logits.gather(-1, place), place
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]
