"""`funcattn quantize`: what it writes, what it tells, and its mistakes."""

import pytest
import torch
from samples import CONFIG, params, tokenizer

import funcattn as fa
from funcattn import cli
from funcattn.quantization import Int4, Int8

pytestmark = pytest.mark.cpu("the command reads --device, and not torch's default")

TEXT = "hello the 12 " * 40


@pytest.fixture
def run(tmp_path, capsys):
    fa.save(tmp_path / "model", CONFIG, params(), tokenizer())
    (tmp_path / "text").write_text(TEXT)

    def call(*arguments):
        code = cli.main(
            [
                "quantize",
                "--model",
                str(tmp_path / "model"),
                *arguments,
                "-o",
                str(tmp_path / "small"),
            ]
        )
        return code, *capsys.readouterr()

    return call


def test_it_writes_the_quantized_model_and_tells_what_became_of_it(run, tmp_path):
    code, out, _ = run("--scheme", "int4", "--group", "16", "--text", str(tmp_path / "text"))
    assert code == 0
    found = fa.load(tmp_path / "small")
    assert isinstance(found.params.layers[0].q, Int4)
    assert torch.equal(
        found.params.layers[0].q.codes, fa.quantize(fa.int4(group=16))(params()).layers[0].q.codes
    )
    assert found.tokenizer.encode("hello") == tokenizer().encode("hello")
    whole = fa.quantization.report(params(), found.params)
    errors = [row.error for row in whole if row.path.endswith(".q")]
    row = next(line.split() for line in out.splitlines() if line.startswith("layers.0-1.q "))
    assert row[1:] == [
        "Int4",
        "6.00",
        f"{sum(r.nbytes for r in whole if r.path.endswith('.q')):,}",
        f"{min(errors):.2%}",
        "to",
        f"{max(errors):.2%}",
    ]
    total = next(line.split() for line in out.splitlines() if line.startswith("total"))
    assert total == str(whole).splitlines()[-1].split()
    ids = torch.tensor(tokenizer().encode(TEXT))
    before = float(fa.perplexity(fa.decoder(CONFIG), params(), ids, context=CONFIG.context))
    assert f"perplexity before  {before:.4f}" in out
    assert "perplexity after" in out


def test_groups_are_for_activations_of_8_bits_too(run, tmp_path):
    assert run("--scheme", "w8a8", "--group", "16")[0] == 0
    found = fa.load(tmp_path / "small").params.layers[0].q
    assert fa.tree.allclose(found, fa.w8a8(group=16).encode(params().layers[0].q), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["gptq", "awq", "smooth"])
def test_a_text_chooses_the_codes(run, tmp_path, method):
    code, _, _ = run("--scheme", "int8", f"--{method}", str(tmp_path / "text"))
    assert code == 0
    down = fa.load(tmp_path / "small").params.layers[1].down
    ids = torch.tensor(tokenizer().encode(TEXT))
    made = getattr(fa, method)(fa.decoder(CONFIG), ids, fa.int8)(fa.load(tmp_path / "model").params)
    wanted = fa.quantize(fa.int8)(made).layers[1].down
    assert isinstance(down, Int8)
    assert torch.equal(down.codes, wanted.codes)


BAD = [
    (["--scheme", "fp8", "--group", "16"], "--group is for int8, int4, w8a8, nf4 and ternary"),
    (["--group", "5"], "group should be an even divisor of the 64 columns, got 5"),
    (["--gptq", "no-such-file"], "no-such-file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_is_one_line_and_writes_nothing(run, tmp_path, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "small").exists()


def test_what_is_quantized_already_is_refused(run, tmp_path, capsys):
    run()
    code = cli.main(
        ["quantize", "--model", str(tmp_path / "small"), "-o", str(tmp_path / "smaller")]
    )
    assert code == 2
    assert "is quantized already" in capsys.readouterr().err
