"""How much faster is a text written with drafts than token by token, both by the compiled model?

    python benchmarks/speculation.py [--threads 1] [--tokens 32] [--rounds 2] [--write]
                                     [--only int4 head] [--chats facts story] [--head FOLDER]

SmolLM2-135M in float32, four chats, batch one, greedy and at a temperature. The candidates of a
chat take turns; under greedy all of them write the same text. Drafts come

    from the text itself      prompt lookup (a chain of n-grams), a suffix automaton as chain, tree
    from the same weights     in int8 and int4, read behind the target's own past, as chains of one
                              length, as chains that end where the draft is unsure, as trees; in
                              int4 without some of the layers
    from a trained head       as chain and tree, where --head has one

What is told is the time without that of the prompt, over the same of decoding token by token.
`--write` puts the tables into results/speculation.md.

    python benchmarks/speculation.py --train 10 --head FOLDER [--kind mtp] [--words 4096]

trains a head for about so many minutes of CPU time on chats that the model writes itself, saves it
(`fa.drafters.save_head`), and tells the acceptance before and after on chats that it did not see.
`--train 120` with two threads is the hour of two cores.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from _timing import interleave

import funcattn as fa

PAGE = Path(__file__).parent / "results" / "speculation.md"
BEGIN, END = "<!-- drafts: benchmarks/speculation.py --write -->", "<!-- end of drafts -->"
CHATS = {
    "facts": "What is the capital of France? Then tell me about the city.",
    "story": "Write a short story about a lighthouse keeper.",
    "science": "Explain how photosynthesis works.",
    "recipe": "Give me a recipe for bread.",
}
TOPICS = (
    *("the moon", "a river", "bees", "the Romans", "chess", "glass", "trains", "tea", "numbers"),
    *("volcanoes", "the heart", "music", "rain", "gold", "cats", "the sea", "paper", "clocks"),
    *("spiders", "bridges", "castles", "bicycles", "deserts", "gravity", "honey", "islands"),
    *("kites", "magnets", "owls", "rockets", "salt", "tides", "violins", "whales", "apples"),
    *("the brain", "cheese", "earthquakes", "friendship", "gardens", "light", "maps", "the Sun"),
)
ASKED = (
    "Tell me about {}.",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What are five facts about {}?",
    "Why is {} important?",
)
EDIT = """Copy this text, and change Tom to Anna: Tom walked to the old harbour in the morning. The boats were still asleep, and \
the gulls stood in a row on the wall. Tom sat down beside them and opened his bag. There was bread in it, and a letter that he had \
not read yet. The letter came from his sister, who lived on the other side of the bay, in a white house with a green door. She \
wrote that the apples were ripe, that the dog was well, and that she hoped to see him before the winter. Tom folded the letter and \
looked at the water. A small boat came in, with two men in it, and the gulls rose from the wall and flew towards it."""


SKIPPED = tuple(range(12, 18))
INSIDE = r"layers\.([2-9]|1\d|2[0-7])\.(q|k|v|o|gate|up|down)"


class Measured(NamedTuple):
    """One drafter on one chat: times the speed of plain decoding, tokens a round, rounds."""

    ratio: float
    tokens_per_round: float
    rounds: int


def main() -> None:
    """Measure, or train a head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 measures greedy alone")
    parser.add_argument("--chats", nargs="*", default=[*CHATS])
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of drafters")
    parser.add_argument("--head", type=Path, help="a folder of a trained head")
    parser.add_argument("--train", type=float, default=0, help="minutes of CPU time")
    parser.add_argument("--kind", default="mtp", help="of a trained head: mtp or eagle3")
    parser.add_argument("--words", type=int, default=4096, help="tokens that it knows")
    parser.add_argument("--write", action="store_true", help="into results/speculation.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = fa.load("smollm2-135m")
    model = fa.compile(fa.decoder(loaded.config))
    if options.train:
        train(model, loaded, options)
        return
    lines = [f"{torch.get_num_threads()} thread(s), {options.tokens} tokens a chat, medians of "]
    lines[0] += f"{options.rounds} in turns, torch {torch.__version__}."
    with torch.no_grad():
        for heat in sorted({0.0, options.temperature}):
            drafters = {
                name: drafter
                for name, drafter in made(model, loaded, heat, options.head).items()
                if any(part in name for part in options.only)
            }
            found = {
                chat: measured(model, loaded, CHATS[chat], drafters, heat, options)
                for chat in options.chats
            }
            lines += ["", "Greedy:" if not heat else f"At temperature {heat}:", ""]
            lines += table(found)
        of_text = {name: drafter for name, drafter in drafters.items() if "of the text" in name}
        if of_text and options.chats == [*CHATS]:
            found = {"edit": measured(model, loaded, EDIT, of_text, 0.0, options)}
            lines += ["", "Greedy, a text to be copied with a change:", "", *table(found)]
    print("\n".join(lines))
    if options.write:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2] if rest else "\n"
        shown = "\n".join([BEGIN, "", *lines, "", END])
        PAGE.write_text(before.rstrip() + "\n\n" + shown + after)


def made(
    model: fa.Model, loaded: fa.Loaded, heat: float, folder: Path | None
) -> dict[str, fa.drafters.Drafter]:
    """The drafters by name, for a target that is sampled at this temperature."""
    d, params = fa.drafters, loaded.params
    sampler = fa.sampling.temperature(heat) if heat else fa.sampling.greedy
    int4 = fa.int4(group=64)
    small = {
        "int8": fa.quantize(fa.int8)(params),
        "int4": fa.quantize(int4)(params),
        # The first and last layers and the embedding in int8 too.
        "int4 inside": fa.quantize(fa.int8)(fa.quantize(int4, INSIDE)(params)),
    }
    kinds = {"children": "mixed", "sampler": sampler} if heat else {}
    spine = {"branching": (3,) * 7, "width": 1, "confidence": 0.25, "least": 0.08}
    spine |= {"sampler": sampler} if heat else {}
    found = {
        "n-grams of the text, chain": d.prompt_lookup(length=4),
        "suffixes of the text, chain": d.suffix(length=4, chain=True),
        "suffixes of the text, tree": d.suffix(nodes=7, length=5),
    }
    for name, weights in small.items():
        found |= {
            f"{name}, chain of 3": d.model(model, weights, length=3, sampler=sampler),
            f"{name}, chain to the unsure": d.model(
                model, weights, length=7, sampler=sampler, confidence=0.4
            ),
        }
        if name != "int8":
            chain = d.model(model, weights)
            found[f"{name}, tree to the unsure"] = d.tree(chain, **spine)
    chain = d.model(model, small["int4"])
    found["int4, tree (2, 2, 1)"] = d.tree(chain, branching=(2, 2, 1), **kinds)
    if not heat:
        found["int4, tree of 7 nodes grown"] = d.tree(chain, nodes=7, depth=4, width=2)
    found["int4 without 6 layers, chain of 3"] = d.skip(
        model, small["int4"], SKIPPED, length=3, sampler=sampler
    )
    if folder is not None:
        head, weights = d.load_head(folder, model, params)
        drawn = sampler if heat else None
        found["head, chain of 3"] = d.head(head, weights, length=3, sampler=drawn)
        found["head, chain to the unsure"] = d.head(
            head, weights, length=5, sampler=drawn, confidence=0.2
        )
        found["head, tree to the unsure"] = d.tree(d.head(head, weights), **spine)
    return found


def measured(
    model: fa.Model,
    loaded: fa.Loaded,
    chat: str,
    drafters: dict[str, fa.drafters.Drafter],
    heat: float,
    options: argparse.Namespace,
) -> dict[str, Measured]:
    """What each drafter does for one chat."""
    prompt = torch.tensor(loaded.tokenizer.prompt([{"role": "user", "content": chat}]))
    print(f"\n{chat[:60]}: {len(prompt)} tokens, and {options.tokens} more", flush=True)
    sampler = fa.sampling.temperature(heat) if heat else fa.sampling.greedy
    given = (fa.key(0), model, loaded.params)
    plain = partial(fa.generate, *given, prompt, steps=options.tokens, sampler=sampler)
    wanted = plain()[0]
    candidates = {"token by token": plain, "the prompt": partial(plain, steps=1)}
    stats = {}
    for name, drafter in drafters.items():
        run = partial(fa.speculate, *given, drafter, prompt, steps=options.tokens, sampler=sampler)
        done = run()[0]
        same = "" if heat else f", {int((done.tokens == wanted).sum())} tokens the same"
        print(f"{name}: {done.stats}{same}", flush=True)
        candidates[name], stats[name] = run, done.stats
    times = interleave(candidates, repeats=options.rounds, warmup=0)
    own = {name: time.wall - times["the prompt"].wall for name, time in times.items()}
    return {
        name: Measured(
            own["token by token"] / own[name], float(each.tokens_per_round), int(each.rounds)
        )
        for name, each in stats.items()
    }


def table(found: dict[str, dict[str, Measured]]) -> list[str]:
    """Lines of a table: the ratio for each chat, and the middle of ratios and of tokens."""
    lines = [f"| drafter | {' | '.join(found)} | middle | tokens a round | rounds |"]
    lines.append("| --- " * (len(found) + 4) + "|")
    for name in next(iter(found.values())):
        each = [of_chat[name] for of_chat in found.values()]
        ratios = [f"{one.ratio:.2f}" for one in each]
        middle = median(one.ratio for one in each)
        tokens = median(one.tokens_per_round for one in each)
        rounds = sum(one.rounds for one in each)
        row = [name, *ratios, f"**{middle:.2f}**", f"{tokens:.2f}", f"{rounds}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def train(model: fa.Model, loaded: fa.Loaded, options: argparse.Namespace) -> None:
    """Write chats, train a head on them, save it, and tell what is accepted before and after."""
    if options.head is None:
        raise SystemExit("speculation.py: --train wants --head FOLDER, where the head is saved")
    params, ends = loaded.params, time.process_time() + 24 * options.train
    small, chats = fa.quantize(fa.int8)(params), []
    asked = [form.format(topic) for form in ASKED for topic in TOPICS]
    sampler = fa.sampling.chain(fa.sampling.temperature(0.8), fa.sampling.top_p(0.95))
    while (time.process_time() < ends or len(chats) < 4) and len(chats) < len(asked):
        n = len(chats)
        chat = [{"role": "user", "content": asked[n * 97 % len(asked)]}]
        prompt = torch.tensor(loaded.tokenizer.prompt(chat))
        with torch.no_grad():
            # Its own text in int8, which is the same but for a word in twenty, in half the time.
            tokens = fa.generate(
                *(fa.key(n), model, small, prompt),
                steps=160,
                sampler=sampler if n % 2 else fa.sampling.greedy,
                stop=loaded.tokenizer.stop,
            )[0]
        ended = torch.isin(tokens, torch.tensor(loaded.tokenizer.stop)).long().cumsum(0)
        chats.append(torch.cat([prompt, tokens[: int((ended == 0).sum()) + 1]]))
    text, held = torch.cat(chats[:-2]), torch.cat(chats[-2:])
    print(f"{len(text)} tokens of the model's own text, {len(held)} held out", flush=True)
    plain = fa.decoder(loaded.config)
    begin = partial(
        fa.drafters.train_head,
        *(fa.key(0), plain, params, text),
        kind=options.kind,
        vocabulary=options.words,
        ahead=2,
        validation=held,
    )
    head, first, _ = begin(steps=0)
    began = time.process_time()
    begin(steps=4, report_every=4, evaluations=1, progress=False)
    each = (time.process_time() - began) / 6  # four steps, the features and an evaluation
    steps = max(20, int(30 * options.train / each))
    schedule = fa.training.cosine(2e-3, steps, warmup=min(20, steps // 10))
    optimizer = fa.training.chain(fa.training.clip(1.0), fa.training.adamw(schedule))
    head, trained, done = begin(steps=steps, optimizer=optimizer, report_every=20, evaluations=4)
    fa.drafters.save_head(options.head, head, trained, target=params)
    print(f"{steps} steps, loss {done.history[-1].validation:.2f} on what is held out")
    for told, weights in (("before", first), ("after", trained)):
        drafter, kept = fa.drafters.head(head, weights, length=3), []
        for chat in CHATS.values():
            prompt = torch.tensor(loaded.tokenizer.prompt([{"role": "user", "content": chat}]))
            with torch.no_grad():
                given = (fa.key(0), model, params, drafter, prompt)
                kept.append(fa.speculate(*given, steps=options.tokens)[0].stats)
        print(f"{told}: " + "; ".join(f"{stats.tokens_per_round:.2f}" for stats in kept))


if __name__ == "__main__":
    main()
