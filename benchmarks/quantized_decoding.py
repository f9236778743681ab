"""How fast does a quantized model write, against the same in float32, and against llama.cpp on the
same file?

    python benchmarks/quantized_decoding.py [--threads 1] [--turns 12]

SmolLM2-135M, batch one, behind a chat of 44 tokens, compiled and eager; "blocks" are those of the
GGUF file as they are. Candidates take turns of 8 tokens: were they to change at every token, each
would find the caches filled by the others, and a model that reads a fifth of the bytes would pay
most for it. MBU is the bytes of the weights over the time, as a share of the bandwidth of
the fastest plain pass over float32. Then a step of 5 tokens beside one of 1, as where drafts are
verified. llama.cpp, where xllamacpp is installed, decodes the file by its own clock, before and
after. Where other programs take the processor, CPU time says more than wall time: both are printed.
"""

import argparse
import functools
from collections.abc import Iterator
from statistics import median

import torch
from _timing import interleave

import funcattn as fa
from funcattn.checkpoints.sources import locate
from funcattn.cli import memory_limit
from funcattn.quantization import tiles

MESSAGES = [
    {"role": "user", "content": "What is the capital of France? Then tell me about the city."}
]
TURN = 8  # tokens
WARMUP = 2  # turns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"the operator of funcattn.native: {tiles.missing() or 'runs'}")
    config, params, tokenizer = fa.load("smollm2-135m")
    trees = {
        "float32": params,
        "int8": fa.quantize(fa.int8)(params),
        "int4": fa.quantize(fa.int4)(params),
        "blocks": fa.load(str(locate("smollm2-135m")), keep_quantized=True).params,
    }
    model = fa.decoder(config)
    compiled = fa.compile(model)
    prompt = torch.tensor(tokenizer.prompt(MESSAGES))

    def written(params: fa.Params, model: fa.Model) -> Iterator[int]:
        for piece in fa.stream(
            fa.key(0), model, params, prompt, steps=TURN * (WARMUP + options.turns)
        ):
            yield piece.tokens[-1]

    def turn(tokens: Iterator[int]) -> None:
        for _ in range(TURN):
            next(tokens)

    whole = fa.tree.nbytes(params)
    candidates = {}
    for how, made in (("compiled", compiled), ("eager", model)):
        for name, tree in trees.items():
            candidates[f"{name} {how}"] = functools.partial(turn, written(tree, made))
    candidates |= memory_limit.reads(whole)
    llama_cpp(options.threads)
    timings = interleave(candidates, repeats=options.turns, warmup=WARMUP)
    llama_cpp(options.threads)
    bandwidth = memory_limit.bandwidth(whole, {name: t.wall for name, t in timings.items()})
    print(f"\nmemory: {bandwidth / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        if not name.startswith("reading"):
            tree, how = name.split()
            size, base = fa.tree.nbytes(trees[tree]), timings[f"float32 {how}"]
            each = timing.wall / TURN
            print(
                f"{name:18} {each * 1e3:6.1f} ms a token, {size / 1e6:4.0f} MB, MBU "
                f"{size / each / bandwidth:.2f},"
                f" {base.wall / timing.wall:.2f} of float32 {how} ({base.cpu / timing.cpu:.2f} by "
                "CPU time)"
            )
    steps(compiled, trees, 3 * options.turns)


def steps(model: fa.Model, trees: dict[str, fa.Params], rounds: int) -> None:
    """A step of 1 and of 5 tokens behind 60."""
    past = model.cache(256)._replace(length=torch.tensor(60))
    ids = torch.arange(5)
    run = lambda tree, T: lambda: model.extend(tree, ids[:T], past)
    with torch.no_grad():
        print("\na step of 1 and of 5 tokens")
        interleave(
            {f"{name} {T}": run(tree, T) for name, tree in trees.items() for T in (1, 5)},
            repeats=rounds,
            warmup=3,
        )


def llama_cpp(threads: int) -> None:
    """What llama.cpp says of itself: 64 tokens from the file's quantized blocks, five times."""
    try:
        import xllamacpp
    except ImportError:
        print("llama.cpp: xllamacpp is not installed")
        return
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx = str(locate("smollm2-135m")), 512
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.warmup = True
    server = xllamacpp.Server(settings)
    request = {
        "prompt": "The capital of France is",
        "n_predict": 64,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    speed = median(
        server.handle_completions(request)["timings"]["predicted_per_second"] for _ in range(5)
    )
    print(
        f"llama.cpp Q4_1, {threads} thread(s): {speed:.1f} tokens/s, {1e3 / speed:.1f} ms a "
        "token, by its own clock"
    )


if __name__ == "__main__":
    main()
