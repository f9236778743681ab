"""How fast are many futures of one past written, against transformers' generate and llama.cpp?

    python benchmarks/batch.py [--threads 1 2] [--futures 16 64] [--past 1000] [--tokens 32]
    python benchmarks/batch.py --write        the page benchmarks/results/batch.md

SmolLM2-135M. Each future is drawn at temperature 0.8 behind one past that all have read: funcattn
maps `fa.generate` of the compiled model over keys, in float32 and with int4 weights, and holds the
past once; transformers' `generate(num_return_sequences=...)` continues a cache of as many copies,
which are made outside of the clock. Candidates take turns. llama.cpp, where llama-cpp-python is
installed, decodes the file's own Q4_1 blocks: one sequence is read, copied to the others
(`llama_memory_seq_cp`), and each step is one batch with a token of each; greedy, since its samplers
are not what is asked.

First the step is taken apart: the layers without a past, behind it, the head, and the drawing.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import _llama
import torch
import transformers
from _timing import Timing, interleave
from decode import of_transformers, their_past
from torch.func import vmap

import funcattn as fa
from funcattn.checkpoints.sources import locate
from funcattn.native.building import model_name

PAGE = Path(__file__).parent / "results" / "batch.md"
SENTENCE = "The sea was calm, and the keeper wrote. "
PEER, OURS, INT4 = "transformers generate", "funcattn float32", "funcattn int4"
SAMPLER = fa.sampling.temperature(0.8)
FEW = 32  # futures that are timed `rounds` times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--futures", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--past", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="the page of results")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = fa.load("smollm2-135m")
    peer = of_transformers(loaded)
    text = torch.tensor(loaded.tokenizer.encode(SENTENCE * options.past)[: options.past + 1])
    trees = {OURS: loaded.params, INT4: fa.quantize(fa.int4)(loaded.params)}
    model = fa.compile(fa.decoder(loaded.config))
    rows, parts = [], []
    with torch.no_grad():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for futures in options.futures:
                print(f"\n{futures} futures, {threads} thread(s)", flush=True)
                parts += taken_apart(model, trees, text, futures)
                timings = compare(model, trees, peer, text, futures, options)
                speeds = {name: futures * options.tokens / t.wall for name, t in timings.items()}
                found = llama_cpp(text, futures, options.tokens, threads)
                speeds |= {} if found is None else {"llama.cpp": found}
                told = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
                print(f"tokens/s: {told}", flush=True)
                rows.append((futures, threads, speeds))
    if options.write:
        PAGE.write_text(page(rows, parts, options))


def compare(
    model: fa.Model,
    trees: dict[str, fa.Params],
    peer: transformers.PreTrainedModel,
    text: torch.Tensor,
    futures: int,
    options: argparse.Namespace,
) -> dict[str, Timing]:
    """Whole calls, in turns; each draws its own futures."""
    candidates: dict[str, Callable[[], object]] = {PEER: theirs(peer, text, futures, options)}
    for name, params in trees.items():
        _, past = fa.generate(fa.key(0), model, params, text[:-1], steps=0)
        one = lambda key, params=params, past=past, model=model: fa.generate(
            key, model, params, text[-1:], past, steps=options.tokens, sampler=SAMPLER
        )[0]
        eager = partial(one, model=fa.decoder(model.config))
        few, keys = fa.split(fa.key(2), 2), fa.split(fa.key(1), futures)
        same = (vmap(one)(few) == vmap(eager)(few)).all(-1).sum()
        print(f"{name}: {same} of 2 futures are those of the eager model, token for token")
        candidates[name] = partial(vmap(one), keys)
    return interleave(candidates, repeats=rounds_of(futures, options), warmup=0)


def rounds_of(futures: int, options: argparse.Namespace) -> int:
    """Half as many where a call of transformers takes a minute."""
    return options.rounds if futures <= FEW else max(options.rounds // 2, 1)


def theirs(
    peer: transformers.PreTrainedModel,
    text: torch.Tensor,
    futures: int,
    options: argparse.Namespace,
) -> Callable[[], torch.Tensor]:
    """generate behind a cache of as many copies, made anew for each call before its clock."""
    read = their_past(peer, text)

    def copies() -> transformers.DynamicCache:
        cache = copy.deepcopy(read)
        cache.batch_repeat_interleave(futures)
        return cache

    waiting = [copies() for _ in range(rounds_of(futures, options))]  # it is written in place
    ends = {"eos_token_id": None, "pad_token_id": 0}

    def run() -> torch.Tensor:
        return peer.generate(
            text[None],
            past_key_values=waiting.pop(),
            max_new_tokens=options.tokens,
            num_return_sequences=futures,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            **ends,
        )

    return run


def taken_apart(
    model: fa.Model, trees: dict[str, fa.Params], text: torch.Tensor, futures: int
) -> Iterator[tuple[int, int, str, list[float]]]:
    """Milliseconds of the parts of a step: (futures, threads, name, times)."""
    keys, tokens = fa.split(fa.key(0), futures), text[:1].expand(futures, 1)
    tails = fa.tree.map(lambda leaf: leaf.expand(futures, *leaf.shape).clone(), model.cache(33))
    for name, params in trees.items():
        past = model.cache(len(text))
        behind = lambda n, params=params, past=past: vmap(
            lambda token, tail: model.hidden(
                params, token, fa.Branch(past._replace(length=torch.tensor(n)), tail)
            )[0][-1]
        )(tokens, tails)
        x = behind(len(text) - 1)
        head = lambda params=params, x=x: vmap(lambda x: model.logits(params, x))(x)
        logits = head()
        draw = lambda logits=logits: vmap(
            lambda key, row: fa.sampling.draw(key, SAMPLER, row, fa.sampling.begin(SAMPLER, row))[0]
        )(keys, logits)
        runs = partial(behind, 0), partial(behind, len(text) - 1), head, draw
        times = [1e3 * seconds(run) for run in runs]
        short, long, of_head, drawing = times
        print(
            f"{name}: layers {short:.1f} ms without a past, {long:.1f} behind it, head "
            f"{of_head:.1f}, drawing {drawing:.1f}",
            flush=True,
        )
        yield futures, torch.get_num_threads(), name, times


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median time of a call."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times)


def llama_cpp(text: torch.Tensor, futures: int, tokens: int, threads: int) -> float | None:
    """Tokens a second of as many sequences behind one that they share; None where it is missing."""
    if not _llama.HERE:
        return None
    T = len(text) - 1
    context = _llama.Context(
        locate("smollm2-135m"), threads=threads, room=T + futures * (tokens + 1), texts=futures
    )
    context.read(text[:-1].tolist(), 0)
    context.fork(futures)
    begun = time.perf_counter()
    context.write([int(text[-1])] * futures, T, tokens)
    speed = futures * tokens / (time.perf_counter() - begun)
    context.close()
    return speed


def page(
    rows: list[tuple[int, int, dict[str, float]]],
    parts: list[tuple[int, int, str, list[float]]],
    options: argparse.Namespace,
) -> str:
    """The page of results."""
    names = list(dict.fromkeys(name for *_, speeds in rows for name in speeds))
    cell = lambda speeds, name: (
        f"{speeds[name]:.0f} ({speeds[name] / speeds[PEER]:.2f})" if name in speeds else ""
    )
    table = [
        f"| futures, threads | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *(
            f"| {futures}, {threads} | {' | '.join(cell(speeds, name) for name in names)} |"
            for futures, threads, speeds in rows
        ),
    ]
    steps = [
        "| futures, threads | | layers, no past | layers, behind the past | head | drawing |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {futures}, {threads} | {name} | {' | '.join(f'{each:.1f}' for each in times)} |"
            for futures, threads, name, times in parts
        ),
    ]
    lines = [
        "# Many futures",
        "",
        f"`python benchmarks/batch.py {' '.join(sys.argv[1:])}`: SmolLM2-135M, futures of {options.tokens} tokens "
        f"behind one past of {options.past}, drawn",
        f"at temperature 0.8; {model_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {time.strftime('%Y-%m-%d')}.",
        f"Medians of {options.rounds} calls that candidates took in turns (half as many beyond "
        f"{FEW} futures). Tokens a second, and in "
        "brackets times transformers'; llama.cpp, where there",
        "is a column of it, decodes the file's Q4_1 blocks greedily.",
        "",
        *table,
        "",
        "Milliseconds of the parts of one step of funcattn. What the layers take more behind the "
        "past is attention over it, which is read once for",
        "all futures.",
        "",
        *steps,
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
