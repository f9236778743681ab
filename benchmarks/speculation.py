"""How much faster is a text written with drafts, compiled, than the same text token by token,
compiled?

    python benchmarks/speculation.py [--threads 2] [--tokens 64] [--length 3] [--rounds 3]

SmolLM2-135M in float32, greedy, batch one. Both write the same text and take turns. Drafts come
from the same weights in fewer bits, read behind the target's own past, and from the text itself
where the prompt asks to repeat it with a change; both as chains and as trees, which are verified in
one step by a mask. Prefill is part of both; what is left without it is told too.

    python benchmarks/speculation.py --train 60 [--head FOLDER]

trains an EAGLE-3 head for at most so many minutes on texts that the model writes itself, and tells
the acceptance before and after; the weights are stored in FOLDER and read from there another time.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from _timing import interleave

import funcattn as fa

CHATS = {
    "facts": "What is the capital of France? Then tell me about the city.",
    "story": "Write a short story about a lighthouse keeper.",
    "science": "Explain how photosynthesis works.",
    "recipe": "Give me a recipe for bread.",
}
TOPICS = ("the moon", "a river", "bees", "the Romans", "chess", "glass", "trains", "tea", "numbers")
EDIT = """Copy this text, and change Tom to Anna: Tom walked to the old harbour in the morning. The boats were still asleep, and \
the gulls stood in a row on the wall. Tom sat down beside them and opened his bag. There was bread in it, and a letter that he had \
not read yet. The letter came from his sister, who lived on the other side of the bay, in a white house with a green door. She \
wrote that the apples were ripe, that the dog was well, and that she hoped to see him before the winter. Tom folded the letter and \
looked at the water. A small boat came in, with two men in it, and the gulls rose from the wall and flew towards it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lookups", type=int, nargs="*", default=[3, 7])
    parser.add_argument(
        "--text", type=Path, help="calibrates another draft: int4 by GPTQ, of 2048 of its tokens"
    )
    parser.add_argument("--chats", nargs="*", default=[*CHATS])
    parser.add_argument("--schemes", nargs="*", default=["int8", "int4"])
    parser.add_argument("--branching", type=int, nargs="*", default=[3, 2, 1])
    parser.add_argument("--nodes", type=int, default=8, help="of a tree that is grown; 0 is none")
    parser.add_argument("--train", type=float, default=0, help="minutes, of a head")
    parser.add_argument("--head", type=Path, help="a folder of a trained head")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = fa.load("smollm2-135m")
    model, N = fa.compile(fa.decoder(loaded.config)), options.length
    schemes = {"int8": fa.int8, "int4": fa.int4(group=64)}
    drafts = {
        name: fa.drafters.model(model, fa.quantize(schemes[name])(loaded.params), length=N)
        for name in options.schemes
    }
    if options.text is not None:
        text = torch.tensor(loaded.tokenizer.encode(options.text.read_text()[:20_000])[:2048])
        fitted = fa.gptq(fa.decoder(loaded.config), text, schemes["int4"])(loaded.params)
        drafts["int4 by GPTQ"] = fa.drafters.model(model, fitted, length=N)
    for name, chain in list(drafts.items()):
        if options.branching:
            shape = tuple(options.branching)
            drafts[f"{name}, tree {shape}"] = fa.drafters.tree(chain, branching=shape)
        if options.nodes:
            tree = fa.drafters.tree(chain, nodes=options.nodes, depth=N, width=3)
            drafts[f"{name}, {options.nodes} nodes"] = tree
    if options.train or options.head:
        drafts |= trained(model, loaded, options)
    lookup = {"suffix tree": fa.drafters.suffix(nodes=15, length=8)}
    lookup |= {f"prompt lookup, {n}": fa.drafters.prompt_lookup(length=n) for n in options.lookups}
    with torch.no_grad():
        for name in options.chats if drafts else ():
            compare(name, model, loaded, CHATS[name], drafts, options)
        if lookup:
            compare("edit", model, loaded, EDIT, lookup, options)


def trained(
    model: fa.Model, loaded: fa.Loaded, options: argparse.Namespace
) -> dict[str, fa.drafters.Drafter]:
    """A head before and after its training: on texts that the model writes, within the minutes."""
    plain, N = fa.decoder(loaded.config), options.length
    # Half of the time for the text, half for the training, in rounds of 20 steps.
    ends = time.perf_counter() + 30 * options.train
    written, number = [], 0
    chats = [*CHATS.values(), *(f"Tell me about {x}." for x in TOPICS)]
    while time.perf_counter() < ends or not written:
        chat = [{"role": "user", "content": chats[number % len(chats)]}]
        prompt = torch.tensor(loaded.tokenizer.prompt(chat))
        sampler = fa.sampling.temperature(0.8)
        with torch.no_grad():
            tokens = fa.generate(
                *(fa.key(number), model, loaded.params, prompt), steps=128, sampler=sampler
            )[0]
        written.append(torch.cat([prompt, tokens]))
        number += 1
    text, ends = torch.cat(written), time.perf_counter() + 30 * options.train
    optimizer = fa.training.chain(fa.training.clip(1.0), fa.training.adamw(1e-3))
    train = partial(
        fa.drafters.train_head, fa.key(0), plain, loaded.params, text, optimizer=optimizer
    )
    head, first, done = train(steps=0)
    weights, steps, folder = first, 0, options.head
    while options.train and (time.perf_counter() < ends or not steps):
        steps += 20
        head, weights, done = train(
            steps=steps, start=(head, first), folder=folder, resume=True, report_every=20
        )
    if folder is not None and not options.train:
        head, weights, done = train(steps=20, start=(head, first), folder=folder, resume=True)
    told = f", loss {done.history[-1].training:.2f}" if done.history else ""
    print(f"a head: {len(text)} tokens of the model's own text, {steps} steps{told}")
    return {
        "head before": fa.drafters.head(head, first, length=N),
        "head": fa.drafters.head(head, weights, length=N),
        "head, tree": fa.drafters.tree(
            fa.drafters.head(head, weights), branching=tuple(options.branching or (1,))
        ),
    }


def compare(
    name: str,
    model: fa.Model,
    loaded: fa.Loaded,
    chat: str,
    drafts: dict[str, fa.drafters.Drafter],
    options: argparse.Namespace,
) -> None:
    prompt = torch.tensor(loaded.tokenizer.prompt([{"role": "user", "content": chat}]))
    print(f"\n{name}: {len(prompt)} tokens, and {options.tokens} more", flush=True)
    plain = partial(fa.generate, fa.key(0), model, loaded.params, prompt, steps=options.tokens)
    wanted = plain()[0]
    first = partial(fa.generate, fa.key(0), model, loaded.params, prompt, steps=1)
    candidates = {"token by token": plain, "prefill and one token": first}
    for kind, drafter in drafts.items():
        run = partial(
            fa.speculate, fa.key(0), model, loaded.params, drafter, prompt, steps=options.tokens
        )
        done = run()[0]
        same = int((done.tokens == wanted).long().cumprod(0).sum())
        stats = done.stats
        print(
            f"{kind}: acceptance {stats.acceptance:.2f}, {stats.tokens_per_round:.2f} tokens a "
            f"round, {same} tokens the same"
        )
        candidates[kind] = run
    timings = interleave(candidates, repeats=options.rounds, warmup=0)
    own = {
        name: timing.wall - timings["prefill and one token"].wall
        for name, timing in timings.items()
    }
    ratios = [f"{name} {own['token by token'] / own[name]:.2f}" for name in drafts]
    print(f"without the prefill: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
