"""The training loop: random batches, reports, evaluation, snapshots and bitwise resumption.

    batch i = rows of the text at positions drawn from fold_in(key, i)

A batch is a function of the key and its number, so the state of a run is params, the optimizer's
state and a number. A run that was killed and resumed ends with the same bits as an unbroken one.
"""

import contextlib
import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import collectives, randomness, tree
from ..core import errors
from ..core.doors import door
from ..models import Model
from ..records import ABSENT
from ..tree import Tree
from . import losses, snapshots
from .optimizers import Optimizer
from .steps import Loss, step

EVALUATIONS = 2**31  # number of the first evaluation batch; training batches are below


class Report(NamedTuple):
    """A report at one step: the mean training loss since the last one, and the validation loss.

    The latter is None without a validation text.
    """

    step: int
    training: float
    validation: float | None


class Fitted(NamedTuple):
    """The result of `fit`. Not a record: history holds numbers."""

    params: Tree
    state: Tree
    history: tuple[Report, ...]


@door
def draw(key: Tensor, tokens: Tensor, number: int | Tensor, *, rows: int, context: int) -> Tensor:
    """Batch `number` of a text: int (rows, context + 1), each row from a uniformly drawn position.

    Example:
        >>> import funcattn as fa
        >>> draw(fa.key(0), torch.arange(100), 3, rows=2, context=4)
        tensor([[27, 28, 29, 30, 31],
                [36, 37, 38, 39, 40]])

    Law: it depends on nothing but key and number
        (test_fitting.py::test_a_batch_depends_on_its_number_alone).
    """
    _check_text("draw", "tokens", tokens, context)
    start = randomness.randint(
        randomness.fold_in(key, number), (rows,), 0, len(tokens) - context
    ).to(tokens.device)
    return tokens[start.unsqueeze(-1) + torch.arange(context + 1, device=tokens.device)]


@door
def fit(
    key: Tensor,
    model: Model,
    params: Tree,
    tokens: Tensor,
    *,
    optimizer: Optimizer,
    steps: int,
    rows: int = 12,
    context: int = 64,
    frozen: Tree = ABSENT,
    loss: Loss = losses.loss,
    micro_batches: int = 1,
    compute: torch.dtype | None = None,
    specs: Tree = None,
    validation: Tensor | None = None,
    report_every: int = 100,
    evaluations: int = 20,
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = False,
    keep: int = 2,
    compile: bool = False,
    progress: bool = True,
) -> Fitted:
    """Train for a number of steps.

    Args:
        key: int64 (2,), randomness of the batches.
        model: from `fa.decoder`.
        params: initial params, not modified. frozen: leaves that are not trained (see `step`).
        tokens: the text, integers (N,). validation: a text whose loss is reported, or None.
        optimizer: of `funcattn.training`.
        steps: in all, with those of a resumed run.
        rows, context: a batch is (rows, context + 1) tokens.
        loss, micro_batches, compute, specs: see `step`.
        report_every: steps between reports. evaluations: batches of the validation text for each.
        folder: of snapshots, written every save_every steps (at each report where None) and at the
            end; None writes none.
        resume: continue from the newest snapshot in folder, if any. False raises if there is one.
        keep: how many snapshots are kept.
        compile: run the step as one compiled graph. The last bits differ from an eager run's.
        progress: show a bar on stderr; where it is no terminal or notebook, one line a report.

    Returns:
        Fitted(params, state, history).

    Raises:
        ValueError: the text is shorter than a row, or the loss is not finite: the error names the
            step, and no snapshot has those params.
        CheckpointError: a snapshot that is damaged or of another run, or that cannot be written.

    Law: a run killed at any moment and resumed ends with the bits of an unbroken one
        (test_fitting.py::test_a_run_that_was_killed_ends_as_if_it_had_not_been).
    """
    _check_text("fit", "tokens", tokens, context)
    if validation is not None:
        _check_text("fit", "validation", validation, context)
    least = {
        "steps": (steps, 0),
        "rows": (rows, 1),
        "report_every": (report_every, 1),
        "evaluations": (evaluations, 1),
    }
    least |= {"keep": (keep, 1), "save_every": (1 if save_every is None else save_every, 1)}
    for name, (n, low) in least.items():
        if not isinstance(n, int) or n < low:
            errors.fail(
                "fit",
                name,
                f"{low} or more",
                n,
                "It is a number of steps, rows, batches or snapshots.",
            )
    if not tree.leaves(params):
        errors.fail(
            "fit", "params", "a tree with leaves to train", "none", "Leave some out of frozen."
        )
    told = {
        "key": key,
        "tokens": tokens,
        "steps": steps,
        "rows": rows,
        "context": context,
        "micro_batches": micro_batches,
    }
    collectives.agree("fit", told, params)
    one = step(
        model, optimizer, loss=loss, micro_batches=micro_batches, compute=compute, specs=specs
    )
    narrow = tree.cast(compute) if compute is not None else lambda params: params
    look = lambda params, batch, frozen: loss(model, narrow(tree.combine(params, frozen)), batch)
    if compile:
        one, look = torch.compile(one, fullgraph=True), torch.compile(look, fullgraph=True)
    run = {
        "text": _fingerprint(tokens),
        "validation": "" if validation is None else _fingerprint(validation),
        "key": key.tolist(),
        "sizes": [rows, context, micro_batches, report_every, evaluations],
        "compute": str(compute),
    }
    begun = _begin(folder, params, optimizer.init(params), run, resume)
    params, state, first, told, seen = begun
    if first > steps:
        errors.fail(
            "fit", "steps", f"at least the {first} of the snapshot", steps, "Ask for more steps."
        )
    every = report_every if save_every is None else save_every
    with torch.no_grad(), _progress(first, steps, progress) as show:
        waiting: list[Tensor] = []
        for i in range(first, steps):
            batch = draw(key, tokens, i, rows=rows, context=context)
            params, state, metrics = one(params, state, batch, frozen)
            waiting.append(metrics.loss)
            done = i + 1
            reports, saves = (
                done % report_every == 0 or done == steps,
                folder is not None and (done % every == 0 or done == steps),
            )
            # On a GPU reading the loss would synchronize at every step.
            if reports or saves or metrics.loss.device.type == "cpu":
                seen += _finite(waiting, done)
                waiting = []
            if reports:
                validated = None
                if validation is not None:
                    at = lambda n: draw(
                        key, validation, EVALUATIONS + n, rows=rows, context=context
                    )
                    validated = _mean(
                        [float(look(params, at(n), frozen)) for n in range(evaluations)]
                    )
                told.append(Report(done, _mean(seen), validated))
                seen = []
            if saves and folder is not None:
                held = {"told": [list(report) for report in told], "seen": seen}
                snapshots.write(
                    folder, done, {"params": params, "state": state}, {"of": run, **held}, keep=keep
                )
            show(done, told[-1] if reports else None)
    return Fitted(params, state, tuple(told))


def _begin(
    folder: str | os.PathLike[str] | None,
    params: Tree,
    state: Tree,
    run: dict[str, object],
    resume: bool,
) -> tuple[Tree, Tree, int, list[Report], list[float]]:
    """params, state, steps taken, reports made, and the losses since the last report."""
    taken = [] if folder is None else snapshots.steps_in(folder)
    if folder is None or not taken:
        return params, state, 0, [], []
    if not resume:
        remedy = "Pass resume=True to go on from it, or choose another folder."
        errors.fail(
            "fit",
            "folder",
            "without snapshots",
            f"one of step {taken[-1]} in {os.fspath(folder)}",
            remedy,
        )
    values, held = snapshots.read(folder, taken[-1], {"params": params, "state": state})
    told, seen = _reports(held, lambda got: snapshots.damaged(folder, taken[-1], got), run)
    for name, wanted in run.items():
        if held["of"][name] != wanted:
            remedy = "A run goes on with what it began with; choose another folder for another one."
            errors.fail(
                "fit",
                name,
                f"{held['of'][name]} as in the snapshot of step {taken[-1]}",
                wanted,
                remedy,
            )
    return values["params"], values["state"], taken[-1], told, seen


def _reports(
    held: dict[str, Any], damaged: Callable[[str], NoReturn], run: dict[str, object]
) -> tuple[list[Report], list[float]]:
    """The reports and the losses since the last one, read from a snapshot and validated."""
    if (
        held.keys() != {"of", "told", "seen"}
        or not isinstance(held["of"], dict)
        or held["of"].keys() != run.keys()
    ):
        damaged(
            f"a run that is not {', '.join(run)} with its reports: it is of another release or "
            "program"
        )
    told, seen = held["told"], held["seen"]
    if not isinstance(seen, list) or not all(map(_is_loss, seen)):
        damaged("losses that are no numbers")
    if not isinstance(told, list) or not all(
        isinstance(report, list) and len(report) == 3 for report in told
    ):
        damaged("reports that are not a step and two losses")
    if not all(
        errors.is_int(n) and _is_loss(loss) and (other is None or _is_loss(other))
        for n, loss, other in told
    ):
        damaged("reports that are not a step and two losses")
    return [Report(*report) for report in told], seen


def _is_loss(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _finite(waiting: list[Tensor], done: int) -> list[float]:
    """The losses of the last steps as floats; raises where one is NaN or infinite."""
    values = [float(loss) for loss in waiting]
    for back, value in enumerate(reversed(values)):
        if not math.isfinite(value):
            remedy = (
                "Lower the learning rate, warm up longer, or clip gradients; the last snapshot is "
                "from before."
            )
            errors.fail("fit", f"the loss of step {done - back}", "finite", value, remedy)
    return values


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _fingerprint(tokens: Tensor) -> str:
    return hashlib.sha256(
        tokens.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    ).hexdigest()[:16]


def _check_text(function: str, argument: str, tokens: Tensor, context: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in tree.INTEGERS:
        got = getattr(tokens, "dtype", type(tokens).__name__)
        errors.fail(
            function,
            argument,
            "an integer tensor (N,)",
            got,
            "Encode the text: torch.tensor(tokenizer.encode(text)).",
            TypeError,
        )
    if not isinstance(context, int) or context < 1:
        errors.fail(
            function, "context", "1 or more", context, "It is the number of inputs in a row."
        )
    if tokens.dim() != 1 or len(tokens) < context + 1:
        remedy = "Give a longer text, or a smaller context."
        errors.fail(
            function,
            argument,
            f"(N,) with N at least context + 1 = {context + 1}",
            errors.shape(tokens),
            remedy,
        )


@contextlib.contextmanager
def _progress(
    first: int, steps: int, wanted: bool
) -> Iterator[Callable[[int, Report | None], None]]:
    """A progress bar where stderr is a terminal or notebook with tqdm, else one line a report."""
    bar: Any = None
    if wanted and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            # Without ipywidgets tqdm warns in a notebook, and draws a text bar.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            bar = tqdm(initial=first, total=steps, unit="step", file=sys.stderr, dynamic_ncols=True)
    started = time.perf_counter()

    def show(done: int, report: Report | None) -> None:
        if bar is not None:
            bar.update()
        if report is None or not wanted:
            return
        losses = f"training {report.training:.4f}" + (
            "" if report.validation is None else f", validation {report.validation:.4f}"
        )
        if bar is not None:
            bar.set_postfix_str(losses)
            return
        speed = (time.perf_counter() - started) / (done - first)
        print(
            f"step {done}/{steps}: {losses}, {speed * 1e3:.0f} ms a step",
            file=sys.stderr,
            flush=True,
        )

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
