"""`funcattn check`: the table on stdout, its exit codes, and mistakes in one line."""

import builtins
import json
import re
import sys

import pytest
from places import TESTS

from funcattn import cli
from funcattn.cli import checking

pytestmark = pytest.mark.cpu("the command reads --device, and not torch's default")

GALLERY = f"{TESTS / 'gallery.py'}:"
QUICK = ("--laws", "transforms", "--depth", "1")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = cli.main(["check", *arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_a_right_kernel_is_a_table_and_exit_code_0(run):
    code, out, err = run(GALLERY + "by_blocks", "--signature", "causal", *QUICK)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [GALLERY + "by_blocks", "  kernel(causal), float64 on cpu", ""]
    assert re.fullmatch(r"grad\(f\) +passed +\d+\.\d", lines[3])
    assert lines[-1] == "7 passed. Errors in eps of the amplitude."
    assert max(map(len, lines[1:])) <= 80
    assert "\x1b" not in out


def test_a_wrong_kernel_is_told_with_code_to_paste_and_exit_code_1(run):
    code, out, _ = run(GALLERY + "tangent_is_zero", "--signature", "dense", *QUICK)
    assert code == 1
    assert re.search(r"^jvp\(f\) +BROKEN", out, re.MULTILINE)
    assert out.count("import funcattn as fa") == 1  # of several nestings the first is told
    pasted = out[out.index("import torch") :]
    with pytest.raises(AssertionError, match=re.escape("jvp(f)")):
        exec(pasted, {})


def test_findings_are_json_for_programs(run):
    law = "at_least_one_token_is_kept"
    code, out, err = run("funcattn.sampling:top_k(2)", "--examples", "3", "--json")
    told = json.loads(out)
    assert (code, err, told["ok"]) == (0, "", True)
    assert {row["law"]: row["status"] for row in told["laws"]}[law] == "passed"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["funcattn:atend"], "funcattn has no atend. Did you mean attend?"),
        (["funcattn:attend", "--laws", "kernals"], "Did you mean kernel?"),
        (["funcattn:attend", "--dtyp", "float16", "--sede", "1"], "unrecognized arguments"),
        (["funcattn:attend", "--dtype", "int8"], "one of float64, float32, bfloat16, float16"),
        (["funcattn:attend", "--depth", "9"], "should be 1 to 4, got 9"),
        (["funcattn:int8", "--signature", "sdpa"], "this is a transform"),
        ([], "required: MODULE:OBJECT"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, complaint):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_without_hypothesis_the_extra_is_named(run, monkeypatch):
    for loaded in [name for name in sys.modules if name.startswith("funcattn.testing")]:
        monkeypatch.delitem(sys.modules, loaded)
    real = builtins.__import__

    def refuse(name, *rest):
        if name.partition(".")[0] == "hypothesis":
            raise ImportError("No module named 'hypothesis'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    code, out, err = run("funcattn:attend")
    assert (code, out) == (2, "")
    assert "pip install funcattn[testing]" in err
    assert err.count("\n") == 1


def test_statuses_are_coloured_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(checking, "is_coloured", lambda: True)
    checking._print(["law   BROKEN   3.0", "raises below"], "broken")
    assert capsys.readouterr().out == "law  \x1b[31m BROKEN \x1b[39m  3.0\nraises below\n"
