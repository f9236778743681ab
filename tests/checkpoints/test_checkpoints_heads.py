"""Trained heads in the layout of vLLM's speculators load, and draft as a plain implementation."""

import json

import pytest
import torch
from safetensors.torch import save_file
from trained_heads import FF, IDS, PROMPT, TAPS, D, E, H, K, V, plainly, some_head, target

import funcattn as fa
from funcattn import drafters
from funcattn.checkpoints import CheckpointError
from funcattn.decoding.speculative import heads

LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": E,
    "num_hidden_layers": 1,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
    "intermediate_size": FF,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
IN_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
}


def written(folder, kind, ids=None, *, flat=False, config=None, tensors=None):
    """A folder with a random head of some_head."""
    head, params = some_head(kind, ids=ids)
    first = "midlayer" if flat else "layers.0"
    two = {
        "eagle3": (f"{first}.input_layernorm", f"{first}.hidden_norm"),
        "mtp": ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
    }[kind]
    prefix = "mtp." if kind == "mtp" else ""
    names = {"fuse": f"{prefix}fc", "norm": f"{prefix}norm", "head": "lm_head"}
    names |= {"embedding": "embed_tokens", "embedding_norm": two[0], "hidden_norm": two[1]}
    found = {f"{name}.weight": getattr(params, field) for field, name in names.items()}
    for field, name in IN_LAYER.items():
        weight = getattr(params.layers[0], field)
        if isinstance(weight, torch.Tensor):
            found[f"{prefix}{first}.{name}.weight"] = weight
    if ids is not None:
        found["d2t"] = ids - torch.arange(len(ids))
        found["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    own = {"draft_vocab_size": V if ids is None else len(ids), "norm_before_residual": False}
    values = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": kind,
        "speculators_config": {},
        "eagle_aux_hidden_state_layer_ids": [0, 2, 3],
        "transformer_layer_config": LLAMA,
        **own,
    }
    values = LLAMA | own if flat else values
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    found |= tensors or {}
    found = {name: x.contiguous().clone() for name, x in found.items() if x is not None}
    save_file(found, folder / "model.safetensors")
    return head, params


CASES = {
    "eagle3": {"kind": "eagle3"},
    "eagle3, a part of the vocabulary": {"kind": "eagle3", "ids": IDS},
    "eagle3, as first published": {"kind": "eagle3", "ids": IDS, "flat": True},
    "mtp": {"kind": "mtp"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_the_head_that_it_was_written_from(name, tmp_path):
    model, weights = target()
    wanted, params = written(tmp_path, **CASES[name])
    head, got = drafters.load_head(tmp_path, model, weights)
    assert fa.tree.allclose(got, params)
    assert head.kind == wanted.kind
    if name == "eagle3":
        assert head.taps == TAPS
    tokens = torch.tensor([1, 4, 1, 5, 9])
    features = fa.random.normal(fa.key(5), (5, len(head.taps) * E), torch.float64)
    x, _ = heads.hidden(head, got, tokens, heads.carried(head, got, features))
    torch.testing.assert_close(
        heads.logits(head, got, x), plainly(head, params, tokens, features)[0]
    )


def test_what_a_file_leaves_out_is_the_targets(tmp_path):
    model, weights = target()
    written(tmp_path, "mtp", tensors={"embed_tokens.weight": None, "lm_head.weight": None})
    head, got = drafters.load_head(tmp_path, model, weights)
    assert got.embedding is weights.embedding
    assert got.head is weights.embedding  # tied
    drafter = drafters.tree(drafters.head(head, got), branching=(2, 1))
    done, _ = fa.speculate(fa.key(0), model, weights, drafter, PROMPT, steps=5)
    assert torch.equal(done.tokens, fa.generate(fa.key(0), model, weights, PROMPT, steps=5)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"speculators_model_type": "medusa"}}, "one of eagle3, mtp, got medusa"),
        ({"config": {"norm_before_fc": True}}, "known ones, got norm_before_fc"),
        ({"config": {"eagle_aux_hidden_state_layer_ids": [0, 9]}}, "ids from 0 to 3"),
        ({"config": {"transformer_layer_config": LLAMA | {"model_type": "mpt"}}}, "got mpt"),
        ({"tensors": {"extra.weight": torch.zeros(2)}}, "got extra.weight"),
        ({"tensors": {"fc.weight": torch.zeros(E, E)}}, "fuse should be"),
        ({"tensors": {"norm.weight": None}}, "norm should be .* got none"),
        ({"tensors": {"d2t": torch.full((V,), 3)}}, "offsets to different tokens below 20"),
    ],
)
def test_a_folder_that_is_no_head_of_the_target_is_refused(change, message, tmp_path):
    model, weights = target()
    written(tmp_path, "eagle3", **change)
    with pytest.raises(CheckpointError, match="drafters.load_head: .*" + message):
        drafters.load_head(tmp_path, model, weights)
    with pytest.raises(FileNotFoundError):
        drafters.load_head(tmp_path / "nowhere", model, weights)
