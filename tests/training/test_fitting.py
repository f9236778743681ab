"""The loop: batches by key, snapshots, and runs that are killed, cut, corrupted and out of room."""

import errno
import math
import signal
import subprocess
import sys
from pathlib import Path

import fitted
import pytest
import torch
from fitted import CONFIG, STEPS, TEXT, begin
from places import ROOT, TESTS

import funcattn as fa
from funcattn.core import atomic
from funcattn.families import CheckpointError
from funcattn.training import draw, fit, snapshots


@pytest.fixture(scope="module")
def unbroken():
    return begin()


def identical(a, b):
    assert fa.tree.paths(a) == fa.tree.paths(b)
    return all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in zip(fa.tree.leaves(a), fa.tree.leaves(b), strict=True)
    )


def same_run(a, b):
    return identical(a.params, b.params) and identical(a.state, b.state) and a.history == b.history


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_batch_depends_on_its_number_alone():
    rows = [draw(fa.key(1), TEXT, i, rows=3, context=8) for i in range(5)]
    assert torch.equal(rows[3], draw(fa.key(1), TEXT, torch.tensor(3), rows=3, context=8))
    assert len({tuple(row) for batch in rows for row in batch.tolist()}) == 15
    whole = TEXT.unfold(0, 9, 1)
    assert all((whole == row).all(-1).any() for batch in rows for row in batch)


def test_every_place_of_a_text_is_drawn():
    text = torch.arange(7)  # rows of three begin at 0..4
    firsts = torch.stack([draw(fa.key(0), text, i, rows=20, context=2) for i in range(30)])[
        ..., 0
    ].flatten()
    counts = firsts.bincount(minlength=5)
    assert len(counts) == 5
    # chi-square of 600 draws with 4 degrees of freedom: above 23.5 once in ten thousand keys
    assert ((counts - 120.0).square() / 120).sum() < 23.5


def test_training_lowers_the_loss(unbroken):
    text = torch.tensor([1, 2, 3, 4, 5] * 30)
    model = fa.decoder(CONFIG)
    optimizer = fa.training.adamw(1e-2)
    run = fit(
        fa.key(0),
        model,
        model.init(fa.key(0)),
        text,
        optimizer=optimizer,
        steps=60,
        context=8,
        report_every=20,
        progress=False,
    )
    assert [report.step for report in run.history] == [20, 40, 60]
    assert run.history[0].training > run.history[-1].training
    assert run.history[-1].training < 0.5  # of log 13 = 2.6 at the beginning


def test_the_history_tells_the_mean_losses(unbroken):
    seen = []

    def loss(model, params, batch):
        value = fa.loss(model, params, batch)
        seen.append((torch.is_grad_enabled(), float(value.detach())))
        return value

    assert begin(loss=loss).history == unbroken.history
    training = [value for step, value in seen if step]
    validation = [value for step, value in seen if not step]
    assert [report.step for report in unbroken.history] == [4, 8, 11]
    assert unbroken.history[1].training == math.fsum(training[4:8]) / 4
    assert unbroken.history[2].validation == math.fsum(validation[4:6]) / 2


def test_what_fit_is_given_stays(unbroken):
    model = fa.decoder(CONFIG)
    params, text = model.init(fa.key(0)), TEXT.clone()
    before = fa.tree.map(torch.clone, params)
    fit(
        fa.key(3),
        model,
        params,
        text,
        optimizer=fa.training.adamw(1e-2),
        steps=2,
        rows=2,
        context=8,
        progress=False,
    )
    assert identical(params, before)
    assert torch.equal(text, TEXT)


# Snapshots and resumption.


def test_snapshots_change_nothing(unbroken, tmp_path):
    assert same_run(begin(tmp_path), unbroken)
    assert snapshots.steps_in(tmp_path) == [9, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000011"]
    assert same_run(begin(tmp_path, resume=True), unbroken)


@pytest.mark.cpu("a run in a process of its own, resumed bit for bit")
@pytest.mark.parametrize(
    "moment",
    ["step 1", "step 4", "step 11", "rename 2"]
    + [
        pytest.param(moment, marks=pytest.mark.slow)
        for moment in ("step 3", "step 8", "rename 1", "rename 4")
    ],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(moment, unbroken, tmp_path):
    command = [sys.executable, fitted.__file__, str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    number = int(moment.split()[1])
    taken = (
        [s for s in (3, 6, 9, 11) if s < number]
        if moment.startswith("step")
        else [3, 6, 9, 11][: number - 1]
    )
    assert snapshots.steps_in(tmp_path) == taken[-2:]
    assert same_run(begin(tmp_path, resume=True), unbroken)
    # no draft is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000011"]


def test_a_run_that_stopped_after_every_step_ends_as_if_it_had_not(unbroken, tmp_path):
    class Stop(Exception):
        pass

    for steps in range(1, STEPS + 1):
        calls = []

        def loss(model, params, batch, calls=calls):
            calls.extend([1] * torch.is_grad_enabled())
            if len(calls) > 1:
                raise Stop
            return fa.loss(model, params, batch)

        try:
            last = begin(tmp_path, resume=True, save_every=1, loss=loss)
        except Stop:
            assert snapshots.steps_in(tmp_path)[-1] == steps
    assert same_run(last, unbroken)


def test_layout_in_memory_comes_back(tmp_path):
    values = {
        "columns": torch.arange(6.0).view(2, 3).mT,
        "deep": torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        "rows": torch.ones(2, 2),
    }
    snapshots.write(tmp_path, 1, values, {})
    found, _ = snapshots.read(tmp_path, 1, values)
    assert identical(found, values)
    assert [x.stride() for x in found.values()] == [x.stride() for x in values.values()]


@pytest.mark.parametrize("file", ["tensors.safetensors", "run.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "gone"])
def test_a_damaged_snapshot_is_a_clear_error_and_the_one_before_serves(
    harm, file, unbroken, tmp_path
):
    begin(tmp_path)
    path = tmp_path / "step-00000011" / file
    whole = path.read_bytes()
    places = (
        [0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2]
        if harm == "flip"
        else [len(whole) // 2]
    )
    for place in places:
        if harm == "gone":
            path.unlink()
        else:
            flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            path.write_bytes({"cut": whole[:place], "empty": b"", "flip": flipped}[harm])
        with pytest.raises(CheckpointError) as error:
            begin(tmp_path, resume=True)
        assert str(error.value).startswith(f"fit: {path.parent} should be a whole snapshot, got ")
        assert str(error.value).endswith(f"Remove {path.parent} to go on from step 9.")
    for left in path.parent.iterdir():
        left.unlink()
    path.parent.rmdir()
    assert same_run(begin(tmp_path, resume=True), unbroken)


FAILING = ["save_file", "_flush", "_digest", "write_text", "rename"]


@pytest.mark.parametrize("operation", FAILING)
def test_a_full_disk_is_a_clear_error_and_the_snapshots_before_survive(
    operation, unbroken, tmp_path, monkeypatch
):
    begin(tmp_path, steps=6)
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        module = {"write_text": Path, "rename": Path, "_flush": atomic}.get(operation, snapshots)
        patch.setattr(module, operation, full)
        with pytest.raises(
            CheckpointError,
            match=r"fit: .*step-00000009 should be a place that can be written, got .*No space left",
        ):
            begin(tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_disk_that_fills_within_a_file_leaves_the_snapshots_before(tmp_path):
    """A real limit on the size of a file, which the system holds, met while the tensors are
    written.
    """
    script = (
        "import resource, signal, sys, fitted; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "fitted.begin(sys.argv[1], steps=6); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, "
        "4000));"
        "fitted.begin(sys.argv[1], resume=True)"
    )
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); {script}",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "CheckpointError: fit: " in done.stderr, done.stderr
    assert snapshots.steps_in(tmp_path) == [3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_in_no_snapshot(tmp_path):
    calls = []

    def loss(model, params, batch):
        calls.extend([1] * torch.is_grad_enabled())
        return fa.loss(model, params, batch) * (float("nan") if len(calls) >= 8 else 1)

    with pytest.raises(
        ValueError,
        match=r"fit: the loss of step 8 should be finite, got nan\. Lower the learning rate",
    ):
        begin(tmp_path, loss=loss)
    assert snapshots.steps_in(tmp_path) == [3, 6]
    values, _ = snapshots.read(
        tmp_path, 6, {"params": begin(steps=0).params, "state": begin(steps=0).state}
    )
    assert all(leaf.isfinite().all() for leaf in fa.tree.leaves(values))


@pytest.mark.real("Inductor compiles for it")
@pytest.mark.slow
def test_the_compiled_run_is_resumed_bit_for_bit(tmp_path):
    whole = begin(compile=True)
    begin(tmp_path, compile=True, steps=6)
    assert snapshots.steps_in(tmp_path) == [3, 6]
    # It made a report at its end, which the whole run did not: params and state are what counts.
    resumed = begin(tmp_path, compile=True, resume=True)
    assert identical(resumed.params, whole.params)
    assert identical(resumed.state, whole.state)


def test_without_a_terminal_a_line_a_report_goes_to_stderr(capsys):
    begin(progress=True)
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == ""
    assert [line.split(":")[0] for line in lines] == ["step 4/11", "step 8/11", "step 11/11"]
    assert all(
        "training 2." in line and "validation 2." in line and "ms a step" in line for line in lines
    )


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    begin(progress=True)
    assert "11/11" in capsys.readouterr().err


none = torch.zeros(0, dtype=torch.int64)
BAD = [
    (
        {"tokens": none},
        ValueError,
        "fit: tokens should be (N,) with N at least context + 1 = 9, got (0,). Give a longer text",
    ),
    ({"tokens": TEXT[:8]}, ValueError, "with N at least context + 1 = 9, got (8,)"),
    ({"tokens": TEXT.view(2, -1)}, ValueError, "fit: tokens should be (N,)"),
    (
        {"tokens": TEXT.float()},
        TypeError,
        "fit: tokens should be an integer tensor (N,), got torch.float32",
    ),
    ({"tokens": "text"}, TypeError, "fit: tokens should be an integer tensor (N,), got str"),
    ({"validation": TEXT[:5]}, ValueError, "fit: validation should be (N,)"),
    ({"steps": -1}, ValueError, "fit: steps should be 0 or more, got -1"),
    ({"rows": 0}, ValueError, "fit: rows should be 1 or more"),
    ({"context": 0}, ValueError, "fit: context should be 1 or more"),
    ({"report_every": 0}, ValueError, "fit: report_every"),
    ({"keep": 0}, ValueError, "fit: keep"),
    ({"params": ()}, ValueError, "fit: params should be a tree with leaves to train"),
    ({"tokens": TEXT + 13}, ValueError, "decoder: tokens should be ids in 0..12"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(changed, kind, message):
    model = fa.decoder(CONFIG)
    settings = {
        "params": model.init(fa.key(0)),
        "tokens": TEXT,
        "optimizer": fa.training.adamw(0.1),
        "steps": 1,
        "rows": 2,
        "context": 8,
    }
    with pytest.raises(kind) as error:
        fit(fa.key(0), model, **settings | {"progress": False} | changed)
    assert message in str(error.value)


ANOTHER = [
    ({}, ValueError, "fit: folder should be without snapshots, got one of step 11"),
    (
        {"resume": True, "steps": 5},
        ValueError,
        "fit: steps should be at least the 11 of the snapshot, got 5",
    ),
    (
        {"resume": True, "rows": 3},
        ValueError,
        "fit: sizes should be [2, 8, 1, 4, 2] as in the snapshot of step 11, got [3, 8, 1, 4, 2]",
    ),
    (
        {"resume": True, "compute": torch.bfloat16},
        ValueError,
        "fit: compute should be None as in the snapshot",
    ),
]


@pytest.mark.parametrize(
    ("changed", "kind", "message"), ANOTHER, ids=[message for *_, message in ANOTHER]
)
def test_another_run_is_not_resumed(changed, kind, message, tmp_path):
    begin(tmp_path)
    with pytest.raises(kind) as error:
        begin(tmp_path, **changed)
    assert message in str(error.value)


def test_a_snapshot_of_another_model_is_refused(tmp_path):
    begin(tmp_path)
    values = {
        "params": begin(steps=0).params._replace(norm=torch.ones(9)),
        "state": begin(steps=0).state,
    }
    with pytest.raises(
        CheckpointError, match=r"of this model and optimizer, got another params\.norm"
    ):
        snapshots.read(tmp_path, 11, values)
