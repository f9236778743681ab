"""`funcattn train`: from a text to a model that generates, stopped and resumed, and what is said of
a mistake.
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from places import ROOT

import funcattn as fa
from funcattn import cli

TEXT = "the sea is wide and the sky is high.\n" * 30
SMALL = [
    "--layers",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--context",
    "16",
    "--rows",
    "4",
    "--steps",
    "40",
    "--rate",
    "0.02",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Call main in this process, with a folder of its own for what comes out."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        place = () if "--out" in arguments else ("--out", str(tmp_path / "out"))
        try:
            code = cli.main(["train", *arguments, *place])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def weights(folder):
    return fa.tree.leaves(fa.load(Path(folder) / "model").params)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_a_trained_model_writes_and_is_loaded_again(run, text, tmp_path):
    code, out, err = run(text, *SMALL, "--sample", "40")
    lines = err.splitlines()
    assert code == 0
    assert lines[0].endswith("weights, 16 kinds of token")  # 15 characters, and one for all others
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"step {n}/40" for n in range(4, 41, 4)]
    losses = [float(line.split("training ")[1].split(",")[0]) for line in lines[1:-1]]
    assert losses[-1] < 0.6 * losses[0]
    # the first character of the text, 40 of the model, and the end of the line
    assert len(out) == 42
    assert set(out) <= set(TEXT)
    config, _, tokenizer = fa.load(tmp_path / "out" / "model")
    assert (config.vocabulary, config.layers, config.context) == (16, 1, 16)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (
        cli.main(
            ["generate", "--model", str(tmp_path / "out" / "model"), "--steps", "3", "the sea"]
        )
        == 0
    )


def test_stdin_is_a_text_and_the_seed_decides(run, text, tmp_path):
    places = [str(tmp_path / name) for name in "abc"]
    run(text, *SMALL, "--sample", "0", "--out", places[0])
    assert run("-", *SMALL, "--sample", "0", "--out", places[1], stdin=TEXT)[:2] == (0, "")
    run(text, *SMALL, "--sample", "0", "--out", places[2], "--seed", "1")
    assert same(places[0], places[1])
    assert not same(places[0], places[2])


def test_muon_trains_too(run, text):
    code, _, err = run(text, *SMALL, "--optimizer", "muon", "--sample", "0")
    losses = [
        float(line.split("training ")[1].split(",")[0])
        for line in err.splitlines()
        if "training " in line
    ]
    assert code == 0
    assert losses[-1] < 0.6 * losses[0]


def test_a_run_that_was_stopped_is_resumed_bit_for_bit(run, text, tmp_path):
    run(text, *SMALL, "--sample", "0", "--out", str(tmp_path / "whole"))
    out = tmp_path / "stopped"
    arguments = [text, *SMALL, "--sample", "0", "--out", str(out)]
    command = [sys.executable, "-m", "funcattn", "train", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stderr:
            if line.startswith("step 8/"):
                process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "model").exists()
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "Add --resume to go on with it" in err
    assert run(*arguments, "--resume")[0] == 0
    assert same(out, tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(text, tmp_path):
    out = str(tmp_path / "out")
    # a background job inherits deafness to it
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = (
        f"{listen}; import runpy; runpy.run_module('funcattn', run_name='__main__', alter_sys=True)"
    )
    command = [
        sys.executable,
        "-c",
        start,
        "train",
        text,
        *SMALL,
        "--steps",
        "100000",
        "--report-every",
        "4",
        "--out",
        out,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stderr:
            if line.startswith("step 8/"):
                break
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "is kept; add --resume to go on from it." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "written", "told"),
    [
        ((), None, "No such file or directory"),
        ((), b"", "is empty. Give a text to learn from."),
        ((), b" \n", "is empty. Give a text to learn from."),
        (
            (),
            b"short",
            "the text has 5 tokens, and a row is 64 + 1. Give a longer text, or a "
            "smaller --context.",
        ),
        ((), b"\xff\xfe", "the text should be UTF-8"),
        (
            ("--width", "20"),
            b"long" * 50,
            "--width should be a multiple of twice --heads, 8, got 20",
        ),
        (("--rate", "0"), b"long" * 50, "--rate: should be above 0"),
        (("--steps", "0"), b"long" * 50, "--steps: should be 1 or more"),
        (("--optimizer", "lion"), b"long" * 50, "invalid choice: 'lion'"),
        (("--tokenizer", "no/such"), b"long" * 50, '"no/such" should be a folder'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, written, told, run, tmp_path):
    path = tmp_path / "text.txt"
    if written is not None:
        path.write_bytes(written)
    code, out, err = run(str(path), *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line(run, text, monkeypatch):
    decoder = fa.decoder

    def broken(config, kernel=None):
        model = decoder(config, kernel)
        return model._replace(logits=lambda params, x: model.logits(params, x) * float("nan"))

    monkeypatch.setattr(fa, "decoder", broken)
    code, out, err = run(text, *SMALL)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        "funcattn: fit: the loss of step 1 should be finite, got nan. Lower the learning rate"
    )
