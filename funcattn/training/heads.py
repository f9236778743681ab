"""Training a head that drafts, on the target's own text.

    loss = -mean log p_head(t_{i+2} | pairs (t_{j+1}, f_j), j <= i)

The target is read once for each batch, its features are constants, and the embedding and the matrix
of the head are the target's, which are not trained.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import layers, randomness, taps, tree
from ..core import errors
from ..core.doors import door, what_is
from ..decoding.speculative.heads import Head, HeadParams, carried, hidden
from ..models import Model
from ..records import ABSENT, is_absent
from ..transformer import Config, Params, initialize, lm_head
from ..tree import Tree
from ..vocabulary import cross_entropy
from .combined import chain, clip
from .fitting import Fitted, fit
from .optimizers import Optimizer, adamw
from .schedules import cosine


@door(name="drafters.train_head")
def train_head(
    key: Tensor,
    model: Model,
    params: Params,
    tokens: Tensor,
    *,
    steps: int,
    start: tuple[Head, HeadParams] | None = None,
    optimizer: Optimizer | None = None,
    rows: int = 8,
    context: int = 64,
    **options: Any,
) -> tuple[Head, HeadParams, Fitted]:
    """Train an EAGLE-3 head of one layer, or go on with one, by `fa.training.fit`.

    Args:
        key: int64 (2,), randomness of the first weights and of the batches.
        model, params: the target, which is not modified.
        tokens: int64 (N,), a text; what the target itself writes is the text that it will draft.
        steps, rows, context: as in `fa.training.fit`.
        start: (head, params) to go on with; None makes new ones with the sizes of the target.
        optimizer: of `fa.training`; None is AdamW, peak 1e-3, with a cosine schedule.
        options: more of `fa.training.fit`, such as folder and resume.

    Returns:
        (head, params) for `fa.drafters.head`, and what fit returned.

    Raises:
        ValueError: a head whose vocabulary is a part of the target's.
        TypeError: a model that is not from fa.decoder.

    Law: the loss falls, and more drafts are accepted (test_training_heads.py).
    Source: Li et al., EAGLE-3, arXiv:2503.01840, without its training-time test of several steps.
    """
    config = model.config
    if not isinstance(config, Config):
        remedy = "Make it with fa.decoder(config)."
        errors.fail(
            "drafters.train_head", "model", "from fa.decoder", what_is(model), remedy, TypeError
        )
    for_weights, for_batches = randomness.split(key).unbind()
    head, whole = new_head(for_weights, config, params) if start is None else start
    if not is_absent(whole.ids):
        remedy = "Train one with all tokens: start=None."
        errors.fail("drafters.train_head", "start", "a head of all tokens", "ids", remedy)
    loss = head_loss(head, params, whole)
    own = whole._replace(embedding=ABSENT, head=ABSENT)
    if optimizer is None:
        schedule = cosine(1e-3, max(steps, 1), warmup=min(100, steps // 10))
        optimizer = chain(clip(1.0), adamw(schedule))
    done = fit(
        *(for_batches, model, own, tokens),
        optimizer=optimizer,
        steps=steps,
        rows=rows,
        context=context,
        loss=loss,
        **options,
    )
    trained = done.params._replace(embedding=whole.embedding, head=whole.head)
    return head, trained, done


def new_head(key: Tensor, target: Config, params: Params) -> tuple[Head, HeadParams]:
    """An EAGLE-3 head with random weights, for a target of this config."""
    L, E = target.layers, target.width
    config = Config(
        vocabulary=target.vocabulary,
        width=E,
        layers=1,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_size=target.head_size,
        feed_forward=target.feed_forward,
        norm_epsilon=target.norm_epsilon,
        rope_base=target.rope_base,
        context=target.context,
        tied=False,
    )
    # The residual in front of a low, a middle and a high layer, as vLLM has it.
    ids = [min(2, L), L // 2, max(L - 3, 0)]
    names = tuple(f"layers.{i - 1}.output" if i else "embedding" for i in ids)
    keys = randomness.split(key, 3)
    # One of twice the width has q, k and v of the width that attention reads.
    made = initialize(keys[0], dataclasses.replace(config, vocabulary=1))
    wide = initialize(keys[1], dataclasses.replace(config, vocabulary=1, width=2 * E)).layers[0]
    like = params.norm
    layer = made.layers[0]._replace(q=wide.q, k=wide.k, v=wide.v, attention_norm=ABSENT)
    fuse = randomness.normal(keys[2], (E, 3 * E)) / (3 * E) ** 0.5
    ones = torch.ones(E)
    own = HeadParams(fuse, ABSENT, ones, ones, (layer,), ones, ABSENT)
    own = tree.map(lambda w: w.to(like), own)
    head = Head("eagle3", config, names)
    return head, own._replace(embedding=params.embedding, head=lm_head(params))


def head_loss(head: Head, params: Params, whole: HeadParams) -> Any:
    """The loss of a head's own weights on a batch of texts, for `fa.training.fit`."""

    def loss(model: Model, own: Tree, batch: Tensor) -> Tensor:
        heard: dict[str, Tensor] = {}

        def hear(name: str, x: Tensor) -> Tensor:
            if name in head.taps:
                heard[name] = x.detach()
            return x

        with torch.no_grad(), taps.listening(hear):
            model.hidden(params, batch)
        features = torch.cat([heard[name] for name in head.taps], -1)
        full = own._replace(embedding=whole.embedding, head=whole.head)
        carry = carried(head, full, features[..., :-2, :])
        x, _ = hidden(head, full, batch[..., 1:-1], carry)
        y = layers.rms_norm(x, full.norm, epsilon=head.config.norm_epsilon)
        return cross_entropy(y, full.head, batch[..., 2:])

    return loss
