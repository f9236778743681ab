"""Weights that another tool quantized, with a config.json that does not say so: the refusal names
the tool.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import CONFIG, params

import funcattn as fa
from funcattn.checkpoints import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
ROWS = COLUMNS = 64
ints = lambda *shape: torch.zeros(*shape, dtype=torch.int32)
bytes_ = lambda *shape: torch.zeros(*shape, dtype=torch.uint8)
halves = lambda *shape: torch.ones(*shape, dtype=torch.float16)
fp8 = torch.zeros(ROWS, COLUMNS, dtype=torch.float8_e4m3fn)
int8 = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)

# method -> what stands in the place of one matrix, by the end of its name behind q_proj
METHODS = {
    "gptq": {
        ".qweight": ints(8, 64),
        ".qzeros": ints(1, 8),
        ".scales": halves(1, 64),
        ".g_idx": ints(64),
    },
    # of before there was an order
    "gptq ": {".qweight": ints(8, 64), ".qzeros": ints(1, 8), ".scales": halves(1, 64)},
    "awq": {".qweight": ints(64, 8), ".qzeros": ints(1, 8), ".scales": halves(1, 64)},
    "bitsandbytes": {
        ".weight": bytes_(2048, 1),
        ".weight.absmax": torch.ones(64),
        ".weight.quant_map": torch.ones(16),
    },
    "bitsandbytes ": {".weight": int8, ".SCB": torch.ones(64), ".weight_format": bytes_(1)},
    "fp8": {".weight": fp8, ".weight_scale_inv": torch.ones(1, 1)},
    "fp8 ": {".weight": fp8},
    "fp8  ": {".weight": fp8.to(torch.float8_e5m2), ".weight_scale": torch.ones(1)},
    "fbgemm": {".weight": fp8, ".weight_scale": torch.ones(64, 1)},
    "compressed-tensors": {
        ".weight_packed": ints(64, 8),
        ".weight_scale": halves(64, 1),
        ".weight_shape": ints(2),
    },
    "compressed-tensors ": {".weight": int8, ".weight_scale": halves(64, 1)},
    "modelopt": {
        ".weight": bytes_(64, 32),
        ".weight_scale": fp8,
        ".weight_scale_2": torch.ones(1),
        ".input_scale": torch.ones(1),
    },
    "hqq": {".W_q": bytes_(32, 64), ".scale": halves(64, 1), ".zero": halves(64, 1)},
    "aqlm": {".codes": int8, ".codebooks": halves(1, 16, 1, 8), ".scales": halves(64, 1)},
    "quanto": {
        ".weight._data": int8,
        ".weight._scale": halves(64, 1),
        ".input_scale": torch.ones(1),
    },
    "torchao": {".weight_qdata": int8, ".weight_scale": halves(64, 1)},
    "torchao ": {"._weight_qdata": int8, "._weight_scale": halves(64, 1)},
    "mxfp4": {".weight_blocks": bytes_(64, 2, 16), ".weight_scales": bytes_(64, 2)},
    "eetq": {".weight": int8, ".weight_scales": halves(64)},
    "vptq": {
        ".centroids.weight": halves(1, 64),
        ".indices": ints(1, 8, 8),
        ".weight_scale": halves(64),
    },
    "spqr": {
        ".dense_weights": ints(8, 8),
        ".row_offsets": ints(65),
        ".col_vals": ints(4),
        ".in_perm": ints(64),
    },
    "higgs": {
        ".weight": torch.zeros(8, 64, dtype=torch.int16),
        ".scales": halves(1, 64),
        ".tables": halves(16),
    },
    "marlin": {".B": ints(4, 128), ".s": halves(1, 64), ".workspace": ints(16)},
    "exl2": {
        ".q_weight": ints(8, 64),
        ".q_scale": ints(1, 8),
        ".q_groups": torch.zeros(4, dtype=torch.int16),
    },
    "quip": {".Qidxs": torch.zeros(64, 8, dtype=torch.int64), ".SU": halves(64), ".SV": halves(64)},
    "bitnet": {".weight": bytes_(16, 64), ".weight_scale": halves(1)},
    "fp_quant": {
        ".qweight": bytes_(64, 32),
        ".scales": bytes_(64, 4),
        ".forward_hadamard_matrix": halves(32, 32),
    },
    "mlx": {
        ".weight": torch.zeros(64, 8, dtype=torch.uint32),
        ".scales": halves(64, 1),
        ".biases": halves(64, 1),
    },
    "fa.save": {".codes": int8, ".scale": halves(64)},  # our own, beside another config.json
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "m"
    fa.save(folder, CONFIG, params())
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{Q}.weight"]
    return folder, tensors


def refusal(folder):
    with pytest.raises(CheckpointError) as refused:
        fa.load(folder)
    told = str(refused.value)
    assert not any(word in told.lower() for word in ("damaged", "fetch"))
    return told


@pytest.mark.parametrize("method", METHODS)
def test_the_refusal_names_the_method(model, method):
    folder, tensors = model
    save_file(
        tensors | {f"{Q}{end}": value for end, value in METHODS[method].items()},
        folder / "model.safetensors",
    )
    assert f"{method.strip()}" in refusal(folder).partition("got")[2]


def test_the_method_is_named_in_shards_too(model, tmp_path):
    folder, tensors = model
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    places = {}
    packed = {f"{Q}{end}": value for end, value in METHODS["awq"].items()}
    for number, part in enumerate((tensors, packed), 1):
        places |= dict.fromkeys(part, f"model-0000{number}-of-00002.safetensors")
        save_file(part, tmp_path / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "awq" in refusal(tmp_path)


def test_codes_of_a_tool_that_is_not_known_are_refused_as_codes(model):
    folder, tensors = model
    save_file({**tensors, f"{Q}.weight": int8}, folder / "model.safetensors")
    assert f"the type of {Q}.weight" in refusal(folder)
    assert "I8" in refusal(folder)
