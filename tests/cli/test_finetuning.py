"""`funcattn finetune`: a model adapted to a text, its adaptation in PEFT's layout, merged on
demand.
"""

import json

import pytest
import torch

import funcattn as fa
from funcattn import cli
from funcattn.training import characters

TEXT = "the sea is wide and the sky is high.\n" * 30
SMALL = [
    "--rank",
    "2",
    "--context",
    "16",
    "--rows",
    "4",
    "--steps",
    "30",
    "--rate",
    "0.02",
    "--sample",
    "0",
]


@pytest.fixture
def made(tmp_path):
    """(folder of a model of characters, a text, a place for what comes out)"""
    tokenizer = characters(TEXT)
    sizes = {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_size": 8,
        "feed_forward": 24,
        "context": 32,
    }
    config = fa.Config(vocabulary=tokenizer.vocabulary, **sizes)
    fa.save(tmp_path / "base", config, fa.decoder(config).init(fa.key(0)), tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "base", tmp_path / "text.txt", tmp_path / "out"


def run(made, *arguments):
    base, text, out = made
    return cli.main(["finetune", str(text), "--model", str(base), "--out", str(out), *arguments])


def test_an_adapted_model_is_the_base_with_its_adaptation(made, capsys):
    base, _, out = made
    assert run(made, *SMALL, "--merge") == 0
    err = capsys.readouterr().err.splitlines()
    losses = [
        float(line.split("training ")[1].split(",")[0]) for line in err if "training " in line
    ]
    assert losses[-1] < 0.95 * losses[0]
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (
        2,
        4,
        str(base),
    )
    config, params, _ = fa.load(base)
    merged = fa.merge_lora(fa.load_lora(out / "adapter", params))
    for a, b in zip(
        fa.tree.leaves(merged), fa.tree.leaves(fa.load(out / "model").params), strict=True
    ):
        # products in another order of memory
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged.embedding, params.embedding)
    assert not torch.equal(merged.layers[0].q, params.layers[0].q)


def test_samples_of_before_and_after_are_on_stdout(made, capsys):
    assert run(made, *SMALL[:-2], "--sample", "8") == 0
    told = capsys.readouterr()
    lines = told.out.split("the sea is")
    assert len(lines) == 3
    assert "Before:" in told.err
    assert "After:" in told.err


def test_a_model_without_a_tokenizer_or_context_is_refused(made, capsys):
    base = made[0]
    assert run(made, *SMALL, "--context", "33") == 2
    assert (
        "--context should be at most 32, which the model was trained on, got 33."
        in capsys.readouterr().err
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    assert run(made, *SMALL) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rank", "99"), "lora: rank should be at most 16"),
        (("--model", "no/such"), '"no/such" should be'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, made, capsys):
    assert run(made, *SMALL, *arguments) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
