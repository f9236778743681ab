"""Modify a model layer by layer, each with the activations after the modified layers before it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ... import layers, taps, transformer, tree
from ...core import errors
from ...layers import Weight
from ...models import Model, config_of, told
from ...progress import track
from ...records import is_absent
from ...transformer import Config, Layer, LayerContext, LayerDelta, LayerSpec, Params, layer_inputs

FEEDS = {  # a tap of a layer -> the matrices that its value is multiplied by
    "attention.input": ("q", "k", "v"),
    "attention.mixed": ("o",),
    "feed_forward.input": ("gate", "up"),
    "feed_forward.inner": ("down",),
}
OF_MIXERS = {  # of a recurrent layer, beside attention or not
    **FEEDS,
    "mixer.input": ("mixer_in", "mixer_gate"),
    "mixer.mixed": ("mixer_out",),
}
OF_LATENTS = {  # of a layer with latent attention
    **FEEDS,
    "attention.input": ("q_down", "kv_down"),
    "attention.query_latent": ("q",),
    "attention.latent": ("k", "v"),
}
BY_EXPERT = {  # a matrix of experts whose input rows are recorded -> the matrices they multiply
    "up": ("gate", "up"),
    "down": ("down",),
}
WINDOW = 512  # tokens that are read at once

Gather: TypeAlias = Callable[[str, Tensor], None]  # (tap, rows (n, K)), or (name.expert, rows)
Feeds: TypeAlias = Callable[[set[str], Gather], None]  # calls gather with the inputs at those taps
Progress: TypeAlias = Callable[[int, int], None]  # (layers done, of all)


def feeds_of(layer: Layer) -> dict[str, tuple[str, ...]]:
    """A tap of the layer -> the matrices that its value is multiplied by."""
    if not is_absent(layer.mixer_gate_down):  # of low rank: the gate reads no tap
        return {**OF_MIXERS, "mixer.input": ("mixer_in", "mixer_gate_down", "mixer_rate_down")}
    if not is_absent(layer.mixer_in):
        return OF_MIXERS
    if is_absent(layer.kv_down):
        return FEEDS
    if is_absent(layer.q_down):  # queries are made of the input itself
        return {**OF_LATENTS, "attention.input": ("q", "kv_down"), "attention.query_latent": ()}
    return OF_LATENTS


def decoder_of(function: str, model: Model, tokens: Tensor) -> Config:
    """The config of a model; raises where it is not a decoder, or tokens are not a text."""
    config = config_of(model, "hidden")
    if config is None:
        errors.fail(
            function,
            "model",
            "from fa.decoder",
            told(model),
            "Make it with fa.decoder(config).",
            TypeError,
        )
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.is_floating_point():
        got = (
            f"{tokens.dtype} {errors.shape(tokens)}"
            if isinstance(tokens, Tensor)
            else f"a {type(tokens).__name__}"
        )
        errors.fail(
            function,
            "tokens",
            "integers (T,)",
            got,
            "Encode the text with the tokenizer of the model.",
            TypeError,
        )
    if not len(tokens):
        errors.fail(
            function, "tokens", "a text", "none", "Calibrate with some hundreds of tokens at least."
        )
    return config


class Heard(NamedTuple):
    """A weight of experts (X, out, in) that passes the input rows of each to a function."""

    weight: Weight
    name: str
    gather: Gather


@layers.linear_experts.register
def _(weight: Heard, x: Tensor, expert: Tensor) -> Tensor:
    for i in expert.unique().tolist():
        weight.gather(f"{weight.name}.{i}", x[expert == i])
    return layers.linear_experts(weight.weight, x, expert)


def walk(
    model: Model,
    params: Params,
    tokens: Tensor,
    change: Callable[[int, Layer, Feeds], Layer],
    progress: Progress | None = None,
) -> tuple[Layer, ...]:
    """Every layer as modified by `change`, on the activations after the modified layers before it.

    Args:
        model: from `fa.decoder`.
        tokens: integers (T,), read in windows of 512, without the remainder at the end.
        change: f(number, layer, feeds) -> layer. feeds({taps}, gather) runs the original layer, and
            calls gather(tap, rows (n, K)) with the inputs of its matrices, a window at a time; for
            "up" or "down" of experts gather("up.3", rows).
        progress: called with the number of layers done, and of all; None shows a line on a
            terminal.
    """
    config = config_of(model, "hidden")
    assert config is not None
    size = min(WINDOW, len(tokens), config.limit() or WINDOW)
    windows = tokens[: len(tokens) // size * size].unflatten(0, (-1, size))
    errors.whole(
        "calibration", "params", tree.leaves(params), "Calibrate whole params: fa.gather(params)."
    )
    positions = torch.arange(size, device=tokens.device)
    specs = [config.layer_spec(i) for i in range(config.layers)]
    done: list[Layer] = []

    def run(
        number: int, spec: LayerSpec, layer: Layer, x: Tensor, context: LayerContext
    ) -> tuple[Tensor, LayerDelta]:
        through = lambda layer, row: transformer.block(
            config, spec, layer, x[row], _of_row(context, row), (), name="", kernel=model.kernel
        )

        def feeds(wanted: set[str], gather: Gather) -> None:
            def listen(name: str, value: Tensor) -> Tensor:
                if name.lstrip(".") in wanted:
                    gather(name.lstrip("."), value.flatten(0, -2))
                return value

            heard = {
                name: Heard(getattr(layer, name), name, gather) for name in wanted & {*BY_EXPERT}
            }
            with taps.listening(listen):
                for row in range(len(x)):
                    through(layer._replace(**heard), row)

        changed = change(number, layer, feeds)
        after, new = zip(*(through(changed, row) for row in range(len(x))), strict=True)
        done.append(changed)
        if progress is not None:
            progress(number + 1, config.layers)
        if not config.shared_layers or not spec.caches:  # no layer reads its keys again
            return torch.stack(after), LayerDelta((), ())
        sides = (torch.stack([one[side] for one in new]) for side in (0, 1))
        return torch.stack(after), LayerDelta(*sides)

    weights = params.layers if progress is not None else track(params.layers, "calibrating layer")
    x = transformer.embed_tokens(config, params, windows, positions)
    inputs = layer_inputs.of_tokens(config, params, windows, x)
    transformer.run_layers(config, specs, weights, x, positions, run, inputs=inputs)
    return tuple(done)


def _of_row(context: LayerContext, row: int) -> LayerContext:
    """The context of one window of the text."""
    inputs = context.inputs[row] if isinstance(context.inputs, Tensor) else ()
    lent: Any = tuple(side[row] for side in context.lent)
    return context._replace(inputs=inputs, lent=lent)
