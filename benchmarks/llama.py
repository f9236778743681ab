"""How fast are tokens, prompts and many futures, beside llama.cpp on the same weights?

    python benchmarks/llama.py [--threads 1 2] [--only token prompt futures] [--turns 9]
    python benchmarks/llama.py --write        the page benchmarks/results/llama.md

SmolLM2-135M by llama-cpp-python (see `_llama`), in the formats of its file (Q4_1) and in Q4_0, its
fastest; funcattn compiled, with int4 weights whose products are exact in the activations, and with
activations rounded to 8 bits, which is what llama.cpp multiplies ("8 bits"). One token: of
16 written greedily behind a past. A prompt: 512 tokens and the logits
of the last. Futures: 16 and 64 of one past of 1,000 tokens, 32 tokens each, drawn at temperature
0.8 by funcattn, greedy by llama.cpp, since samplers are not what is asked.

Wall time, and in brackets CPU time: where other programs take the processor it says more with one
thread; with two, llama.cpp's threads wait by spinning, which counts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _llama
import torch
from _timing import Timing, interleave
from torch.func import vmap

import funcattn as fa
from funcattn.native.building import model_name

PAGE = Path(__file__).parent / "results" / "llama.md"
SENTENCE = "The sea was calm, and the keeper wrote. "
PASTS, PROMPT, FUTURES = (64, 512, 2048), 512, (16, 64)
SHARED, STEPS, TURN = 1000, 32, 16  # tokens of the past of futures, of a future, of a turn
Row = tuple[str, int, dict[str, Timing]]  # what, threads, seconds by candidate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", default=["token", "prompt", "futures"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="the page of results")
    options = parser.parse_args()
    loaded = fa.load("smollm2-135m")
    model = fa.compile(fa.decoder(loaded.config))
    int4, near = fa.quantize(fa.int4)(loaded.params), fa.quantization.round_activations()
    trees = {"int4": int4, "int4, 8 bits": near(int4)}
    text = torch.tensor(loaded.tokenizer.encode(SENTENCE * max(PASTS))[: max(PASTS) + 1])
    files, rows = _llama.files(), list[Row]()
    with torch.no_grad():
        for threads in options.threads:
            torch.set_num_threads(threads)
            if "token" in options.only:
                rows += [token(model, trees, text[: n + 1], files, options.turns) for n in PASTS]
            if "prompt" in options.only:
                several = {"float32": loaded.params, **trees}
                rows.append(prompt(model, several, text[:PROMPT], files, options.turns))
            if "futures" in options.only:
                rows += [
                    futures(model, trees, text[: SHARED + 1], files, n, options.turns)
                    for n in FUTURES
                ]
    if options.write:
        PAGE.write_text(page(rows, options.turns))


def token(
    model: fa.Model,
    trees: dict[str, fa.Params],
    text: torch.Tensor,
    files: dict[str, Path],
    turns: int,
) -> Row:
    """Tokens written greedily behind all others."""
    n, threads = len(text) - 1, torch.get_num_threads()
    print(f"\na token behind {n}, {threads} thread(s)", flush=True)
    candidates: dict[str, Callable[[], Any]] = {}
    for name, params in trees.items():
        _, past = fa.generate(fa.key(0), model, params, text[:-1], steps=0)
        candidates[name] = partial(
            fa.generate, fa.key(1), model, params, text[-1:], past, steps=TURN
        )
    contexts = [_llama.Context(file, threads=threads, room=n + 64) for file in files.values()]
    for name, context in zip(files, contexts, strict=True):
        context.read(text[:-1].tolist(), 0)
        candidates[f"llama.cpp {name}"] = partial(context.write, text[-1:].tolist(), n, TURN)
    timings = interleave(candidates, repeats=turns, warmup=2)
    for context in contexts:
        context.close()
    each = {name: Timing(*(x / TURN for x in timing)) for name, timing in timings.items()}
    return f"token behind {n}, ms", threads, each


def prompt(
    model: fa.Model,
    trees: dict[str, fa.Params],
    text: torch.Tensor,
    files: dict[str, Path],
    turns: int,
) -> Row:
    """A prompt, read for its next token."""
    T, threads = len(text), torch.get_num_threads()
    print(f"\na prompt of {T}, {threads} thread(s)", flush=True)
    read = lambda params: fa.generate(fa.key(0), model, params, text, steps=1)
    candidates: dict[str, Callable[[], Any]] = {
        name: partial(read, params) for name, params in trees.items()
    }
    contexts = [_llama.Context(file, threads=threads, room=2 * T) for file in files.values()]
    for name, context in zip(files, contexts, strict=True):

        def whole(context: _llama.Context = context) -> None:
            context.forget()
            context.read(text.tolist(), 0)

        candidates[f"llama.cpp {name}"] = whole
    timings = interleave(candidates, repeats=turns, warmup=1)
    for context in contexts:
        context.close()
    return f"prompt of {T}, tokens/s", threads, timings


def futures(
    model: fa.Model,
    trees: dict[str, fa.Params],
    text: torch.Tensor,
    files: dict[str, Path],
    count: int,
    turns: int,
) -> Row:
    """Futures of one past, whole calls."""
    threads, keys, n = torch.get_num_threads(), fa.split(fa.key(1), count), len(text) - 1
    print(f"\n{count} futures, {threads} thread(s)", flush=True)
    candidates: dict[str, Callable[[], Any]] = {}
    for name, params in trees.items():
        _, past = fa.generate(fa.key(0), model, params, text[:-1], steps=0)
        one = lambda key, params=params, past=past: fa.generate(
            key, model, params, text[-1:], past, steps=STEPS, sampler=fa.sampling.temperature(0.8)
        )[0]
        candidates[name] = partial(vmap(one), keys)
    contexts = [
        _llama.Context(file, threads=threads, room=n + count * (STEPS + 1), texts=count)
        for file in files.values()
    ]
    for name, context in zip(files, contexts, strict=True):
        context.read(text[:-1].tolist(), 0)
        context.fork(count)
        candidates[f"llama.cpp {name}"] = partial(context.write, [int(text[-1])] * count, n, STEPS)
    timings = interleave(candidates, repeats=max(turns // 4, 1), warmup=0)
    for context in contexts:
        context.close()
    return f"{count} futures of {n}, tokens/s", threads, timings


def page(rows: list[Row], turns: int) -> str:
    """The page of results."""
    names = list(dict.fromkeys(name for *_, timings in rows for name in timings))

    def cell(what: str, timings: dict[str, Timing], name: str) -> str:
        if name not in timings:
            return ""
        if "ms" in what:
            wall, cpu = (1e3 * seconds for seconds in timings[name])
            return f"{wall:.2f} ({cpu:.2f})"
        tokens = PROMPT if "prompt" in what else int(what.split()[0]) * STEPS
        wall, cpu = (tokens / seconds for seconds in timings[name])
        return f"{wall:.0f} ({cpu:.0f})"

    table = [
        f"| threads | | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
        *(
            f"| {threads} | {what} | {' | '.join(cell(what, t, name) for name in names)} |"
            for what, threads, t in rows
        ),
    ]
    lines = [
        "# Beside llama.cpp",
        "",
        f"`python benchmarks/llama.py {' '.join(sys.argv[1:])}`: SmolLM2-135M, {model_name()}, "
        f"torch {torch.__version__}, {_llama.name() if _llama.HERE else 'without llama.cpp'}",
        f"built for this processor, {time.strftime('%Y-%m-%d')}. Medians of {turns} turns "
        f"(futures: {max(turns // 4, 1)}) that candidates took in one process; wall time, in "
        "brackets CPU time.",
        "",
        *table,
        "",
        'int4 are exact products of the activations, "8 bits" those of activations rounded to 8 '
        "bits, as llama.cpp rounds them; Q4_0 is requantized from the file's Q4_1 and",
        "repacked when it is loaded. The past is float32 here and float16 in llama.cpp.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
