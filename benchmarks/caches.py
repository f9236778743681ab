"""What does a past in fewer bits cost and gain: time and bytes of a token, and perplexity?

    python benchmarks/caches.py [--threads 1] [--tokens 1000 8000] [--rounds 15] [--write]
    python benchmarks/caches.py --perplexity TEXT [--count 20000] [--context 1024] [--write]

SmolLM2-135M in float32, behind a past of random keys and values (what is measured does not depend
on them): attention of a step alone, over all 30 layers, and the whole step, eager and compiled.
The perplexity is that of windows of a plain text, read 16 tokens at a time, so that a token sees
its past in codes; what is compared with is a dense past, and errors of the mean are those of the
differences of single tokens. The first quarter of a window is not scored.
"""

import argparse
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import interleave

import funcattn as fa
from funcattn import caches, native
from funcattn.kernels import attend_segments

KINDS = {
    "dense": caches.Cache,
    "8 bits": caches.quantized(bits=8),
    "4 bits": caches.quantized(bits=4),
}
CHUNK = 16  # tokens of a step while a text is read
RESULTS = Path(__file__).parent / "results" / "caches.md"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--perplexity", type=Path, help="a plain text")
    parser.add_argument("--count", type=int, default=20_000, help="tokens of the text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        lines = perplexity(options) if options.perplexity else speed(options)
    print("\n".join(lines))
    if options.write:
        with RESULTS.open("a") as file:
            file.write("\n".join(["", *lines, ""]))


def speed(options: argparse.Namespace) -> list[str]:
    """A table of milliseconds and bytes of a token, by bits and length."""
    config, params, _ = fa.load("smollm2-135m")
    params, model = fa.dequantize(params), fa.decoder(config)
    fast, token = fa.compile(model), torch.tensor([7])
    lines = [
        f"{native.model_name()}, {options.threads} of {torch.multiprocessing.cpu_count()} threads, "
        f"torch {torch.__version__}, {platform.system()}; medians of {options.rounds} in turns, CPU time.",
        "",
        "| past | tokens | KB a token | attention, ms | eager step, ms | compiled step, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for tokens in options.tokens:
        pasts = {name: filled(config, kind, tokens) for name, kind in KINDS.items()}
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        for what, run in {
            "attention": partial(attention, config),
            "eager step": partial(model.extend, params, token),
            "compiled step": partial(fast.extend, params, token),
        }.items():
            print(f"\n{what} behind {tokens} tokens")
            found = interleave(
                {name: partial(run, past) for name, past in pasts.items()}, repeats=options.rounds
            )
            for name in KINDS:
                times[name].append(found[name].cpu)
        lines += [
            f"| {name} | {tokens} | {taken(pasts[name]) / tokens / 1e3:.1f} | "
            + " | ".join(f"{1e3 * x:.2f}" for x in times[name])
            + " |"
            for name in KINDS
        ]
    return lines


def filled(config: fa.Config, kind: Any, tokens: int) -> Any:
    """A past of normal numbers, without room for more than a step."""
    shape = 2, config.layers, config.kv_heads, tokens, config.head_size
    k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cache = fa.decoder(config).cache(tokens + 1, kind=kind)
    return fa.commit(cache, caches.Delta(tuple(k), tuple(v)))


def attention(config: fa.Config, past: Any) -> torch.Tensor:
    """One query of every head over what each layer remembers."""
    q, place = torch.ones(config.heads, 1, config.head_size), past.length.reshape(1)
    for layer in range(config.layers):
        q = attend_segments(q, caches.past(past, layer, place), scale=config.scale)
    return q


def taken(past: Any) -> int:
    """Bytes of all storages, each counted once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in fa.tree.leaves(past)
    }
    return sum(storages.values())


def perplexity(options: argparse.Namespace) -> list[str]:
    """A table of perplexities by kind of past."""
    config, params, tokenizer = fa.load("smollm2-135m")
    model = fa.compile(fa.decoder(config))
    text = options.perplexity.read_text()[: 8 * options.count]
    ids = torch.tensor(tokenizer.encode(text))[: options.count]
    windows = ids.split(options.context)
    windows = [window for window in windows if len(window) == options.context] or [ids]
    first = len(windows[0]) // 4
    lines = [
        f"{len(windows)} windows of {len(windows[0])} tokens of {options.perplexity.name}, "
        f"{len(windows) * (len(windows[0]) - first)} of them scored.",
        "",
        "| past | perplexity | against dense |",
        "| --- | --- | --- |",
    ]
    dense: torch.Tensor | None = None
    for name, kind in KINDS.items():
        read = partial(losses, config, model, params, kind, first)
        each = torch.cat([read(window) for window in windows]).double()
        dense = each if dense is None else dense
        more = each - dense
        change = (
            f"{more.mean().expm1().item():+.3%} +- {(more.std() / len(more) ** 0.5).item():.3%}"
        )
        lines.append(
            f"| {name} | {each.mean().exp().item():.4f} | {change if name != 'dense' else ''} |"
        )
        print(lines[-1], flush=True)
    return lines


def losses(
    config: fa.Config, model: fa.Model, params: fa.Params, kind: Any, first: int, ids: torch.Tensor
) -> torch.Tensor:
    """The negative log probability of each token of a window from `first` on."""
    past, found = model.cache(len(ids), kind=kind), []
    for begin in range(0, len(ids), CHUNK):
        hidden, delta = model.hidden(params, ids[begin : begin + CHUNK], past)
        past = caches.commit_donated(caches.grow(past, 0) if not begin else past, delta, CHUNK)
        found.append(hidden)
    hidden = torch.cat(found)[first - 1 : -1]
    logits = fa.decoder(config).logits(params, hidden)
    return torch.nn.functional.cross_entropy(logits, ids[first:], reduction="none")


if __name__ == "__main__":
    main()
