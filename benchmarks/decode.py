"""How fast does the decoder write, against transformers and the speed at which this machine reads
memory?

    python benchmarks/decode.py [--threads 2] [--tokens 120] [--rounds 9]
    python benchmarks/decode.py --cuda [--past 1024]

SmolLM2-135M, batch one, a chat of 44 tokens. First token by token: all float32 candidates write the
same text, and take turns at each token of it, so that a neighbour that wakes up wakes up for all.
"By rows" is the same tree with each matrix stored row after row, as in the file: equal shapes and
numbers in another order than `fa.load` gives. The limit is one matrix-vector product over as many
bytes as the weights have. llama.cpp, where llama-cpp-python is installed, writes behind the
same chat (see `_llama`). Then steps behind 500 tokens in pasts with more and more room, and, whole,
16 tokens by either `generate` behind a past that each has read before. Prefill and loading come
last.

On a GPU the question is another one: a random model of the shape of Llama 2 7B, in bfloat16, int8
and int4, one step recorded as a CUDA graph, and the share of the measured memory bandwidth (MBU) at
which it reads its weights and its past.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _llama
import torch
import transformers
from _cuda import milliseconds, read_ceiling, require
from _timing import Timing, interleave

import funcattn as fa
from funcattn.cli import memory_limit

WARMUP = 4  # tokens
# not the embedding, whose dtype is that of the activations
MATRICES = r"layers\..*\.(q|k|v|o|gate|up|down)|head"
MESSAGES = [
    {"role": "user", "content": "What is the capital of France? Then tell me about the city."}
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cuda", action="store_true", help="a random 7B model on a GPU instead")
    parser.add_argument(
        "--past", type=int, default=1024, help="tokens that the step on a GPU reads"
    )
    options = parser.parse_args()
    if options.cuda:
        return on_gpu(options.past)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    loaded = fa.load("smollm2-135m")
    peer = of_transformers(loaded)
    prompt = torch.tensor(loaded.tokenizer.prompt(MESSAGES))
    token_by_token(loaded, peer, prompt, options)
    _llama.tell(options.threads, prompt.tolist())
    capacities(loaded, options)
    whole(loaded, peer, prompt, options)
    for T in (len(prompt), 512):
        prefill(loaded, peer, prompt.repeat(1 + T // len(prompt))[:T], options)
    print("\nload from GGUF")
    interleave({"fa.load": partial(fa.load, "smollm2-135m")}, repeats=5, warmup=1)


def on_gpu(remembered: int) -> None:
    """A step of a 7B model, as one CUDA graph, by scheme."""
    print(
        f"{require('decode --cuda')}, torch {torch.__version__}, a step behind {remembered} tokens"
    )
    # products with one vector become sums that read codes as they are
    torch._inductor.config.coordinate_descent_tuning = True
    bandwidth = read_ceiling()
    print(f"GEMV reads {bandwidth:.0f} GB/s")
    config = fa.Config(
        vocabulary=32000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_size=128,
        feed_forward=11008,
        context=4096,
        tied=False,
    )
    model = fa.decoder(config)
    with torch.device("cuda"), torch.no_grad():
        params = fa.cast(torch.bfloat16)(model.init(fa.key(0)))
        past = model.cache(2 * remembered, dtype=torch.bfloat16)._replace(
            length=torch.tensor(remembered)
        )
        for name, scheme in (("bfloat16", None), ("int8", fa.int8), ("int4", fa.int4)):
            weights = params if scheme is None else fa.quantize(scheme, MATRICES)(params)
            wall = milliseconds(
                recorded(
                    torch.compile(model.extend, fullgraph=True), weights, torch.tensor([1]), past
                )
            )
            # half of the room of k and of v
            read = fa.tree.nbytes(weights) - fa.tree.nbytes(weights.embedding) + past.k.nbytes
            print(
                f"{name:<9} {wall:>7.2f} ms a token, {1e3 / wall:>6.1f} tokens/s, MBU "
                f"{read / wall / 1e6 / bandwidth:.2f}",
                flush=True,
            )


def recorded(step: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """A step as a CUDA graph: run three times beside, then recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*arguments)
    return graph.replay


def of_transformers(loaded: fa.Loaded) -> transformers.PreTrainedModel:
    """The same weights in transformers, through the folder that `fa.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        fa.save(f"{folder}/model", *loaded)
        return transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32
        ).eval()


def token_by_token(
    loaded: fa.Loaded,
    peer: transformers.PreTrainedModel,
    prompt: torch.Tensor,
    options: argparse.Namespace,
) -> None:
    config, params, _ = loaded
    model = fa.decoder(config)
    compiled = fa.compile(model)
    _, past = fa.generate(fa.key(0), model, params, prompt[:-1], steps=0)

    def ours(params: fa.Params, model: fa.Model = model) -> Iterator[int]:
        for piece in fa.stream(
            fa.key(0), model, params, prompt[-1:], past, steps=WARMUP + options.tokens
        ):
            yield piece.tokens[-1]

    def theirs() -> Iterator[int]:
        cache, token = their_past(peer, prompt), prompt[None, -1:]
        while True:
            with torch.no_grad():
                token = peer(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            yield int(token)

    size = fa.tree.nbytes(params)
    written: dict[str, list[int]] = {}
    turn = lambda name, tokens: lambda: written.setdefault(name, []).append(next(tokens))
    candidates = {
        "transformers": turn("transformers", theirs()),
        "fa.stream": turn("fa.stream", ours(params)),
        "fa.stream compiled": turn("compiled", ours(params, compiled)),
        "fa.stream compiled int8": turn(
            "compiled int8", ours(fa.quantize(fa.int8)(params), compiled)
        ),
        "fa.stream by rows": turn("by rows", ours(fa.tree.map(torch.Tensor.contiguous, params))),
        **memory_limit.reads(size),
    }
    begun = time.perf_counter()
    next(ours(params, fa.compile(model)))
    print(f"compiled, the first token and its code: {time.perf_counter() - begun:.1f} s")
    print(f"\na token, behind a past of {len(prompt) - 1} to {len(prompt) + options.tokens}")
    timings = interleave(candidates, repeats=options.tokens, warmup=WARMUP)
    assert (
        written["transformers"] == written["fa.stream"] == written["by rows"] == written["compiled"]
    )
    speeds(timings, 1)
    bandwidth = memory_limit.bandwidth(size, {name: t.wall for name, t in timings.items()})
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; the weights are {size / 1e6:.0f} MB")


def capacities(loaded: fa.Loaded, options: argparse.Namespace) -> None:
    """A step behind 500 tokens: what is reserved should not cost."""
    model, remembered = fa.decoder(loaded.config), 500
    compiled, token = fa.compile(model), torch.tensor([1])
    pasts = {}
    for capacity in (1024, 8192):
        past = model.cache(capacity)
        pasts[capacity] = past._replace(length=torch.tensor(remembered))
    step = lambda model, past: lambda: model.extend(loaded.params, token, past)
    candidates = {
        f"{how}, capacity {n}": step(made, pasts[n])
        for how, made in (("eager", model), ("compiled", compiled))
        for n in pasts
    }
    print(f"\na step behind {remembered} tokens")
    with torch.no_grad():
        interleave(candidates, repeats=3 * options.rounds, warmup=3)


def whole(
    loaded: fa.Loaded,
    peer: transformers.PreTrainedModel,
    prompt: torch.Tensor,
    options: argparse.Namespace,
) -> None:
    config, params, _ = loaded
    model, steps = fa.decoder(config), 16
    _, past = fa.generate(fa.key(0), model, params, prompt[:-1], steps=0)
    read = their_past(peer, prompt)

    def ours() -> torch.Tensor:
        return fa.generate(fa.key(0), model, params, prompt[-1:], past, steps=steps)[0]

    def theirs() -> torch.Tensor:
        # it is written in place
        cache, ends = copy.deepcopy(read), {"eos_token_id": None, "pad_token_id": 0}
        return peer.generate(
            prompt[None], past_key_values=cache, max_new_tokens=steps, do_sample=False, **ends
        )[0, len(prompt) :]

    assert torch.equal(ours(), theirs())
    print(f"\n{steps} tokens behind a past of {len(prompt) - 1}")
    speeds(
        interleave(
            {"transformers generate": theirs, "fa.generate": ours}, repeats=options.rounds, warmup=1
        ),
        steps,
    )


@torch.no_grad()
def their_past(
    peer: transformers.PreTrainedModel, prompt: torch.Tensor
) -> transformers.DynamicCache:
    """All of the prompt but its last token, read."""
    return peer(
        prompt[None, :-1], past_key_values=transformers.DynamicCache(config=peer.config)
    ).past_key_values


def prefill(
    loaded: fa.Loaded,
    peer: transformers.PreTrainedModel,
    prompt: torch.Tensor,
    options: argparse.Namespace,
) -> None:
    model = fa.decoder(loaded.config)

    def ours() -> torch.Tensor:
        return fa.generate(fa.key(0), model, loaded.params, prompt, steps=1)[0][0]

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return peer(prompt[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    assert torch.equal(ours(), theirs())
    print(f"\nprefill of {len(prompt)} tokens")
    speeds(
        interleave({"transformers": theirs, "fa.generate": ours}, repeats=options.rounds, warmup=1),
        len(prompt),
    )


def speeds(timings: dict[str, Timing], tokens: int) -> None:
    for name, timing in timings.items():
        print(
            f"{name}: {tokens / timing.wall:.1f} tokens/s, {timing.wall / tokens * 1e3:.1f} ms a "
            "token"
        )


if __name__ == "__main__":
    main()
