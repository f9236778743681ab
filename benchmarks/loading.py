"""How long does a quantized folder take to load, and how much memory, as a multiple of its size?

    python benchmarks/loading.py [--layers 32] [--methods gptq awq compressed-tensors funcattn]
        [--threads 1]

A folder of random codes is written to a temporary place, some 32 MB a layer of width 2048 in 4 bits
(50 of the experts of gpt-oss, "mxfp4"), and loaded in a process of its own, whose files are in the
cache of the system. "Memory" is the greatest resident memory during the load, and that after it,
less what was resident before.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import funcattn as fa

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import coded

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
GROUP = 128
SIZES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.o_proj": (2048, 2048),
    "self_attn.k_proj": (1024, 2048),
    "self_attn.v_proj": (1024, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
LOADS = """
import sys, time, json, resource
import funcattn as fa
def now(field):
    text = open("/proc/self/status").read()
    return int(text.split(field + ":")[1].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the greatest begins anew
before, wall, cpu = now("VmRSS"), time.perf_counter(), time.process_time()
loaded = fa.load(sys.argv[1])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
kinds = {type(leaf).__name__ for leaf in fa.tree.leaves(loaded.params, is_leaf=fa.quantization.is_quantized)}
print(json.dumps([wall, cpu, now("VmHWM") - before, now("VmRSS") - before, sorted(kinds)]))
"""


def words(*shape: int) -> Tensor:
    """Random words of 32 bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def halves(*shape: int) -> Tensor:
    """Random scales."""
    return torch.rand(*shape).half() / 100


def gptq(N: int, K: int) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    zeros = torch.full((K // GROUP, N // 8), 0x77777777, dtype=torch.int32)
    return {"qweight": words(K // 8, N), "qzeros": zeros, "scales": halves(K // GROUP, N)}


def awq(N: int, K: int) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    zeros, scales = words(K // GROUP, N // 8), halves(K // GROUP, N)
    return {"qweight": words(K, N // 8), "qzeros": zeros, "scales": scales}


def compressed_tensors(N: int, K: int) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    return {
        "weight_packed": words(N, K // 8),
        "weight_scale": halves(N, K // GROUP),
        "weight_shape": torch.tensor([N, K]),
    }


def funcattn(N: int, K: int) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    codes = words(N, K // 8).view(torch.uint8)
    return {"codes": codes, "scale": halves(N, K // GROUP), "zero": halves(N, K // GROUP)}


def by_tests(case: str) -> Callable[[int, int], dict[str, Tensor]]:
    """The tensors of a matrix as tests/coded.py makes them: one matrix for all of its size."""

    @functools.cache
    def made(N: int, K: int) -> dict[str, Tensor]:
        return coded.CASES[case][0](np.random.default_rng(0), N, K).tensors

    return lambda N, K: {end: x.clone() for end, x in made(N, K).items()}


OF_TESTS = ("fp8", "bitsandbytes nf4", "bitsandbytes int8", "mlx", "hqq", "torchao", "nvfp4")
METHODS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "funcattn": funcattn,
    **{case: by_tests(case) for case in OF_TESTS},
    "mxfp4": coded.mxfp4_linear,  # written by `experts`
}
EXPERTS = {
    **CONFIG,
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "intermediate_size": 2048,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}


def experts(layers: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a model of gpt-oss, and its config.json."""
    values = {**EXPERTS, "num_hidden_layers": layers}
    values["layer_types"] = ["full_attention", "sliding_attention"] * (layers // 2)
    config = fa.families.read_config({**values, "quantization_config": None})
    family = fa.families.family_for(config)
    tensors = {}
    for name, shape in fa.families.wanted(
        config, fa.families.locate_tensors(family, config)
    ).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            X, K, N = shape
            tensors[f"{name}_blocks"] = words(X, N, K // 32, 4).view(torch.uint8)
            tensors[f"{name}_scales"] = torch.full((X, N, K // 32), 120, dtype=torch.uint8)
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    return tensors, values


def settings(method: str, layers: int) -> dict[str, object]:
    """The config.json of a folder."""
    four = {"quant_method": method, "bits": 4, "group_size": GROUP}
    values = {**CONFIG, "num_hidden_layers": layers}
    if method in OF_TESTS:
        return {**values, "quantization_config": coded.CASES[method][1]}
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        four["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
        four["format"] = "pack-quantized"
    if method == "funcattn":
        names = [f"model.layers.{n}.{name}.weight" for n in range(layers) for name in SIZES]
        four |= {"model_type": "llama", "records": dict.fromkeys(names, "Int4")}
        values["model_type"] = method
    return {**values, "quantization_config": four}


def write(folder: Path, method: str, layers: int) -> None:
    """A folder of random codes."""
    tensors, values = experts(layers) if method == "mxfp4" else matrices(method, layers)
    save_file(tensors, folder / "model.safetensors", metadata=metadata(tensors))
    (folder / "config.json").write_text(json.dumps(values))


def metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header's metadata, with the classes of torchao."""
    kinds = {
        name: name.replace("_qdata", "").replace("._", ".") for name in tensors if "_qdata" in name
    }
    return {"format": "pt", **dict.fromkeys(kinds.values(), '{"_type": "Int8Tensor"}')}


def matrices(method: str, layers: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a llama, and its config.json."""
    tensors = {"model.embed_tokens.weight": torch.zeros(1024, 2048, dtype=torch.bfloat16)}
    norm = torch.ones(2048, dtype=torch.bfloat16)
    for n in range(layers):
        for name, size in SIZES.items():
            made = METHODS[method](*size)
            tensors |= {f"model.layers.{n}.{name}.{end}": x for end, x in made.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{n}.{name}.weight"] = norm.clone()
    tensors["model.norm.weight"] = norm
    return tensors, settings(method, layers)


def main() -> None:
    """Write, load and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for method in options.methods:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), method, options.layers)
            size = (Path(name) / "model.safetensors").stat().st_size
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            begun = time.perf_counter()
            run = [sys.executable, "-c", LOADS, name]
            done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
            wall, cpu, most, after, kinds = json.loads(done.stdout)
            print(
                f"{method:20} {size / 1e9:.2f} GB in {wall:5.1f} s ({cpu:.1f} s of CPU; with the "
                f"imports {time.perf_counter() - begun:.1f} s), memory at most {most / size:.2f}, "
                f"after {after / size:.2f} times the size; {', '.join(kinds)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
