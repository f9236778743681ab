"""What does each kind of past cost: a step, a commit, and the memory of one past and of 32 futures
of it?

    python benchmarks/kinds.py [--threads 1] [--tokens 1000] [--rounds 9]

SmolLM2-135M in float32, eager, one sequence. A step is `extend`; "with commit" is `apply`, which
copies what the kind must so that the older value stays; "generated" is a token of `generate`, which
writes into what it made itself. Memory counts each storage once. The ring is a window of 256 and
four sinks: for this model an approximation. Last, a dense past with more and more reserved.
"""

import argparse
from functools import partial
from typing import Any

import torch
from _timing import interleave

import funcattn as fa
from funcattn import caches

KINDS = {
    "Cache": caches.Cache,
    "pages(64)": caches.pages(block=64),
    "int8": caches.quantized(bits=8),
    "int4": caches.quantized(bits=4),
    "int4, recent 0": caches.quantized(bits=4, recent=0),
    "ring(256, 4)": caches.ring(window=256, sinks=4),
}
OWN, FUTURES = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config, params, _ = fa.load("smollm2-135m")
    model = fa.decoder(config)
    text = fa.random.randint(fa.key(0), (options.tokens,), 0, config.vocabulary)
    token = torch.tensor([7])
    begin = lambda kind, size: model.apply(params, text, model.cache(size, kind=kind))[1]
    pasts = {name: begin(kind, options.tokens + OWN) for name, kind in KINDS.items()}

    print(f"\none step behind {options.tokens} tokens")
    interleave(
        {name: partial(model.extend, params, token, past) for name, past in pasts.items()},
        repeats=options.rounds,
    )
    print("\nwith commit")
    interleave(
        {name: partial(model.apply, params, token, past) for name, past in pasts.items()},
        repeats=options.rounds,
    )
    print("\ngenerated, 16 tokens")
    go_on = lambda past: fa.generate(fa.key(0), model, params, token, past, steps=16)
    interleave(
        {name: partial(go_on, past) for name, past in pasts.items()},
        repeats=max(1, options.rounds // 3),
    )

    print(
        f"\nmemory, MB{'one past':>18} {'32 forks':>10} {f'+ {OWN} tokens each':>18}   over "
        "prefix + own"
    )
    delta = model.extend(params, text[:OWN], pasts["Cache"])[1]
    row = taken(begin(caches.Cache, options.tokens)) / (options.tokens + 1)
    for name, kind in KINDS.items():
        past = begin(kind, options.tokens)
        forks = [grown(past, delta) for _ in range(FUTURES)]
        ideal = taken(past) + FUTURES * OWN * row
        sizes = [taken(past), taken(*[past] * FUTURES), taken(past, *forks)]
        print(
            f"{name:<14}"
            + "".join(f"{size / 1e6:>14.1f}" for size in sizes)
            + f"{sizes[-1] / ideal:>16.3f}"
        )

    print("\na dense past of 500 tokens, by what is reserved: apply")
    reserved = {
        f"room for {S}": model.apply(params, text[:500], model.cache(S))[1] for S in (1024, 8192)
    }
    interleave(
        {name: partial(model.apply, params, token, past) for name, past in reserved.items()},
        repeats=options.rounds,
    )


def grown(past: Any, delta: caches.Delta) -> Any:
    """A future of its own: what `generate` continues the past in, with a delta committed."""
    return fa.commit(caches.fork(past, delta, OWN), delta)


def taken(*values: Any) -> int:
    """Bytes of all storages of these values, each counted once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage()
        for value in values
        for x in fa.tree.leaves(value)
    }
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    main()
