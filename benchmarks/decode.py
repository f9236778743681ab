"""How fast does the decoder write, against transformers and against the speed at which this machine reads memory?

    python benchmarks/decode.py [--threads 2] [--tokens 24] [--rounds 9]

SmolLM2-135M in float32, eager, batch one, a chat of 44 tokens. All candidates write the same tokens after the same prompt, which
each has read before: what is timed is decoding. "By rows" is the same tree with each matrix stored row after row, as in the file:
equal shapes and numbers in another order in memory than `fa.load` gives. The limit is one matrix-vector product over as many
equal shapes and numbers in another order than `fa.load` gives. The limit is one matrix-vector product over as many bytes as the
weights have, for each token: no decoder that reads all these weights is faster. Prefill and loading are timed after it.
"""

import argparse
import copy
import tempfile
from functools import partial

import torch
import transformers
from _timing import Timing, interleave

import funcattn as fa

MESSAGES = [{"role": "user", "content": "What is the capital of France? Then tell me about the city."}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    loaded = fa.load("smollm2-135m")
    peer = of_transformers(loaded)
    prompt = torch.tensor(loaded.tokenizer.prompt(MESSAGES))
    decoding(loaded, peer, prompt, options)
    for T in (len(prompt), 512):
        prefill(loaded, peer, prompt.repeat(1 + T // len(prompt))[:T], options)
    print("\nload from GGUF")
    interleave({"fa.load": partial(fa.load, "smollm2-135m")}, repeats=5, warmup=1)


def of_transformers(loaded: fa.Loaded) -> transformers.PreTrainedModel:
    """The same weights in transformers, through the folder that `fa.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        fa.save(f"{folder}/model", *loaded)
        return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()


def decoding(loaded: fa.Loaded, peer: transformers.PreTrainedModel, prompt: torch.Tensor, options: argparse.Namespace) -> None:
    config, params, _ = loaded
    model, steps = fa.decoder(config), options.tokens
    _, past = fa.generate(fa.key(0), model, params, prompt[:-1], steps=0)
    with torch.no_grad():
        their_past = peer(prompt[None, :-1], past_key_values=transformers.DynamicCache(config=peer.config)).past_key_values

    def ours(params: fa.Params) -> torch.Tensor:
        return fa.generate(fa.key(0), model, params, prompt[-1:], past, steps=steps)[0]

    def theirs() -> torch.Tensor:
        cache, ends = copy.deepcopy(their_past), {"eos_token_id": None, "pad_token_id": 0}  # it is written in place
        return peer.generate(prompt[None], past_key_values=cache, max_new_tokens=steps, do_sample=False, **ends)[0, len(prompt) :]

    @torch.no_grad()
    def their_loop() -> torch.Tensor:
        cache, token, tokens = copy.deepcopy(their_past), prompt[None, -1:], []
        for _ in range(steps):
            token = peer(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, -1)[0]

    width = 8192
    rows = torch.ones(fa.tree.nbytes(params) // (4 * width), width)  # written: untouched zeros share one page
    x = torch.ones(width)

    def limit() -> None:
        for _ in range(steps):
            torch.mv(rows, x)

    by_rows = fa.tree.map(torch.Tensor.contiguous, params)
    candidates = {
        "transformers generate": theirs,
        "transformers bare loop": their_loop,
        "fa.generate": partial(ours, params),
        "fa.generate by rows": partial(ours, by_rows),
        "memory-read limit": limit,
    }
    assert all(torch.equal(candidates[name](), theirs()) for name in candidates if name != "memory-read limit")
    print(f"\n{steps} tokens behind a past of {len(prompt) - 1}")
    timings = interleave(candidates, repeats=options.rounds, warmup=1)
    speeds(timings, steps)
    bandwidth = steps * rows.numel() * 4 / timings["memory-read limit"].wall
    print(f"GEMV reads {bandwidth / 1e9:.1f} GB/s; the weights are {fa.tree.nbytes(params) / 1e6:.0f} MB")


def prefill(loaded: fa.Loaded, peer: transformers.PreTrainedModel, prompt: torch.Tensor, options: argparse.Namespace) -> None:
    model = fa.decoder(loaded.config)

    def ours() -> torch.Tensor:
        return fa.generate(fa.key(0), model, loaded.params, prompt, steps=1)[0][0]

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return peer(prompt[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    assert torch.equal(ours(), theirs())
    print(f"\nprefill of {len(prompt)} tokens")
    speeds(interleave({"transformers": theirs, "fa.generate": ours}, repeats=options.rounds, warmup=1), len(prompt))


def speeds(timings: dict[str, Timing], tokens: int) -> None:
    for name, timing in timings.items():
        print(f"{name}: {tokens / timing.wall:.1f} tokens/s, {timing.wall / tokens * 1e3:.1f} ms a token")


if __name__ == "__main__":
    main()
