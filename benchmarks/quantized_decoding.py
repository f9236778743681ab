"""How fast does a quantized model write, against the same in float32, and against llama.cpp on the
same file?

    python benchmarks/quantized_decoding.py [--threads 1] [--turns 12] [--only prefill]

SmolLM2-135M, batch one, behind a chat of 44 tokens, compiled and eager; "blocks" are those of the
GGUF file as they are. Candidates take turns of 8 tokens: were they to change at every token, each
would find the caches filled by the others, and a model that reads a fifth of the bytes would pay
most for it. MBU is the bytes of the weights over the time, as a share of the bandwidth of
the fastest plain pass over float32. Then a step of 5 tokens beside one of 1, as where drafts are
verified. llama.cpp, where llama-cpp-python is installed (see `_llama`), writes 64 tokens before
and after. Where other programs take the processor, CPU time says more than wall time: both are
printed. Last a prompt of 512 tokens, beside transformers in float32. "8 bits" are the same weights
with activations of 8 bits (`fa.quantization.round_activations`), which is what llama.cpp
multiplies.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import _llama
import torch
import transformers
from _timing import interleave
from decode import of_transformers

import funcattn as fa
from funcattn.checkpoints.sources import locate
from funcattn.cli import memory_limit
from funcattn.layers import dense_products
from funcattn.quantization import tiles

MESSAGES = [
    {"role": "user", "content": "What is the capital of France? Then tell me about the city."}
]
TURN = 8  # tokens
PROMPT = 512  # tokens
WARMUP = 2  # turns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--only", choices=["decoding", "steps", "prefill"])
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
    near = fa.quantization.round_activations()
    rounded = {f"{name}, 8 bits": near(tree) for name, tree in trees.items() if name != "float32"}
    model = fa.decoder(config)
    compiled = fa.compile(model)
    if options.only in (None, "decoding"):
        decoding(model, compiled, trees, tokenizer, options)
    if options.only in (None, "steps"):
        steps(compiled, trees | rounded, 3 * options.turns)
    if options.only in (None, "prefill"):
        prefill(compiled, trees | rounded, fa.Loaded(config, params, tokenizer), options)


def decoding(
    model: fa.Model,
    compiled: fa.Model,
    trees: dict[str, fa.Params],
    tokenizer: Any,
    options: argparse.Namespace,
) -> None:
    """Tokens one after the other, in turns of several."""
    prompt = torch.tensor(tokenizer.prompt(MESSAGES))

    def written(params: fa.Params, model: fa.Model) -> Iterator[int]:
        for piece in fa.stream(
            fa.key(0), model, params, prompt, steps=TURN * (WARMUP + options.turns)
        ):
            yield piece.tokens[-1]

    def turn(tokens: Iterator[int]) -> None:
        for _ in range(TURN):
            next(tokens)

    whole = fa.tree.nbytes(trees["float32"])
    candidates = {}
    for how, made in (("compiled", compiled), ("eager", model)):
        for name, tree in trees.items():
            candidates[f"{name} {how}"] = functools.partial(turn, written(tree, made))
    candidates |= memory_limit.reads(whole)
    _llama.tell(options.threads, prompt.tolist())
    timings = interleave(candidates, repeats=options.turns, warmup=WARMUP)
    _llama.tell(options.threads, prompt.tolist())
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


def prefill(
    model: fa.Model, trees: dict[str, fa.Params], loaded: fa.Loaded, options: argparse.Namespace
) -> None:
    """A prompt of 512 tokens, read for its next token."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = of_transformers(loaded)
    prompt = torch.tensor(loaded.tokenizer.prompt(MESSAGES)).repeat(20)[:PROMPT]

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return peer(prompt[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    run = lambda tree: lambda: fa.generate(fa.key(0), model, tree, prompt, steps=1)[0][0]
    ours: dict[str, Callable[[], Any]] = {name: run(tree) for name, tree in trees.items()}
    assert torch.equal(ours["float32"](), theirs())
    print(f"\na prompt of {PROMPT} tokens; {dense_products.explain()}")
    candidates = {"transformers": theirs, **ours}
    for form, file in _llama.files().items():
        context = _llama.Context(file, threads=options.threads, room=2 * PROMPT)

        def whole(context: _llama.Context = context) -> None:
            context.forget()
            context.read(prompt.tolist(), 0)

        candidates[f"llama.cpp {form}"] = whole
    timings = interleave(candidates, repeats=options.turns, warmup=1)
    base = timings["transformers"]
    for name, timing in timings.items():
        print(
            f"{name:18} {PROMPT / timing.wall:6.0f} tokens/s, {PROMPT / timing.cpu:6.0f} a second "
            f"of CPU, {base.wall / timing.wall:.2f} of transformers ({base.cpu / timing.cpu:.2f} "
            "by CPU time)"
        )


if __name__ == "__main__":
    main()
