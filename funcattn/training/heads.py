"""Training a head that drafts, on the target's own text.

    loss = -mean log p_head(t_{i+2} | pairs (t_{j+1}, f_j), j <= i)

The target is read once, its features are constants, and the embedding and the matrix of the head
are the target's, which are not trained. With ahead = n the head also predicts up to n - 1 tokens
further from its own outputs, as it does when it drafts:

    x^1_i of (t_{i+1}, f_i)     x^s_i of (t_{i+s}, x^{s-1}_i) predicts t_{i+s+1}
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import layers, randomness, taps, tree
from ..core import errors
from ..core.doors import door, what_is
from ..decoding.speculative.heads import KINDS, Head, HeadParams, carried, hidden
from ..models import Model
from ..records import ABSENT, is_absent
from ..transformer import Config, Params, check_one, initialize, lm_head
from ..tree import Tree
from ..vocabulary import cross_entropy
from .combined import chain, clip
from .fitting import Fitted, fit
from .optimizers import Optimizer, adamw
from .schedules import cosine

SPAN = 512  # tokens of the text that the target reads as one


@door(name="drafters.train_head")
def train_head(
    key: Tensor,
    model: Model,
    params: Params,
    tokens: Tensor,
    *,
    steps: int,
    start: tuple[Head, HeadParams] | None = None,
    kind: str = "eagle3",
    vocabulary: int | None = None,
    ahead: int = 1,
    optimizer: Optimizer | None = None,
    rows: int = 8,
    context: int = 64,
    validation: Tensor | None = None,
    **options: Any,
) -> tuple[Head, HeadParams, Fitted]:
    """Train a head of one layer, or go on with one, by `fa.training.fit`.

    Args:
        key: int64 (2,), randomness of the first weights and of the batches.
        model, params: the target, which is not modified.
        tokens: int64 (N,), a text; what the target itself writes is the text that it will draft.
            The target's features of it are held in memory: N numbers of 3 E in "eagle3", E in
            "mtp".
        steps, rows, context: as in `fa.training.fit`.
        start: (head, params) to go on with; None makes new ones with the sizes of the target.
        kind: of a new head. "eagle3" hears three layers of the target, "mtp" what its `hidden`
            returns, so that a compiled target keeps its compiled steps.
        vocabulary: how many tokens a new head knows, the most frequent of the text: a head of
            fewer rows drafts and trains faster. None is all.
        ahead: how many tokens each place predicts, those after the first from the head's own
            outputs: about the length of the drafts.
        optimizer: of `fa.training`; None is AdamW, peak 1e-3, with a cosine schedule.
        validation: a text whose loss is reported, or None.
        options: more of `fa.training.fit`, such as folder and resume.

    Returns:
        (head, params) for `fa.drafters.head` and `save_head`, and what fit returned.

    Raises:
        ValueError: a kind, vocabulary or ahead that cannot be.
        TypeError: a model that is not from fa.decoder.

    Law: the loss falls, and more drafts are accepted (test_training_heads.py).
    Source: Li et al., EAGLE-3, arXiv:2503.01840 (ahead is its training-time test, in which keys of
        earlier pairs are outputs too); DeepSeek-V3, arXiv:2412.19437.
    """
    config = model.config
    fail = errors.fail
    if not isinstance(config, Config):
        remedy = "Make it with fa.decoder(config)."
        fail("drafters.train_head", "model", "from fa.decoder", what_is(model), remedy, TypeError)
    if kind not in KINDS:
        wanted = f"one of {', '.join(KINDS)}"
        fail("drafters.train_head", "kind", wanted, repr(kind), "eagle3 is usual.")
    if not errors.is_count(ahead, 1) or ahead >= context:
        wanted = f"an int from 1, below context = {context}"
        fail("drafters.train_head", "ahead", wanted, repr(ahead), "1 to 4 is usual.")
    V = config.vocabulary
    if vocabulary is not None and not (errors.is_count(vocabulary, 1) and vocabulary <= V):
        wanted, remedy = f"an int from 1 to V = {V}", "None is all of the target's tokens."
        fail("drafters.train_head", "vocabulary", wanted, repr(vocabulary), remedy)
    for_weights, for_batches = randomness.split(key).unbind()
    if start is None:
        head, whole = new_head(for_weights, config, params, kind)
        if vocabulary is not None:
            counts = tokens.bincount(minlength=V)
            ids = counts.sort(descending=True, stable=True).indices[:vocabulary].sort().values
            whole = whole._replace(head=layers.embed(whole.head, ids), ids=ids)
    else:
        head, whole = start
    texts = [tokens] if validation is None else [tokens, validation]
    features = torch.cat([features_of(head, model, params, text) for text in texts])
    loss = head_loss(head, whole, torch.cat(texts), features, ahead)
    own = whole._replace(embedding=ABSENT, head=ABSENT, ids=ABSENT)
    if optimizer is None:
        schedule = cosine(1e-3, max(steps, 1), warmup=min(100, steps // 10))
        optimizer = chain(clip(1.0), adamw(schedule))
    # Batches are places of the text, at which its features are too.
    places = torch.arange(len(features), device=tokens.device)
    told = None if validation is None else places[len(tokens) :]
    done = fit(
        *(_with_text(for_batches, tokens), model, own, places[: len(tokens)]),
        optimizer=optimizer,
        steps=steps,
        rows=rows,
        context=context,
        loss=loss,
        validation=told,
        **options,
    )
    trained = done.params._replace(embedding=whole.embedding, head=whole.head, ids=whole.ids)
    return head, trained, done


def _with_text(key: Tensor, tokens: Tensor) -> Tensor:
    """A key of this text: a run is not resumed with another one."""
    weights = 1 + torch.arange(len(tokens), device=tokens.device) % 65_521
    return randomness.fold_in(key, int((tokens.long() * weights).sum()) % 2**31)


def new_head(
    key: Tensor, target: Config, params: Params, kind: str = "eagle3"
) -> tuple[Head, HeadParams]:
    """A head of this kind with random weights, for a target of this config."""
    check_one("drafters.train_head", target)
    if target.embedding_size:
        remedy = "Draft with a model, or what the text repeats (drafters.suffix)."
        wanted, got = "one whose embedding has its width", f"one of {target.embedding_size}"
        errors.fail("drafters.train_head", "model", wanted, got, remedy)
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
    layer = initialize(keys[0], dataclasses.replace(config, vocabulary=1)).layers[0]
    if kind == "mtp":
        names, sides = ("output",), 2
    else:
        # One of twice the width has q, k and v of the width that attention reads.
        wide = dataclasses.replace(config, vocabulary=1, width=2 * E)
        q, k, v = initialize(keys[1], wide).layers[0][1:4]
        layer, sides = layer._replace(q=q, k=k, v=v, attention_norm=ABSENT), 3
    like = params.norm
    fuse = randomness.normal(keys[2], (E, sides * E)) / (sides * E) ** 0.5
    ones = torch.ones(E)
    own = HeadParams(fuse, ABSENT, ones, ones, (layer,), ones, ABSENT)
    own = tree.map(lambda w: w.to(like), own)
    head = Head(kind, config, names)
    return head, own._replace(embedding=params.embedding, head=lm_head(params))


def features_of(head: Head, model: Model, params: Params, tokens: Tensor) -> Tensor:
    """The target's features (N, F) of a text (N,), which it reads in pieces of SPAN tokens."""
    found = []
    for piece in tokens.split(SPAN):
        heard: dict[str, Tensor] = {}

        def hear(name: str, x: Tensor, heard: dict[str, Tensor] = heard) -> Tensor:
            if name in head.taps:
                heard[name] = x.detach()
            return x

        with torch.no_grad(), taps.listening(hear):
            model.hidden(params, piece)
        found.append(torch.cat([heard[name] for name in head.taps], -1))
    return torch.cat(found)


def head_loss(head: Head, whole: HeadParams, text: Tensor, features: Tensor, ahead: int = 1) -> Any:
    """The loss of a head's own weights at places of a text, for `fa.training.fit`.

    Args:
        text: int64 (N,). features: (N, F) of its tokens.
        ahead: as in `train_head`.
    """
    rows = None
    if not is_absent(whole.ids):  # the row of each token, -1 where it has none
        rows = torch.full((head.config.vocabulary,), -1, device=text.device)
        rows = rows.index_copy(0, whole.ids, torch.arange(len(whole.ids), device=text.device))

    def loss(model: Model, own: Tree, places: Tensor) -> Tensor:
        batch, full = text[places], own._replace(embedding=whole.embedding, head=whole.head)
        x, losses = carried(head, full, features[places[..., :-1]]), []
        for n in range(1, ahead + 1):
            x, _ = hidden(head, full, batch[..., n:-1], x[..., :-1, :])
            losses.append(_loss(head, full, x, batch[..., n + 1 :], rows))
        return torch.stack(losses).mean()

    return loss


def _loss(head: Head, full: HeadParams, x: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
    """The mean over the targets that the head has rows for."""
    config = head.config
    y = layers.rms_norm(x, full.norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    if rows is None:
        return cross_entropy(y, full.head, targets)
    at = rows[targets]
    each = cross_entropy(y, full.head, at.clamp(min=0), reduction="none")
    return torch.where(at >= 0, each, 0).sum() / (at >= 0).sum().clamp(min=1)
