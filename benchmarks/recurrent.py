"""What does a recurrent layer cost: a scan in chunks beside the loop over tokens and transformers'
own chunks, with its derivatives, and a step after any length?

    python benchmarks/recurrent.py [--threads 1] [--tokens 2048] [--heads 4] [--rounds 5]
        [--only scans|decoding]

The gated delta rule as Qwen3-Next has it, heads of 128, float32, one sequence. "loop" is the
recurrence as it is written, in torch, a token at a time; "transformers" is its
torch_chunk_gated_delta_rule, where the package is installed.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from _timing import interleave
from torch import Tensor
from torch.func import grad, jvp

import funcattn as fa
from funcattn import layers

SIZE = 128  # features of keys and values
FEW = 256  # tokens of the loop's gradient, which keeps several states of each

LENGTHS = (1024, 8192, 32768)
HEADS = {"state_heads": 4, "state_key_heads": 2, "state_key_size": 32, "state_value_size": 32}
KINDS = {"short_convolution": {}, "gated_delta": HEADS, "state_space": HEADS}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["scans", "decoding"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only != "decoding":
        scans(options.tokens, options.heads, options.rounds)
    if options.only != "scans":
        decoding(options.rounds)


def scans(T: int, heads: int, rounds: int) -> None:
    """The rule alone: T tokens, derivatives, and one token behind them."""
    x = inputs(T, heads)
    scan = lambda x: layers.gated_delta(*x, normalized=True).out
    candidates: dict[str, Callable[[Inputs], Tensor]] = {"loop": loop, "scan": scan}
    theirs = transformers_chunks()
    if theirs is not None:
        candidates["transformers"] = theirs
    for name, f in candidates.items():
        torch.testing.assert_close(f(x), candidates["loop"](x), msg=lambda m, n=name: f"{n}: {m}")

    print(f"\n{T} tokens, {heads} heads of {SIZE}")
    interleave({name: partial(f, x) for name, f in candidates.items()}, repeats=rounds, warmup=1)

    few = inputs(min(T, FEW), heads)
    print(f"\ngradient in all arguments, {few[0].shape[1]} tokens")
    gradient = lambda f: grad(lambda x: f(x).square().sum())
    interleave(
        {name: partial(gradient(f), few) for name, f in candidates.items()},
        repeats=rounds,
        warmup=1,
    )
    print(f"\nderivatives of the scan, {T} tokens")
    hvp = lambda: jvp(gradient(scan), (x,), (x,))[1]
    interleave(
        {"value": partial(scan, x), "gradient": partial(gradient(scan), x), "hvp": hvp},
        repeats=rounds,
        warmup=1,
    )

    print("\none token behind a state, whatever is before it")
    state = layers.gated_delta(*x, normalized=True).state
    q, k, v, g, beta = (y[:, -1:] for y in x)
    step = lambda: layers.gated_delta(q, k, v, g, beta, state, normalized=True)
    interleave({"step": step}, repeats=200)


def decoding(rounds: int) -> None:
    """A step of a decoder behind texts of 1024, 8192 and 32768 tokens, for each kind of layer.

    Of four layers the last has attention, with a window of 64 tokens in a `Ring`: no part of the
    past grows with the text.
    """
    for kind, sizes in KINDS.items():
        config = fa.Config(
            width=256,
            layers=4,
            feed_forward=512,
            window=64,
            context=2**16,
            **{"mixers": (kind, kind, kind, "attention"), "convolution_size": 4, **sizes},
        )
        model = fa.decoder(config)
        params, past = model.init(fa.key(0)), model.cache(0, kind=fa.caches.ring(window=64))
        tokens, pasts = fa.random.randint(fa.key(1), (LENGTHS[-1],), 0, config.vocabulary), {}
        for begin in range(0, LENGTHS[-1], 512):
            delta = model.hidden(params, tokens[begin : begin + 512], past)[1]
            past = fa.commit(past, delta)
            if begin + 512 in LENGTHS:
                pasts[begin + 512] = past
        whole = model.extend(params, tokens[: LENGTHS[0] + 1])[0][-1]
        step = lambda n: model.apply(params, tokens[:1], pasts[n])  # noqa: B023 (called here)
        one = model.extend(params, tokens[LENGTHS[0] : LENGTHS[0] + 1], pasts[LENGTHS[0]])[0][-1]
        torch.testing.assert_close(one, whole, atol=1e-3, rtol=1e-3)
        print(f"\na token and its commit behind a text, three layers of {kind}")
        steps = {f"{n} tokens": partial(step, n) for n in LENGTHS}
        interleave(steps, repeats=20 * rounds)


def inputs(T: int, heads: int) -> Inputs:
    """q, k, v, log_decay, beta of T tokens."""
    keys = fa.split(fa.key(0), 5)
    q, k, v = (fa.random.normal(key, (heads, T, SIZE)) for key in keys[:3])
    log_decay = -0.2 * fa.random.uniform(keys[3], (heads, T, 1))
    return q, k, v, log_decay, fa.random.uniform(keys[4], (heads, T))


def loop(x: Inputs) -> Tensor:
    """The recurrence, token by token."""
    unit = lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
    q, k, v, g, beta = unit(x[0]) / SIZE**0.5, unit(x[1]), *x[2:]
    state, out = v.new_zeros(v.shape[0], SIZE, SIZE), []
    for t in range(v.shape[1]):
        at = slice(t, t + 1)
        state = g[:, at].exp() * state
        written = beta[:, at, None] * (v[:, at] - k[:, at] @ state)
        state = state + k[:, at].mT @ written
        out.append(q[:, at] @ state)
    return torch.cat(out, 1)


def transformers_chunks() -> Callable[[Inputs], Tensor] | None:
    """The same by transformers, in its layout, which is not timed; None without the package."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as theirs
    except ImportError:
        return None

    def chunks(x: Inputs) -> Tensor:
        q, k, v, g, beta = (y.transpose(0, 1).unsqueeze(0) for y in x)
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        out, _ = theirs.torch_chunk_gated_delta_rule(q, k, v, g.squeeze(-1), beta, **options)
        return out.squeeze(0).transpose(0, 1)

    return chunks


if __name__ == "__main__":
    main()
