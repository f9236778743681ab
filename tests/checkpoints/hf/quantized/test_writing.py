"""Records written for other readers: the same codes and scales, as an independent reader has them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samples import CONFIG, params, tokenizer

import funcattn as fa
from funcattn.quantization import Int4, OrderedInt4, expand, is_quantized

FOUR, EIGHT = fa.int4(symmetric=True), fa.int8
LAYERS = r"layers\..*\.(q|k|v|o|gate|up|down)"
Q = "model.layers.0.self_attn.q_proj"


def spread(x, K):
    return np.repeat(x, K // x.shape[1], 1)


def fields(words, bits, axis):
    """The codes of words, by the definition of both formats."""
    found = np.moveaxis(words.numpy().view(np.uint32), axis, 0)
    parts = [found >> np.uint32(bits * i) & np.uint32(2**bits - 1) for i in range(32 // bits)]
    return np.moveaxis(np.stack(parts, 1).reshape(-1, *found.shape[1:]), 0, axis).astype(int)


def by_definition(tensors, module, settings):
    """The matrix in float64 of a module in one of the two formats."""
    at = lambda end: tensors[f"{module}.{end}"]
    if settings["quant_method"] == "gptq":
        bits, group = settings["bits"], at("g_idx").numpy()
        codes, zeros = fields(at("qweight"), bits, 0), fields(at("qzeros"), bits, 1)
        zeros = zeros + (settings["checkpoint_format"] == "gptq")
        return ((codes - zeros[group]) * at("scales").double().numpy()[group]).T
    scheme = next(
        one
        for one in settings["config_groups"].values()
        if one["targets"] == ["Linear"] or module in one["targets"]
    )
    scale = at("weight_scale").double().numpy()
    if scheme["format"] != "pack-quantized":
        return at("weight").double().numpy() * spread(scale, at("weight").shape[1])
    bits, (N, K) = scheme["weights"]["num_bits"], at("weight_shape").tolist()
    codes = fields(at("weight_packed"), bits, 1)[:, :K] - 2 ** (bits - 1)
    if not scheme["weights"]["symmetric"]:
        zeros = fields(at("weight_zero_point"), bits, 0)[:N] - 2 ** (bits - 1)
        codes = codes - spread(zeros, K)
    return codes * spread(scale, K)


def shifted(tree):
    """Int4 with zero points of 3, 0 and 15 scales."""
    points = torch.tensor([3, 0, 15])
    zero = lambda leaf: -points[torch.arange(leaf.zero.numel()) % 3].view(leaf.zero.shape)
    move = lambda leaf: (
        leaf._replace(zero=zero(leaf) * leaf.scale.float()) if isinstance(leaf, Int4) else leaf
    )
    return fa.tree.map(move, tree, is_leaf=is_quantized)


def ordered(tree):
    """Matrices of the first layer in act-order."""
    order = lambda leaf: torch.randperm(leaf.shape[1], generator=torch.Generator().manual_seed(0))
    move = lambda leaf: OrderedInt4(*leaf, order(leaf).int()) if isinstance(leaf, Int4) else leaf
    return fa.tree.map(move, tree, is_leaf=is_quantized)


WAYS = {
    "ct int4": ("compressed-tensors", lambda p: fa.quantize(FOUR)(p)),
    "ct int4 by rows": ("compressed-tensors", lambda p: fa.quantize(FOUR(group=32), LAYERS)(p)),
    "ct shifted": ("compressed-tensors", lambda p: shifted(fa.quantize(FOUR, LAYERS)(p))),
    "ct int8": ("compressed-tensors", lambda p: fa.quantize(EIGHT)(p)),
    "ct int8 in groups": ("compressed-tensors", lambda p: fa.quantize(EIGHT(group=32), LAYERS)(p)),
    "ct w8a8": ("compressed-tensors", lambda p: fa.quantize(fa.w8a8(group=None), LAYERS)(p)),
    "ct fp8": ("compressed-tensors", lambda p: fa.quantize(fa.fp8, LAYERS)(p)),
    "ct mixed": (
        "compressed-tensors",
        lambda p: fa.quantize(EIGHT, LAYERS)(fa.quantize(FOUR, r".*\.(up|down)")(p)),
    ),
    "gptq": ("gptq", lambda p: fa.quantize(FOUR)(p)),
    "gptq shifted": ("gptq", lambda p: shifted(fa.quantize(FOUR, LAYERS)(p))),
    "gptq in act-order": ("gptq", lambda p: ordered(fa.quantize(FOUR, LAYERS)(p))),
    "gptq int8": ("gptq", lambda p: fa.quantize(EIGHT)(p)),
    "gptq of a part": ("gptq", lambda p: fa.quantize(FOUR, r".*\.(up|down)")(p)),
}


@pytest.mark.filterwarnings("ignore:.*activations are not rounded")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_read_with_the_same_codes(tmp_path, way):
    method, quantize = WAYS[way]
    made = quantize(params())
    fa.save(tmp_path / "m", CONFIG, made, tokenizer(), format=method)
    found = fa.load(tmp_path / "m").params
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert settings["model_type"] == "llama"
    said = settings["quantization_config"]
    assert "lm_head" in said.get("ignore", ["lm_head"])  # tied, and a module of other readers
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    matrices = 0
    for leaf, name in (("q", Q), ("down", "model.layers.0.mlp.down_proj")):
        a, b = getattr(made.layers[0], leaf), getattr(found.layers[0], leaf)
        if not is_quantized(a):
            assert torch.equal(a, b)
            continue
        matrices += 1
        matrix = by_definition(tensors, name, settings["quantization_config"])
        assert torch.allclose(expand(a).double(), torch.from_numpy(matrix), rtol=2**-22, atol=1e-9)
        assert torch.equal(a.codes, b.codes) or isinstance(a, OrderedInt4)
        assert torch.equal(a.scale.double(), b.scale.double())
        assert torch.equal(expand(a), expand(b))
    assert matrices
    plain = made.embedding if isinstance(made.embedding, torch.Tensor) else expand(made.embedding)
    assert torch.equal(found.embedding, plain)


def test_what_gptq_made_is_written(tmp_path):
    config = replace(CONFIG, layers=1)
    model = fa.decoder(config)
    text = fa.random.randint(fa.key(1), (128,), 0, config.vocabulary)
    made = fa.gptq(model, text, FOUR)(model.init(fa.key(0)))
    logits = lambda p: model.logits(p, model.hidden(p, text[:9])[0])
    for method in ("gptq", "compressed-tensors"):
        fa.save(tmp_path / method, config, made, format=method)
        again = fa.load(tmp_path / method).params
        assert torch.allclose(logits(again), logits(made), atol=1e-5)


def test_nothing_quantized_says_nothing(tmp_path):
    fa.save(tmp_path / "m", CONFIG, params(), format="gptq")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def halved(tree):
    wide = lambda leaf: leaf._replace(
        scale=leaf.scale.float() * 1.0001, zero=leaf.zero.float() * 1.0001
    )
    return fa.tree.map(
        lambda leaf: wide(leaf) if isinstance(leaf, Int4) else leaf, tree, is_leaf=is_quantized
    )


FAULTS = {
    "asymmetric": ("gptq", fa.quantize(fa.int4), r"q_proj.weight .*symmetric=True"),
    "of levels": ("compressed-tensors", fa.quantize(fa.nf4(group=32), LAYERS), "a Codebook"),
    "wide": ("compressed-tensors", fa.quantize(fa.fp8(kind="e5m2"), LAYERS), "Fp8 in e4m3"),
    "groups of w8a8": ("compressed-tensors", fa.quantize(fa.w8a8, LAYERS), r"w8a8\(group=None\)"),
    "gptq of w8a8": ("gptq", fa.quantize(fa.w8a8, LAYERS), "Int8Dynamic"),
    "two": (
        "gptq",
        lambda p: fa.quantize(EIGHT, LAYERS)(fa.quantize(FOUR, r".*\.(up|down)")(p)),
        "one number of bits",
    ),
    "scales": ("gptq", lambda p: halved(fa.quantize(FOUR, LAYERS)(p)), "float16"),
    "order": (
        "compressed-tensors",
        lambda p: ordered(fa.quantize(FOUR, LAYERS)(p)),
        "OrderedInt4",
    ),
    "format": ("awq", lambda p: p, "format should be None or one of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_format_does_not_have_is_refused(tmp_path, fault):
    method, quantize, words = FAULTS[fault]
    with pytest.raises((ValueError, TypeError), match=rf"(?s)save: .*{words}"):
        fa.save(tmp_path / "m", CONFIG, quantize(params()), format=method)
    assert not (tmp_path / "m").exists()


def test_words_are_the_inverse_of_unpacking():
    from funcattn.checkpoints.hf.quantized import codes, writing

    for bits, K in ((4, 24), (8, 12), (4, 10)):
        each = fa.random.randint(fa.key(bits), (3, K), 0, 2**bits).to(torch.uint8)
        words = writing.words(each, bits)
        assert torch.equal(codes.unpacked(codes.bytes_of(words), bits)[:, :K], each)


def test_columns_that_do_not_fill_words_are_refused(tmp_path):
    config = replace(CONFIG, feed_forward=CONFIG.feed_forward + 4)
    tree = fa.quantize(fa.int4(group=4, symmetric=True), r".*\.down")(
        fa.decoder(config).init(fa.key(0))
    )
    with pytest.raises(ValueError, match=r"save: .*down_proj.*of a multiple of 8 columns"):
        fa.save(tmp_path / "m", config, tree, format="compressed-tensors")
