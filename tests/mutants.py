"""Damaged and hostile checkpoints by the thousand: `python mutants.py KIND FIRST COUNT` loads
mutants FIRST .. FIRST + COUNT - 1.

Each mutant follows from its number, so a bad one is seen again with COUNT = 1. A mutant must load,
or raise CheckpointError (for a folder FileNotFoundError too, where a file is named that is not
there). The process has bounded memory, and each mutant ten seconds.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
from pieces_bytes import model
from samples import CONFIG, params, tokenizer, write_gguf

from funcattn.checkpoints import CheckpointError, load, save
from funcattn.checkpoints.gguf.header import read_header
from funcattn.checkpoints.sources import locate

MEMORY = 2**30  # bytes above what the imports took
SECONDS = 10

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    33,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 32,
    2**64 - 1,
]
VALUES = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "<s>",
        "../x",
        "\x00",
        "é☃",
        0,
        -1,
        1,
        2,
        3,
        64,
        300,
        2**31,
        2**63,
        2**64,
        10**30,
        0.5,
        -0.0,
        1e-300,
        1e300,
    ),
    *(
        float("nan"),
        float("inf"),
        [],
        {},
        [0],
        [None],
        {"a": 1},
        [[]] * 3,
        "a" * 5000,
        list(range(100)),
        {"type": "x"},
    ),
]


# Mutations of bytes.


def mutate_bytes(draw: np.random.Generator, data: bytes, header: int) -> bytes:
    """One to four changes, most of them among the first `header` bytes."""
    found = bytearray(data)
    for _ in range(draw.integers(1, 5)):
        end = min(len(found), header) if draw.random() < 0.8 else len(found)
        if end < 9:
            break
        at, other = (int(n) for n in draw.integers(0, end - 8, 2))
        size = int(draw.integers(1, 65))
        change = draw.integers(0, 8)
        if change == 0:
            found[at] ^= 1 << int(draw.integers(0, 8))
        elif change == 1:
            found[at] = int(draw.integers(0, 256))
        elif change == 2:
            found[at : at + 8] = NUMBERS[draw.integers(0, len(NUMBERS))].to_bytes(8, "little")
        elif change == 3:
            found[at : at + 4] = (NUMBERS[draw.integers(0, len(NUMBERS))] % 2**32).to_bytes(
                4, "little"
            )
        elif change == 4:
            del found[at : at + size]
        elif change == 5:
            found[at:at] = found[other : other + size]
        elif change == 6:
            found[at : at + size] = found[other : other + size]
        else:
            del found[at:]
    return bytes(found)


# Mutations of JSON.


def places(value, path=()):
    """Every path into a JSON value; of a long list or object the first and last few."""
    yield path
    items = list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in items[:24] + items[-4:] if len(items) > 28 else items:
        yield from places(item, (*path, name))


def mutate_json(draw: np.random.Generator, text: str) -> str:
    """One to three values replaced, removed, renamed or swapped; now and then the text itself is
    damaged.
    """
    value = json.loads(text)
    for _ in range(draw.integers(1, 4)):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        *above, name = paths[draw.integers(0, len(paths))]
        holder = value
        for step in above:
            holder = holder[step]
        change = draw.integers(0, 6)
        if change == 0 or isinstance(holder, list):
            holder[name] = deepcopy(VALUES[draw.integers(0, len(VALUES))])
        elif change == 1:
            del holder[name]
        elif change == 2:
            holder[str(VALUES[draw.integers(0, len(VALUES))])] = holder.pop(name)
        elif change == 3 and isinstance(holder[name], int):
            holder[name] += int(draw.integers(-2, 3))
        elif change == 4:
            other = list(holder)[draw.integers(0, len(holder))]
            holder[name], holder[other] = holder[other], holder[name]
        else:
            holder[name] = deepcopy(VALUES[draw.integers(0, len(VALUES))])
    text = json.dumps(value)
    return (
        mutate_bytes(draw, text.encode(), len(text)).decode("utf-8", "replace")
        if draw.random() < 0.1
        else text
    )


# The kinds: how mutant `draw` of what is in `folder` is made, and what is then loaded.


def mutant_gguf(draw: np.random.Generator, folder: Path) -> Path:
    seeds = sorted(folder.glob("seed*.gguf"))
    data = seeds[draw.integers(0, len(seeds))].read_bytes()
    # Half of the changes among the sizes that come last in the header, half anywhere: the tokens
    # take most of it.
    cut = len(data) if draw.random() < 0.5 else 4000
    (folder / "mutant.gguf").write_bytes(mutate_bytes(draw, data, cut))
    return folder / "mutant.gguf"


def mutant_packaged(draw: np.random.Generator, folder: Path) -> Path:
    """The metadata of the packaged model as it is, 1.8 MB of it, before no tensors: it must be
    refused, or found to lack them.
    """
    data = (folder / "packaged.head").read_bytes()
    (folder / "mutant.gguf").write_bytes(
        mutate_bytes(draw, data, 2000 if draw.random() < 0.5 else len(data))
    )
    return folder / "mutant.gguf"


def mutant_safetensors(draw: np.random.Generator, folder: Path) -> Path:
    data = (folder / "seed.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        header = mutate_json(draw, data[8 : 8 + size].decode()).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = mutate_bytes(draw, data, 8 + size if draw.random() < 0.5 else len(data))
    (folder / "model" / "model.safetensors").write_bytes(data)
    return folder / "model"


def mutant_settings(draw: np.random.Generator, folder: Path) -> Path:
    """One of the JSON files of a sharded model, the others whole."""
    names = sorted(path.name for path in folder.glob("*.json.seed"))
    for name in names:  # heal what the mutant before had
        sound, there = (folder / name).read_bytes(), folder / "sharded" / name.removesuffix(".seed")
        if there.read_bytes() != sound:
            there.write_bytes(sound)
    name = names[draw.integers(0, len(names))]
    (folder / "sharded" / name.removesuffix(".seed")).write_text(
        mutate_json(draw, (folder / name).read_text())
    )
    return folder / "sharded"


def mutant_pieces(draw: np.random.Generator, folder: Path) -> Path:
    """tokenizer.model beside a model without tokenizer.json."""
    data = model()
    cut = len(data) if draw.random() < 0.5 else 200
    (folder / "bare" / "tokenizer.model").write_bytes(mutate_bytes(draw, data, cut))
    return folder / "bare"


def mutant_parts(draw: np.random.Generator, folder: Path) -> Path:
    """One of two parts of a GGUF model, the other whole."""
    first, second = (f"part-0000{number}-of-00002.gguf" for number in (1, 2))
    changed = int(draw.integers(0, 2))
    for number, name in enumerate((first, second)):
        data = (folder / f"{name}.seed").read_bytes()
        (folder / name).write_bytes(mutate_bytes(draw, data, 4000) if number == changed else data)
    return folder / first


MAKERS = {
    "gguf": mutant_gguf,
    "packaged": mutant_packaged,
    "safetensors": mutant_safetensors,
    "settings": mutant_settings,
    "parts": mutant_parts,
    "pieces": mutant_pieces,
}


def sow(folder: Path) -> None:
    """The sound files that mutants are made of."""
    for number, kind in enumerate(("F32", "Q4_1", "Q8_0", "BF16")):
        write_gguf(folder / f"seed{number}.gguf", kind=kind)
    source = locate("smollm2-135m")
    with source.open("rb") as file:
        head = file.read(2**21)
    # the first tensor: all before it is metadata
    first = head.index(b"\x11\x00\x00\x00\x00\x00\x00\x00token_embd.weight")
    (folder / "packaged.head").write_bytes(head[:8] + bytes(8) + head[16:first] + bytes(64))
    assert len(read_header((folder / "packaged.head").read_bytes(), "packaged.head").metadata) == 33
    save(folder / "bare", CONFIG, params())
    told = {"chat_template": "{{ messages[0].content }}"}
    (folder / "bare" / "tokenizer_config.json").write_text(json.dumps(told))
    for number, name in enumerate(("part-00001-of-00002.gguf", "part-00002-of-00002.gguf")):
        write_gguf(folder / f"{name}.seed", part=(number, 2))
    save(folder / "model", CONFIG, params(), tokenizer())
    (folder / "seed.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())
    save(folder / "sharded", CONFIG, params(), tokenizer(), shard_size=100_000)
    for path in (folder / "sharded").glob("*.json"):
        (folder / f"{path.name}.seed").write_bytes(path.read_bytes())


class TooLongError(BaseException):
    """Not an Exception: no handler in the library may take it for a fault of the file."""


def out_of_time(*_) -> None:
    raise TooLongError


def try_out(path: Path) -> str:
    """Load a mutant and use what was loaded: `loaded` or `refused`, or whatever it should not have
    raised.
    """
    try:
        loaded = load(path)
        if loaded.tokenizer is not None:
            loaded.tokenizer.decode(loaded.tokenizer.encode("hello <|end|> 12 ☃"))
            loaded.tokenizer.chat([{"role": "user", "content": "hello"}])
    except CheckpointError:
        return "refused"
    except FileNotFoundError:
        if path.suffix == ".gguf":
            raise
        return "refused"
    return "loaded"


def main(kind: str, first: int, count: int) -> None:
    os.environ["RUST_BACKTRACE"] = "0"
    warnings.simplefilter("ignore")  # that a tokenizer is of another kind
    signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sow(folder)
        load(folder / "seed0.gguf"), load(folder / "sharded")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # what is reserved is more than what is used
        resource.setrlimit(resource.RLIMIT_DATA, (2**10 * before + 2 * MEMORY, -1))
        outcomes = {"loaded": 0, "refused": 0}
        for number in range(first, first + count):
            path = MAKERS[kind](np.random.default_rng((list(MAKERS).index(kind), number)), folder)
            signal.alarm(SECONDS)
            try:
                outcomes[try_out(path)] += 1
            except BaseException as error:
                print(f"mutant {kind} {number}: {type(error).__name__}: {error}", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
        peak = 2**10 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({**outcomes, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
