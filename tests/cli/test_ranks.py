"""Several processes as one command: what they write, who speaks, and how a run ends that lost
one.
"""

import os
import socket
import subprocess
import sys

import devices
import processes
import pytest

import funcattn as fa
from funcattn import cli

CONFIG = fa.Config(
    vocabulary=49152,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    feed_forward=16,
    context=256,
)


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    params = fa.tree.map(
        lambda weight: weight * (15 if weight.dim() > 1 else 1), fa.decoder(CONFIG).init(fa.key(0))
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    fa.save(path, CONFIG, params, smollm2.tokenizer)
    return path


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(n, *arguments, dies_at="", strict=True):
    """What each process of a run said, and its exit code; the last one ends where a file is that is
    named.
    """
    given = (free_port(), [*map(str, arguments)], dies_at)
    return processes.run(devices.command, n, *given, meet=False, timeout=120, strict=strict)


def test_torchrun_writes_what_one_process_writes(folder, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = [
        "generate",
        "--model",
        str(folder),
        "--steps",
        "12",
        "--seed",
        "3",
        "Once upon a time",
    ]
    assert cli.main(arguments) == 0
    alone = capsys.readouterr().out
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    settings = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, "-m", "funcattn", *arguments, "--tp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    assert done.stderr.count("prefill:") == 1  # one process speaks


@pytest.mark.parametrize("axis", ["--tp", "--dp"])
def test_training_on_two_processes_is_training_on_one(axis, tmp_path, capsys, monkeypatch):
    """The losses and the text of one process, one voice, a model that others load, and a run that
    can be gone on with.
    """
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 20)
    sizes = [
        "--layers",
        1,
        "--width",
        16,
        "--heads",
        2,
        "--rows",
        4,
        "--context",
        8,
        "--report-every",
        3,
        "--sample",
        5,
    ]
    arguments = ["train", text, *sizes, "--steps", 6]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr()
    losses = lambda err: [
        line.split(": ")[1].rsplit(",", 1)[0]
        for line in err.splitlines()
        if line.startswith("step ")
    ]
    first, second = start(2, *arguments, "--out", tmp_path / "out", axis, 2)
    assert (first[2], second[2]) == (0, 0), (first, second)
    assert second[:2] == ("", "")
    assert losses(first[1]) == losses(alone.err) != []
    assert first[0] == alone.out
    assert (
        fa.load(tmp_path / "out" / "model").config == fa.load(tmp_path / "alone" / "model").config
    )
    again = start(2, *arguments, "--out", tmp_path / "out", axis, 2)
    assert "holds a run of 6 steps" in again[0][1]
    assert [code for *_, code in again] == [2, 2]


def test_a_run_that_lost_a_process_ends_with_an_error(tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 20)
    sizes = [
        "--layers",
        1,
        "--width",
        16,
        "--heads",
        2,
        "--steps",
        10**6,
        "--rows",
        2,
        "--context",
        8,
        "--report-every",
        5,
    ]
    snapshot = tmp_path / "out" / "snapshots" / "1-of-tp2-dp1" / "step-00000005"
    arguments = ["train", text, *sizes, "--tp", 2, "--timeout", 20, "--out", tmp_path / "out"]
    first, second = start(2, *arguments, dies_at=str(snapshot), strict=False)
    assert second == "rank 1 ended without a word"
    assert first[2] == 2
    assert "funcattn: process 0 of 2: another one has ended, or said nothing for 20 s." in first[1]


BAD = {
    "--tp 2 is for 2 processes, got 1. Run torchrun --nproc-per-node 2": (
        {},
        ["generate", "--tp", "2", "hello"],
    ),
    "--tp 1 is for 1 process, got 2. Run it without torchrun": (
        {"WORLD_SIZE": "2", "RANK": "0"},
        ["generate", "hello"],
    ),
    "--tp 2 --dp 2 is for 4 processes, got 1": ({}, ["train", "text", "--tp", "2", "--dp", "2"]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_number_of_processes_is_told(message, monkeypatch, capsys):
    settings, arguments = BAD[message]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
