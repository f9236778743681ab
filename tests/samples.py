"""Small models on disk, made for each test: the tiny Config in both layouts, with a byte-level
tokenizer of 300 tokens.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from funcattn import checkpoints, randomness, transformer, tree
from funcattn.checkpoints import Tokenizer
from funcattn.checkpoints.families.metadata import SIZES as GGUF_SIZES
from funcattn.families import GGUF_TENSORS, leaves, spelling
from funcattn.layers import RopeScaling

CONFIG = transformer.Config(
    vocabulary=300,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=16,
    feed_forward=96,
    rope_base=500.0,
    context=128,
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|end|>", "<|turn|>", "<s>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "Ġ 1", "1 2", "o 1"]
TOKENS = [*SPECIAL, "<think>", *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
TOKENS += [f"<spare {number}>" for number in range(CONFIG.vocabulary - len(TOKENS))]
KINDS = [3] * len(SPECIAL) + [4] + [1] * (CONFIG.vocabulary - len(SPECIAL) - 1)
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|turn|>{% endif %}"


def params(config=CONFIG, seed=0):
    return transformer.decoder(config).init(randomness.key(seed))


def same(a, b) -> bool:
    """True where two trees have the same leaves, bit for bit and dtype for dtype."""
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and torch.equal(a[path].cpu(), b[path].cpu()) for path in a
    )


def load(path: Path, **options) -> checkpoints.Loaded:
    """A checkpoint, its parameters where the tests' own tensors are."""
    loaded = checkpoints.load(path, **options)
    return loaded._replace(params=tree.to(torch.get_default_device())(loaded.params))


def tokenizer() -> Tokenizer:
    ids = {token: number for number, token in enumerate(TOKENS)}
    backend = Backend(models.BPE(vocab=ids, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, (0,), TEMPLATE, {"eos_token": "<|end|>", "bos_token": "<s>"})


def metadata(config=CONFIG) -> dict[str, object]:
    """What a GGUF file says of a Config and of the tokenizer."""
    sizes = {f"llama.{theirs}": getattr(config, ours) for ours, theirs in GGUF_SIZES.items()}
    return {
        "general.architecture": "llama",
        **sizes,
        "llama.rope.dimension_count": config.head_size,
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": np.array(KINDS, np.int32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(
    path: Path, config=CONFIG, weights=None, *, kind="F32", change=(), extra=(), part=(0, 1)
) -> Path:
    """A GGUF file by the `gguf` package: matrices of `kind`, metadata less or more what `change`
    says, and `extra` tensors; or one part of several, as gguf-split writes it.
    """
    number, count = part
    if count > 1:
        change = {**dict(change), "split.no": number, "split.count": count}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {**metadata(config), **dict(change)}.items():
        if name == "general.architecture":
            writer.kv_data[0][name].value = value
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)
    quantized = gguf.GGMLQuantizationType[kind]
    tree_leaves = leaves(params(config) if weights is None else weights)
    for leaf_path, leaf in list(tree_leaves.items())[number::count]:
        numbers = leaf.detach().float().cpu().numpy()
        last = leaf_path.rpartition(".")[2]
        if last in ("q", "k"):
            numbers = interleave(numbers, config.heads if last == "q" else config.kv_heads)
        of_kind = quantized if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            spelling(GGUF_TENSORS, leaf_path),
            gguf.quants.quantize(numbers, of_kind),
            raw_dtype=of_kind,
        )
    for name, numbers in dict(extra).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
