"""The pytest plugin of funcattn: `pytest --funcattn-check kernels.py:attend`, an item for each law.

Every pytest loads it where funcattn is installed. So it is a module of its own, beside the package
whose import brings torch, and imports that when it is used; what it needs more is the extra
`testing`.
"""

import shlex
import time

import pytest

PART = 5  # a law may take the fifth part of --seconds


def pytest_addoption(parser):
    """The option, which may stand in `addopts` too."""
    parser.getgroup("funcattn").addoption(
        "--funcattn-check",
        metavar="OBJECT",
        action="append",
        default=[],
        help="try the laws of module:object or file.py:object, such as a kernel of attention, an "
        "item for each; options of `funcattn check` may follow in the same argument",
    )


@pytest.hookimpl(tryfirst=True)  # before plugins choose among items, as -k and -m do
def pytest_collection_modifyitems(session, config, items):
    """Add the laws of the objects that are named behind the tests that are collected."""
    for given in config.getoption("--funcattn-check"):
        items.extend(Subject.from_parent(session, name=given, nodeid=given).collect())


@pytest.fixture
def funcattn_check():
    """`funcattn.testing.checking.check`, which fails where a law is broken or none has passed."""

    def check(subject, **options):
        from funcattn.testing.checking import check

        found = check(subject, **options)
        if not found.ok:
            pytest.fail(str(found), pytrace=False)
        return found

    return check


class Subject(pytest.Collector):
    """An object of which there are laws."""

    def collect(self):
        """An item for each law and each nesting of transforms."""
        from funcattn.cli import checking, commands

        try:
            options = commands.parser().parse_args(["check", *shlex.split(self.name)])
            planned = checking.planned(options)
        except (ValueError, SystemExit) as error:
            raise pytest.UsageError(f"--funcattn-check {self.name}: {error}") from None
        return [
            Law.from_parent(self, name=task.name, run=task.run, seconds=options.seconds / PART)
            for task in planned.tasks
        ]


class Law(pytest.Item):
    """One law of one object."""

    def __init__(self, *, run, seconds, **options):
        super().__init__(**options)
        self.run, self.seconds = run, seconds

    def runtest(self):
        """Try the law; skipped where it could not be."""
        found = self.run(time.monotonic() + self.seconds)
        if found.status == "broken":
            pytest.fail(f"{found.told}\n\n{found.code}", pytrace=False)
        if found.status != "passed":
            pytest.skip(f"{found.status}: {found.told}")

    def reportinfo(self):
        """Where it is said to be."""
        return self.path, None, f"{self.parent.name}: {self.name}"
