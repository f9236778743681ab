"""`funcattn bench` and the options that look at speed: what they run, keep and refuse. No time is
asserted.
"""

import json

import pytest

import funcattn as fa
from funcattn import cli

pytestmark = pytest.mark.cpu("the command reads --device, and not torch's default")

CONFIG = fa.Config(
    vocabulary=49152,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=8,
    feed_forward=16,
    context=256,
)


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    fa.save(path, CONFIG, fa.decoder(CONFIG).init(fa.key(0)), smollm2.tokenizer)
    return str(path)


def test_bench_tells_every_candidate_and_keeps_the_figures(folder, tmp_path, capsys):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "--tokens",
        "2",
        "--context",
        "5",
        "--capacity",
        "50",
        "--eager",
        "--schemes",
        "int8",
        "--plot",
        str(picture),
    ]
    assert cli.main(["bench", "--model", folder, *options, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert [row["name"] for row in figures["candidates"]] == ["eager", "eager int8"]
    whole, eighth = (row["bytes_a_token"] for row in figures["candidates"])
    assert eighth < whole / 2
    assert all(row["ms"] > 0 and row["mbu"] > 0 for row in figures["candidates"])
    out = capsys.readouterr().out
    assert "ms a token" in out
    assert "GB/s with" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schemes", "int3"], "--schemes should be of int8, int4, got int3"),
        (["--tokens", "0"], "--tokens should be at least 1"),
        (["--context", "1"], "--context at least 2"),
        (["--context", "400", "--eager"], "within the 256 positions"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(folder, capsys, options, message):
    assert cli.main(["bench", "--model", folder, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_is_a_trace_and_ten_lines(folder, tmp_path, capsys):
    file = tmp_path / "trace.json"
    assert (
        cli.main(["generate", "--model", folder, "--steps", "3", "--profile", str(file), "Hello"])
        == 0
    )
    assert json.loads(file.read_text())["traceEvents"]
    told = capsys.readouterr().err.splitlines()
    assert sum(line.endswith("calls") for line in told) == 10
    assert told[-1] == f"trace in {file}"
