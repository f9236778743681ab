"""The pytest plugin, in processes of its own: items for laws, and no cost where it is not used."""

import os
import subprocess
import sys
import tomllib

import pytest
from places import ROOT

pytestmark = pytest.mark.cpu("the processes are on the CPU")


class Outcomes:
    """A plugin that keeps what became of each item."""

    def __init__(self):
        self.of, self.told = {}, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.of[report.nodeid] = report.outcome
            self.told[report.nodeid] = str(report.longrepr)


def test_each_law_is_an_item_that_passes_fails_or_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "test_own.py").write_text(
        "def test_by_fixture(funcattn_check):\n"
        "    import funcattn as fa\n"
        "    assert funcattn_check(fa.sampling.top_k(2), examples=2).ok\n"
    )
    monkeypatch.chdir(tmp_path)
    subject = "gallery:tangent_is_zero --signature dense --laws kernel,transforms --depth 1"
    found = Outcomes()
    code = pytest.main(
        [
            *("-q", "-p", "pytest_funcattn", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)),
            *("--funcattn-check", subject, "-k", "by_fixture or jvp or merge", "test_own.py"),
        ],
        plugins=[found],
    )
    assert code == pytest.ExitCode.TESTS_FAILED
    assert found.of == {
        "test_own.py::test_by_fixture": "passed",
        f"{subject}::merge_of_any_split_is_the_whole": "skipped",
        f"{subject}::jvp_agrees_with_the_reference": "failed",
        f"{subject}::jvp(f)": "failed",
    }
    told = found.told[f"{subject}::jvp(f)"]
    assert told.startswith("jvp(f): it is off by")
    assert "names=['jvp(f)']" in told
    assert "returns no log-sum-exp" in found.told[f"{subject}::merge_of_any_split_is_the_whole"]


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        ("gallery:nothing", "check: gallery has no nothing"),
        ("gallery:closed --depth many", "2"),
    ],
)
def test_a_mistake_ends_pytest_in_one_line(tmp_path, monkeypatch, capsys, subject, complaint):
    monkeypatch.chdir(tmp_path)
    words = ["-p", "pytest_funcattn", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    assert pytest.main([*words, "--funcattn-check", subject]) == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --funcattn-check {subject}: {complaint}" in capsys.readouterr().err


def test_a_pytest_that_does_not_use_it_imports_neither_torch_nor_hypothesis(tmp_path):
    (tmp_path / "test_own.py").write_text(
        "import sys\n"
        "def test_what_is_imported():\n"
        "    assert 'pytest_funcattn' in sys.modules\n"
        "    assert not {'torch', 'funcattn'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pytest_funcattn", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the package is installed without its sources"
)
def test_the_plugin_is_an_entry_point_of_its_own_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # `-p pytest_funcattn` beside an installed entry point of another name would load it twice
    assert project["entry-points"]["pytest11"] == {"pytest_funcattn": "pytest_funcattn"}
