"""Lines about what takes long: after two seconds, where somebody looks, and gone afterwards."""

import io
import sys
import types

import pytest
import torch

import funcattn as fa
from funcattn import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=screen, modules={}))
    return screen


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_within_two_seconds(terminal, clock):
    for _ in progress.track(range(19), "reading"):
        clock[0] += 0.1
    assert terminal.getvalue() == ""


def test_a_line_counts_and_is_gone_at_the_end(terminal, clock):
    for _ in progress.track(range(8), "reading"):
        clock[0] += 1.0
    lines = [line.strip() for line in terminal.getvalue().split("\r")]
    assert "reading 2/8 ######.................. 2 s" in lines
    assert "reading 7/8 #####################... 7 s" in lines
    assert lines[-1] == lines[-2] == ""


def test_what_has_no_length_is_counted(terminal, clock):
    for _ in progress.track((x for x in range(4)), "reading"):
        clock[0] += 1.0
    assert "reading 3, 3 s" in terminal.getvalue()


def test_a_loop_that_is_left_leaves_no_line(terminal, clock):
    for item in progress.track(range(8), "reading"):
        clock[0] += 1.0
        if item == 4:
            break
    assert terminal.getvalue().endswith("\r")


def test_nothing_is_said_where_nobody_looks(capsys, clock, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for _ in progress.track(range(8), "reading"):
        clock[0] += 1.0
    assert capsys.readouterr().err == ""


def test_the_environment_can_ask_for_silence(terminal, clock, monkeypatch):
    monkeypatch.setenv("FUNCATTN_PROGRESS", "0")
    for _ in progress.track(range(8), "reading"):
        clock[0] += 1.0
    assert terminal.getvalue() == ""


def test_a_wait_is_told_and_ends_with_what_is_raised(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    seen = progress.threading.Event()
    write = progress._write
    monkeypatch.setattr(progress, "_write", lambda line: (write(line), seen.set()))

    @progress.waiting("compiling")
    def fail():
        assert seen.wait(60)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "compiling, 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_of_two_waits_only_the_inner_is_told(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    seen = progress.threading.Event()
    write = progress._write
    monkeypatch.setattr(progress, "_write", lambda line: (write(line), seen.set()))
    with progress.waiting("reading"), progress.waiting("compiling"):
        assert seen.wait(60)
    assert "compiling, 0 s" in terminal.getvalue()
    assert "reading" not in terminal.getvalue()
    assert progress._waits == []


def test_who_writes_a_line_of_his_own_has_silence(terminal, clock, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.silence():
        for _ in progress.track(range(8), "reading"):
            clock[0] += 1.0
        with progress.waiting("compiling"):
            pass
    assert terminal.getvalue() == ""
    assert progress.watched()


def test_generation_is_the_same_while_it_is_watched(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    model = fa.decoder(fa.Config())
    params, prompt = model.init(fa.key(0)), torch.tensor([1, 2, 3])
    watched = fa.generate(fa.key(1), model, params, prompt, steps=4)[0]
    assert "writing 3/4" in terminal.getvalue()
    monkeypatch.setenv("FUNCATTN_PROGRESS", "0")
    assert torch.equal(watched, fa.generate(fa.key(1), model, params, prompt, steps=4)[0])


@pytest.mark.parametrize("what", ["loading", "quantizing"])
def test_what_takes_long_is_told_and_what_does_not_is_not(terminal, monkeypatch, tmp_path, what):
    config = fa.Config()
    params = fa.decoder(config).init(fa.key(0))
    fa.save(tmp_path / "model", config, params)
    run = (
        (lambda: fa.load(tmp_path / "model"))
        if what == "loading"
        else (lambda: fa.quantize(Slow())(params))
    )
    monkeypatch.setattr(progress, "PATIENCE", 3600.0)
    run()
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    slow = fa.checkpoints.loading._read
    monkeypatch.setattr(
        fa.checkpoints.loading, "_read", lambda *rest: (seen(terminal, what), slow(*rest))[1]
    )
    monkeypatch.setattr(
        Slow, "encode", lambda self, weight: (seen(terminal, what), fa.int8.encode(weight))[1]
    )
    run()
    assert f"{what}" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


class Slow:
    encode = fa.int8.encode


def seen(terminal, what):
    """Wait for the line."""
    end = progress.time.monotonic() + 60
    while what not in terminal.getvalue() and progress.time.monotonic() < end:
        progress.time.sleep(0.001)
