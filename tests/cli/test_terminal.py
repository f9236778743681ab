"""Text of a file on a terminal: no character of it steers, in errors, in what is inspected, in what
a model writes.
"""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import tokenizers
from safetensors.torch import load_file, save_file
from samples import CONFIG, params, tokenizer, write_gguf
from tokenizers import models

import funcattn as fa
from funcattn.checkpoints import CheckpointError, Tokenizer
from funcattn.cli import main
from funcattn.core.errors import STEERING, fail, printable

pytestmark = pytest.mark.cpu("the command reads --device, and not torch's default")

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\x9d0;x\x9c\u202eowned\u2066\u2028\x08\r"
BYTES = (
    b"\x1b]",
    b"\x1b[2J",
    b"\x07",
    b"\x08",
    *(code.encode() for code in "\x9b\x9d\x9c\u202e\u2066\u2028"),
)


def folder(place, template=None, **settings):
    fa.save(place, CONFIG, params(), Tokenizer(tokenizer().backend, (0,), template))
    if settings:
        (place / "config.json").write_text(
            json.dumps({**json.loads((place / "config.json").read_text()), **settings})
        )
    return place


def tensor_named(place):
    file = folder(place) / "model.safetensors"
    tensors = load_file(file)
    tensors[EVIL] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    return ["inspect", "--model", str(place)]


def shard_named(place):
    (folder(place) / "model.safetensors").unlink()
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": f"{EVIL}.safetensors"}})
    )
    return ["inspect", "--model", str(place)]


def template_that_raises(place):
    return [
        "generate",
        "--chat",
        "--steps",
        "2",
        "--model",
        str(folder(place, "{{ raise_exception('" + EVIL + "') }}")),
        "a",
    ]


def gguf(place, change):
    return ["inspect", "--model", str(write_gguf(place.with_suffix(".gguf"), change=change))]


def adapter_field(place):
    return ["inspect", "--model", str(folder(place, rope_scaling={EVIL: 1, "type": EVIL}))]


def stop_named(place):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, EVIL: 1, "b": 2}, unk_token="a"))
    fa.save(place, CONFIG, params(), Tokenizer(backend, (1,)))
    return ["inspect", "--model", str(place)]


def model_that_writes(place):
    backend = tokenizers.Tokenizer(models.WordLevel({EVIL: 0}, unk_token=EVIL))
    fa.save(place, CONFIG, params(), Tokenizer(backend))
    return ["generate", "--steps", "3", "--greedy", "--model", str(place), "a"]


REFUSED = {
    "the name of a tensor": tensor_named,
    "the name of a shard": shard_named,
    "an error of the chat template": template_that_raises,
    "the name of a gguf field": lambda place: gguf(place, {f"llama.{EVIL}": 1}),
    "the value of a gguf field": lambda place: gguf(place, {"tokenizer.ggml.pre": EVIL}),
    "a name of the config": lambda place: [
        "inspect",
        "--model",
        str(folder(place, model_type=EVIL)),
    ],
    "a nested name of the config": adapter_field,
    "the name of a folder": lambda place: [
        "inspect",
        "--model",
        str(place / "no\x1b[2J\x9bfolder"),
    ],
}
SHOWN = {"a token that ends a text": stop_named, "what a model writes": model_that_writes}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What each command writes to a terminal, all from one process."""
    place = tmp_path_factory.mktemp("files")
    commands = [
        make(place / f"m{number}") for number, make in enumerate({**REFUSED, **SHOWN}.values())
    ]
    ours, theirs = pty.openpty()
    code = (
        "import json, sys; from funcattn.cli import main\nfor one in json.loads(sys.argv[1]): "
        "main(one); print('=====', flush=True)"
    )
    environment = {**os.environ, "TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(commands)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    out, until = b"", time.monotonic() + 120
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                out += os.read(ours, 65536)
            except OSError:
                break
    running.kill()
    running.wait()
    os.close(ours)
    return dict(
        zip({**REFUSED, **SHOWN}, out.replace(b"\r\n", b"\n").split(b"=====\n"), strict=False)
    )


@pytest.mark.parametrize("name", {**REFUSED, **SHOWN})
def test_no_control_character_of_a_file_reaches_the_terminal(written, name):
    out = written[name]
    assert (b"funcattn: " in out) == (name in REFUSED)
    assert b"owned" in out or "folder" in name
    assert not [code for code in BYTES if code in out]


def test_an_error_is_one_line_that_tells_what_it_hides():
    with pytest.raises(CheckpointError) as error:
        fail("load", f"a {EVIL}", "plain", EVIL, "Look at it.", CheckpointError)
    assert "\\x1b]0;owned\\x07" in str(error.value)
    assert not STEERING & set(map(ord, str(error.value)))
    assert "\\u202e" in str(CheckpointError(EVIL))


@pytest.mark.parametrize(
    "arguments",
    [["--steps", EVIL], ["--device", EVIL], [f"--{EVIL}"]],
    ids=["number", "device", "option"],
)
def test_an_argument_that_is_refused_steers_nothing(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["generate", *arguments, "a"])
    told = capsys.readouterr().err
    assert told.endswith("--help.\n")
    assert told[:-1].isprintable()


def test_text_that_steers_nothing_is_shown_as_it_is():
    text = "Zürich ☃ שלום مرحبا 日本 \U0001f469\u200d\U0001f52c a\tb\n\u2026\u202f\xa0\xad"
    assert printable(text) == text


@pytest.mark.parametrize("code", sorted(code for code in STEERING if code < 0xD800))
def test_every_character_that_steers_is_written_out(code):
    assert re.fullmatch(r"a\\(x..|u....|r)b", printable(f"a{chr(code)}b"))
