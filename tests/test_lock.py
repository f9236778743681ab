"""requirements.lock: every package of `make demo`, `make test` and `.ci/run` with its version,
whatever the day; requirements-peers.lock: what `make test-peers` adds.
"""

import os
import re
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

LOCK, PEERS = ROOT / "requirements.lock", ROOT / "requirements-peers.lock"
MAKEFILE = ROOT / "Makefile"
pytestmark = pytest.mark.skipif(
    not LOCK.exists(), reason="the lock is not part of a source distribution"
)


def locked(lock=LOCK) -> list[Requirement]:
    return [Requirement(line) for line in lock.read_text().splitlines()]


@pytest.mark.parametrize("lock", [LOCK, PEERS], ids=lambda path: path.name)
def test_every_line_is_one_package_with_its_exact_version(lock):
    """No address, no option, no comment: plain pip reads it, from whatever index it is set to."""
    lines = lock.read_text().splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line)] == []


def test_tools_of_other_people_replace_nothing_that_is_locked():
    """They are installed without their dependencies: no other torch comes with them, and what they
    bring is not also in requirements.lock.
    """
    names = {canonicalize_name(pin.name) for pin in locked(PEERS)}
    assert names & {canonicalize_name(pin.name) for pin in locked()} == set()
    assert {
        name for name in names if re.match("torch(vision|audio)?$|nvidia|triton", name)
    } == set()
    asked = {
        canonicalize_name(Requirement(line.partition("#")[0]).name)
        for line in (ROOT / "requirements-peers.in").read_text().splitlines()
        if line[:1] != "#"
    }
    assert asked == names, "make lock"
    (rule,) = re.findall(r"(?m)^\t.*--requirement requirements-peers.lock$", MAKEFILE.read_text())
    assert "--no-deps" in rule


def test_what_pyproject_asks_for_is_locked():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    inside = [Requirement(line) for line in extras["dev"] if line.startswith("funcattn[")]
    names = {"dev", *(name for one in inside for name in one.extras)}
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    asked += [line for name in names for line in extras[name] if not line.startswith("funcattn[")]
    asked += [
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.in").read_text().splitlines()
        if line[:1] != "#"
    ]
    pins = {}
    for pin in locked():
        pins.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
    for wanted in map(Requirement, asked):
        versions = pins.get(canonicalize_name(wanted.name), [])
        assert versions, f"{wanted} is not in requirements.lock: make lock"
        assert all(wanted.specifier.contains(one) for one in versions), (
            f"{wanted} does not admit {versions}: make lock"
        )


@pytest.mark.skipif(
    not os.environ.get("FUNCATTN_LOCK"), reason="only `make test` installs what is locked"
)
def test_what_is_installed_is_what_is_locked():
    found = {}
    for pin in locked():
        if pin.marker is None or pin.marker.evaluate():
            try:
                there = version(pin.name)
            except PackageNotFoundError:
                continue  # uv, for instance, or what only another job installs
            if not pin.specifier.contains(there.partition("+")[0]):
                found[str(pin)] = there
    assert found == {}
