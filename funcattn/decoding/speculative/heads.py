"""Trained heads: a layer or two that draft from what the target computed of the text.

With f_i the target's features of token i and t_i the tokens, a head reads pairs (t_{i+1}, f_i) and
predicts t_{i+2}; behind the last token it goes on with x, its own output, in the place of f.

    eagle3    c = fuse f of three layers;  x = c + attention([norm t, norm c]), then a feed-forward
    mtp       x = fuse [norm t, norm f] of the target's last norm, then layers as in a decoder
    logits = head norm x

t is the embedding of the token. A head may predict a part of the vocabulary alone: `ids` names the
target's token for each of its own, and all others have a logit of -inf.

Sources: Li et al., EAGLE-3, arXiv:2503.01840; DeepSeek-AI, DeepSeek-V3, arXiv:2412.19437, section
2.2 (multi-token prediction).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import caches, layers, sampling, transformer
from ...caches import Cache, Delta, KVCache, Past
from ...core import errors
from ...core.doors import door, printed
from ...layers import Weight
from ...masks import Mask
from ...records import ABSENT, is_absent, record
from ...sampling import Sampler
from ...transformer import Config, Layer, LayerContext, LayerSpec
from ..loop import commit_owned
from .drafters import Drafter, NodeReader, check_length, check_probability
from .tree_drafters import of_reader
from .tree_rules import kinship
from .tree_shapes import Shape

KINDS = ("eagle3", "mtp")


@dataclass(frozen=True)
class Head:
    """What a trained head is, as a value: its weights are `HeadParams`.

    Args:
        kind: "eagle3" or "mtp".
        config: of its layers; `vocabulary` and `width` are the target's.
        taps: of the target, whose values side by side are the features.
        norm_before_residual: of "eagle3", whether the residual begins at norm c.
    """

    kind: str
    config: Config
    taps: tuple[str, ...]
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            errors.fail("Head", "kind", f"one of {', '.join(KINDS)}", repr(self.kind), "As loaded.")


@record
class HeadParams(NamedTuple):
    """The weights of a head; matrices are (out, in).

    fuse: (E, F) of features in "eagle3", (E, 2 E) in "mtp". ids: int64 (Vd,), the target's token of
    each row of head; () where they are the same.
    """

    fuse: Weight
    embedding: Weight  # (V, E)
    embedding_norm: Weight  # (E,)
    hidden_norm: Weight  # (E,)
    layers: tuple[Layer, ...]  # of "eagle3" the first has q, k, v (., 2 E), and no attention_norm
    norm: Weight  # (E,)
    head: Weight  # (Vd, E)
    ids: Tensor | tuple[()] = ABSENT


@door
def carried(head: Head, params: HeadParams, features: Tensor) -> Tensor:
    """What a head carries of the target's features (T, F): (T, E)."""
    return layers.linear(params.fuse, features) if head.kind == "eagle3" else features


@door
def hidden(
    head: Head,
    params: HeadParams,
    tokens: Tensor,
    carry: Tensor,
    cache: Past = ABSENT,
    *,
    mask: Mask | Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Delta]:
    """The output x (T, E) of a head's layers for pairs of tokens and what is carried, and a delta.

    Args:
        head, params: the head.
        tokens: int64 (*lead, T), of each pair. carry: (*lead, T, E), from `carried` or an earlier x
            of this function.
        cache: of the pairs before, of the head's own layers.
        mask, positions: as in `Model.hidden`.

    Law: equal to a plain implementation of the published models (test_heads.py).
    """
    config, T = head.config, tokens.shape[-1]
    before = 0 if is_absent(cache) else cache.length
    places = (before + torch.arange(T, device=tokens.device)).expand(tokens.shape)
    at = places if positions is None else positions
    norm = functools.partial(
        layers.rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset
    )
    e = norm(layers.embed(params.embedding, tokens), params.embedding_norm)
    x = carry
    if head.kind == "mtp":
        x = layers.linear(params.fuse, torch.cat([e, norm(carry, params.hidden_norm)], -1))

    def run(
        number: int, spec: LayerSpec, weights: Layer, x: Tensor, context: LayerContext
    ) -> tuple[Tensor, transformer.LayerDelta]:
        read = None
        if head.kind == "eagle3" and not number:
            h = norm(x, params.hidden_norm)
            read, x = torch.cat([e, h], -1), h if head.norm_before_residual else x
        past = () if is_absent(cache) else caches.past(cache, number, at, spec.window)
        name = f"draft.layers.{number}"
        return transformer.block(
            *(config, spec, weights, x, context, tuple(past)),
            name=name,
            kernel=None,
            attention_input=read,
        )

    specs = [config.layer_spec(i) for i in range(config.layers)]
    return transformer.run_layers(
        config, specs, params.layers, x, at, run, mask=mask, in_order=positions is None
    )


@door
def logits(head: Head, params: HeadParams, x: Tensor) -> Tensor:
    """The logits (*lead, V) of a head's outputs x (*lead, E), in float32 at least.

    Those of tokens that the head does not know are -inf.
    """
    config = head.config
    y = layers.rms_norm(x, params.norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    out = layers.linear(params.head, y)
    out = out if out.dtype == torch.float64 else out.float()
    if is_absent(params.ids):
        return out[..., : config.vocabulary]
    every = out.new_full((*out.shape[:-1], config.vocabulary), -torch.inf)
    return every.index_copy(-1, params.ids, out)


@record
class HeadState(NamedTuple):
    """The state of a head that drafts.

    cache: of all pairs before that of the last token. pending: (F,), the features of the token
    before it. last: int64 (), the last token. outputs: (m + 1, E), x at the nodes of a tree.
    """

    cache: KVCache
    pending: Tensor
    last: Tensor
    outputs: Tensor | tuple[()] = ABSENT


_Head = Head


@door(name="drafters.head")
@printed
def head(
    head: Head,
    params: HeadParams,
    *,
    length: int = 4,
    sampler: Sampler | None = None,
    confidence: float = 0.0,
) -> Drafter:
    """Draft with a trained head, such as EAGLE-3: a chain; `drafters.tree` makes trees of it.

    The head hears the target at `head.taps`, so a compiled target takes its eager steps; not where
    that is what its `hidden` returns ("mtp").

    Args:
        head, params: from `load_head` or `train_head`.
        length: N, how many tokens to draft.
        sampler: a transform of the head's logits from which drafts are drawn; None takes the most
            probable token.
        confidence: the draft ends behind the token at which its probability falls below it; 0
            never stops.

    Raises:
        ValueError: the target has no such taps.

    Law: distributed as generate, and equal to it under greedy, for any weights of the head
        (test_heads.py).
    """
    check_length("drafters.head", length)
    if not isinstance(head, _Head) or not isinstance(params, HeadParams):
        got = f"a {type(head).__name__} and a {type(params).__name__}"
        remedy = "Both are of load_head or train_head."
        errors.fail("drafters.head", "head, params", "a Head, HeadParams", got, remedy, TypeError)
    check_probability("drafters.head", "confidence", confidence)
    shape = Shape((1,) * length, 0, 0, "top" if sampler is None else "drawn", confidence)
    transform = sampling.chain() if sampler is None else sampler
    return of_reader(_reader(head, params), shape, transform, head.config.vocabulary)


def _reader(head: Head, params: HeadParams) -> NodeReader:
    read_pairs = functools.partial(hidden, head, params)
    config = head.config

    def init(
        prompt: Tensor, prompt_length: Tensor, steps: int, features: Tensor
    ) -> tuple[Tensor, HeadState]:
        n = prompt_length - 1
        carry = carried(head, params, features)
        room = caches.bucket(len(prompt) + steps)
        sides = carry.new_zeros(2, config.layers, config.kv_heads, room + 1, config.head_size)
        cache: KVCache = Cache(sides[0], sides[1], torch.zeros_like(n))
        if len(prompt) > 1:
            _, delta = read_pairs(prompt[1:], carry[:-1], cache)
            cache = commit_owned(cache, delta, n)
        pending = features.index_select(0, n.reshape(1))[0]
        row = torch.zeros(config.vocabulary, device=prompt.device, dtype=carry.dtype)
        return row, HeadState(cache, pending, torch.zeros_like(n))

    def read(
        last: Tensor, tokens: Tensor, parent: Tensor, state: HeadState, since: int, path: bool
    ) -> tuple[Tensor, HeadState]:
        carry = carried(head, params, state.pending.unsqueeze(0))
        if len(tokens):
            assert not is_absent(state.outputs)
            carry = torch.cat([carry, state.outputs.index_select(0, parent.clamp(min=0))])
        above = kinship(parent).above
        x, _ = read_pairs(
            torch.cat([last.reshape(1), tokens]),
            carry,
            state.cache,
            mask=above,
            positions=state.cache.length + above.long().sum(-1) - 1,
        )
        after = HeadState(state.cache, state.pending, last, x)
        return logits(head, params, x[since:]), after

    def keep(
        rows: Tensor, tokens: Tensor, count: Tensor, state: HeadState, features: Tensor
    ) -> HeadState:
        """Read the pairs of the round with the target's features, all but that of the last."""
        seen = torch.cat([state.pending.unsqueeze(0), features[:-1]])
        read = torch.cat([state.last.reshape(1), tokens[:-1].clamp(min=0)])
        _, delta = read_pairs(read, carried(head, params, seen), state.cache)
        newest = features.index_select(0, (count - 1).clamp(min=0).reshape(1))[0]
        pending = torch.where(count > 0, newest, state.pending)
        return HeadState(commit_owned(state.cache, delta, count), pending, state.last)

    return NodeReader(None, init, lambda cache: cache, read, keep, head.taps)
