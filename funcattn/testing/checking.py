"""Every law of a kernel, sampler, cache, transform or acceptance rule, with the smallest failure.

    check(my_attention)                          laws and nestings of transforms, as a table
    check("kernels.py:attend", signature="sdpa")
    check(fa.sampling.top_p(0.9))

A law is tried on inputs that hypothesis draws, the same each time. It is

    passed        for all inputs
    broken        for some: the smallest is told as code to paste
    raises        where the subject raised for some inputs, and no number was wrong for the others
    not offered   where the subject cannot express what the law asks: a mask, the log-sum-exp
    out of time   before any input was tried
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import tree
from ..core import errors
from . import agreement, laws, nesting, snippets, strategies, subjects, transforms
from .accepted import PROPERTIES, accepted
from .findings import Finding, Findings
from .signatures import SIGNATURES, NotOffered
from .snippets import Named

LAWS = {
    "kernel": laws.kernel,
    "sampler": laws.sampler,
    "cache": laws.cache,
    "transform": laws.transform,
    "acceptance": laws.acceptance,
}
CHOICES = (*LAWS, "transforms")
LSE = {laws.kernels.merge_of_any_split_is_the_whole}  # of kernels that return it
OF_EMPTY_ROWS = {
    laws.kernels.masked_rows_are_zero_with_zero_gradients,
    laws.kernels.masked_rows_have_zero_tangents,
}
OF_LARGE_LOGITS = {
    laws.kernels.shifting_all_logits_of_a_row_changes_nothing,
    laws.kernels.shifting_all_logits_of_a_row_changes_no_tangents,
}
SLOW = {laws.texts.every_verb_writes_what_a_loop_over_apply_writes: 2}  # examples, of seconds each


class OutOfTime(BaseException):
    """Ends a search; no Exception, which hypothesis would take for a failure."""


class Options(NamedTuple):
    """How `check` is run.

    laws: names of `CHOICES`, empty for those of the subject's kind.
    without: laws, and properties of inputs (`accepted.PROPERTIES`), that are left out.
    signature: of a kernel, a name of `signatures.SIGNATURES`; None is what its parameters say.
    dtype: of a kernel's inputs; None is the first accepted of float64, float32 and bfloat16.
    device: of inputs.
    depth: of nestings of transforms.
    examples: inputs for each law.
    seed: the same seed draws the same inputs.
    seconds: at most, for all laws; what is reached in time is then told.
    """

    laws: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    signature: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")
    depth: int = 2
    examples: int = 25
    seed: int = 0
    seconds: float = 50.0


class Task(NamedTuple):
    """One row of the table: its name, and how it is tried before a time of `time.monotonic`."""

    name: str
    run: Callable[[float], Finding]


class Plan(NamedTuple):
    """What is to be checked, before it is."""

    subject: str
    setting: str
    refused: dict[str, str]
    tasks: list[Task]


def check(subject: Any, name: str | None = None, **options: Any) -> Findings:
    """Try every law on a subject.

    Args:
        subject: a kernel (a function of q, k, v and perhaps a mask, or a fa.kernels.Kernel), a
            fa.sampling.Sampler, a kind of cache, a quantization scheme or transform of trees, a
            fa.speculation.Rule, or the name of one, `module:object` or `file.py:object`.
        name: what it is called in the table and in code to paste; by default as it was given.
        options: fields of `Options`.

    Returns:
        Findings, which print as a table; `.ok` is False where a law is broken.

    Raises:
        ValueError: the subject is not found or of no known kind, an option is unknown, or a kernel
            raises for the simplest inputs.

    Example:
        >>> import funcattn as fa
        >>> check(fa.sampling.top_k(2), laws=("sampler",), examples=3).ok
        True
    """
    planned = plan(subject, name, Options(**options))
    return Findings(
        planned.subject,
        planned.setting,
        planned.refused,
        tuple(finished(planned.tasks, Options(**options).seconds)),
    )


def finished(tasks: Sequence[Task], seconds: float) -> Iterator[Finding]:
    """The findings of tasks, each within its part of the time that is left."""
    end = time.monotonic() + seconds
    for n, task in enumerate(tasks):
        now = time.monotonic()
        # most laws take less than their part; a broken one takes more, to find a smaller input
        part = max(1 / (len(tasks) - n), 1 / 6)
        yield task.run(now + part * max(end - now, 0))


def plan(subject: Any, name: str | None, options: Options) -> Plan:
    """The tasks of `check`, with arguments as there."""
    spec = subject if isinstance(subject, str) else name
    subject = subjects.locate(subject) if isinstance(subject, str) else subject
    called = spec or getattr(subject, "__name__", repr(subject))
    kind = subjects.kind_of(subject)
    chosen = _chosen(options, kind, called)
    tried = {law for part in chosen if part in LAWS for law in LAWS[part]}
    _known(options.without, {law.__name__ for law in tried} | {*PROPERTIES})
    kinds = {"kernel" if part == "transforms" else part for part in chosen}
    if len(kinds) > 1:
        remedy = "Choose laws of one kind: kernel and transforms go together."
        errors.fail("check", "laws", "of one kind of object", ", ".join(chosen), remedy)
    named = Named(called, spec if spec and ":" in spec else None, options.signature, False)
    if "kernel" in kinds:
        return _kernel_plan(subject, named, chosen, options)
    (kind,) = kinds
    for option, value in (("signature", options.signature), ("dtype", options.dtype)):
        if value is not None and (option, kind) != ("dtype", "sampler"):
            remedy = "Leave it out."
            errors.fail("check", option, f"of a kernel, for this is a {kind}", value, remedy)
    f = subjects.as_function(kind, subject)
    named = named._replace(wrapped=f is not subject)
    tuples = strategies.st.tuples
    drawn = {
        "sampler": lambda: tuples(
            strategies.logits(dtype=options.dtype or torch.float32), strategies.keys()
        ),
        "cache": lambda: tuples(strategies.st.integers(1, 6), strategies.keys()),
        "transform": lambda: tuples(
            strategies.decoders() if hasattr(subject, "encode") else strategies.trees()
        ),
        "acceptance": lambda: tuples(strategies.tables(), strategies.keys()).map(
            lambda x: (*x[0], x[1])
        ),
    }[kind]()
    drawn = drawn if options.device.type == "cpu" else drawn.map(tree.to(options.device))
    setting = f"{kind}, on {options.device}"
    return Plan(called, setting, {}, _law_tasks(kind, f, drawn, named, options, {}))


def _kernel_plan(subject: Any, named: Named, chosen: Sequence[str], options: Options) -> Plan:
    f = subjects.as_function("kernel", subject)
    style = options.signature or subjects.signature_of(f)
    if style not in SIGNATURES:
        near = subjects.suggestion(style, SIGNATURES)
        known = f"one of {', '.join(SIGNATURES)}"
        errors.fail("check", "signature", known, repr(style), near or "See testing.signatures.")
    left_out = [name for name in options.without if name in PROPERTIES]
    look = lambda style: accepted(
        SIGNATURES[style].adapt(f), SIGNATURES[style], options.dtype, options.device, left_out
    )
    given = look(style)
    if style == "mask" and options.signature is None and "masks" in given.refused:
        style, given = "dense", look("dense")  # which takes booleans alone
    adapted = SIGNATURES[style].adapt(f)

    def without_masks(q: Any, k: Any, v: Any, mask: Any) -> Any:
        if mask is not None:
            raise NotOffered("masks")
        return adapted(q, k, v, None)

    kernel = without_masks if "masks" in given.refused else adapted
    lacks = {
        **dict.fromkeys(LSE, "" if given.returns_lse else "it returns no log-sum-exp"),
        **dict.fromkeys(OF_EMPTY_ROWS, given.refused.get("empty_rows", "")),
        **dict.fromkeys(OF_LARGE_LOGITS, given.refused.get("large_logits", "")),
    }
    named = named._replace(signature=style, wrapped=f is not subject)
    tasks = []
    if "kernel" in chosen:
        tasks += _law_tasks("kernel", kernel, given.problems(), named, options, lacks)
    if "transforms" in chosen:
        nested = nesting.Nestings(kernel, given, named)
        tasks += [
            Task(name, functools.partial(nested.examine, name))
            for name in transforms.names_of(options.depth)
        ]
    kind = f"kernel({style}), {str(given.dtype).removeprefix('torch.')} on {options.device}"
    return Plan(named.name, kind, given.refused, tasks)


def _law_tasks(
    kind: str,
    f: Any,
    drawn: "strategies.Strategy[Any]",
    named: Named,
    options: Options,
    lacks: dict[Any, str],
) -> list[Task]:
    def task(law: Callable[..., None]) -> Task:
        def run(deadline: float) -> Finding:
            if lacks.get(law):
                return Finding(law.__name__, "not offered", None, 0, lacks[law], "")
            examples = min(options.examples, SLOW.get(law, options.examples))
            code = lambda values, told: snippets.of_law(kind, law, named, values, told)
            return examine(law, f, drawn, code, examples, options.seed, deadline)

        return Task(law.__name__, run)

    return [task(law) for law in LAWS[kind] if law.__name__ not in options.without]


def examine(
    law: Callable[..., None],
    f: Any,
    drawn: "strategies.Strategy[Any]",
    code: Callable[[Any, str], str],
    examples: int,
    seed: int,
    deadline: float,
) -> Finding:
    """One law on inputs that hypothesis draws, shrunk where it is broken."""
    tried, errors_seen = 0, list[float]()
    refusals: list[tuple[int, str]] = []
    failures: list[tuple[int, Any, str, float]] = []  # size, values, message, error
    notes: list[str] = []

    def is_broken(values: Any) -> bool:
        nonlocal tried
        if time.monotonic() > deadline:
            raise OutOfTime
        with agreement.measured() as found:
            try:
                law(f, *tree.map(_copied, tuple(values)))  # which f may write to
            except NotOffered as error:
                notes.append(str(error))
                return False
            except Exception as error:  # whatever a subject raises
                if _is_of(law, error):
                    failures.append(
                        (snippets.size(values), values, str(error), max(found, default=0))
                    )
                    return True
                refusals.append((snippets.size(values), subjects.in_a_line(error)))
            if not found and law in laws.kernel and not refusals:
                return False  # such as one key where a law splits them: nothing was compared
            tried += 1
            errors_seen.append(max(found, default=-1.0))
        return False

    with subjects.quiet(), contextlib.suppress(OutOfTime):
        smallest = strategies.smallest(drawn, is_broken, examples=examples, seed=seed)
        if smallest is not None:
            for values in (smallest, *(_rounded(smallest, digits) for digits in (1, 0))):
                is_broken(values)  # the last that is broken is told
    name = law.__name__
    worst = max(errors_seen, default=-1.0)
    if failures:
        # the last is the smallest, where there was time to shrink
        _, values, told, error = min(reversed(failures), key=lambda failure: failure[0])
        greatest = max(worst, error)
        worst_seen = greatest if greatest >= 0 else None
        return Finding(name, "broken", worst_seen, tried, told, code(values, told))
    if refusals:
        told = min(refusals)[1]
        some = "" if len(refusals) == tried else f" (for {len(refusals)} of {tried} inputs)"
        return Finding(name, "raises", None, tried, told + some, "")
    if not tried:
        status = "not offered" if notes else "out of time"
        return Finding(name, status, None, 0, notes[0] if notes else "", "")
    # a law that compares no numbers has no error
    return Finding(name, "passed", worst if worst >= 0 else None, tried, "", "")


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _rounded(values: Any, digits: int) -> Any:
    """Values of fewer digits, which are easier to read."""
    leaves = lambda x: x.mul(10**digits).round().div(10**digits) if x.is_floating_point() else x
    return tree.map(lambda x: leaves(x) if isinstance(x, torch.Tensor) else x, values)


def _is_of(law: Callable[..., None], error: Exception) -> bool:
    """Whether a law says that it is broken, and the subject did not raise by itself."""
    return isinstance(error, AssertionError) and str(error).startswith(law.__name__)


def _chosen(options: Options, kind: str | None, called: str) -> tuple[str, ...]:
    _known(options.laws, CHOICES)
    if options.laws:
        return tuple(dict.fromkeys(options.laws))
    if kind is None:
        wanted = "a kernel of (q, k, v), Sampler, kind of cache, scheme, transform or Rule"
        remedy = f"Choose laws: {', '.join(CHOICES)}."
        errors.fail("check", "the object", wanted, called, remedy)
    return ("kernel", "transforms") if kind == "kernel" else (kind,)


def _known(given: Sequence[str], known: Any) -> None:
    for word in given:
        if word not in known:
            near = subjects.suggestion(word, known)
            errors.fail(
                "check",
                "laws and what is left out",
                f"among {', '.join(sorted(known))}",
                repr(word),
                near.strip() or "See docs/testing.md.",
            )
