"""Common to the commands that write text: model and tokenizer, prompt, sampler, key."""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import funcattn as fa

from .. import checkpoints, sampling, sharding, tree
from .terminal import say, working


@dataclass(frozen=True)
class Session:
    """A loaded model and its tokenizer."""

    config: fa.Config
    params: fa.Params
    tokenizer: Any  # a checkpoints.Tokenizer; None where `load` needs none
    model: fa.Model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.params.norm.dtype


def load(
    options: argparse.Namespace, mesh: DeviceMesh | None = None, *, needs_tokenizer: bool = True
) -> Session:
    """The model of the options; on a mesh, this process's shard."""
    with working(f"Loading {options.model}"):
        if mesh is None:
            config, params, tokenizer = fa.load(options.model, dtype=options.dtype)
        else:
            config, params, tokenizer = checkpoints.load_sharded(
                options.model, mesh, dtype=options.dtype
            )
        params = tree.to(options.device)(sharding.to_local(params))
    if tokenizer is None and needs_tokenizer:
        raise ValueError(
            f"{options.model} has no tokenizer.json. Put the one of this model beside its weights."
        )
    model = fa.decoder(config)
    fast, wanted = fa.compile(model), getattr(options, "compile", False)
    if wanted is None:  # not said
        wanted = mesh is None and fast.is_operator(params)
    return Session(config, params, tokenizer, fast if wanted else model)


def key_of(options: argparse.Namespace) -> Tensor:
    """The key of the options."""
    return tree.to(options.device)(fa.key(options.seed))


def room(session: Session, read: int, steps: int) -> int:
    """How many tokens can be written after `read` tokens, at most `steps`."""
    context = session.config.context
    if read > context:
        raise ValueError(
            f"the text has {read} tokens, and the model was trained on {context}. "
            "Give it a shorter one."
        )
    return min(steps, context - read + 1)  # the last one is not read


def prompt_of(options: argparse.Namespace) -> str:
    """The prompt: the argument, or stdin."""
    text = options.prompt
    if text in (None, "-"):
        if sys.stdin.isatty():
            say("Type the prompt; Ctrl-D on a line of its own ends it.")
        text = sys.stdin.read().removesuffix("\n")  # as the shell does in $(...)
    return utf8(text)


def utf8(text: str) -> str:
    """The text; raises where it has lone surrogates (from undecodable bytes)."""
    text.encode()
    return text


def sampler_of(options: argparse.Namespace) -> sampling.Sampler:
    """The sampler of the options."""
    if options.greedy:
        return sampling.greedy
    filters = {
        sampling.top_k: options.top_k,
        sampling.top_p: options.top_p,
        sampling.min_p: options.min_p,
    }
    return sampling.chain(
        sampling.temperature(options.temperature),
        *(f(x) for f, x in filters.items() if x is not None),
    )


def message(role: str, text: str) -> dict[str, str]:
    """One message of a conversation."""
    return {"role": role, "content": text}
