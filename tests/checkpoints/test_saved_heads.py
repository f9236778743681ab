"""A trained head that was saved is loaded bit for bit, and named as vLLM's speculators name it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from trained_heads import IDS, TAPS, E, V, some_head, target

import funcattn as fa
from funcattn import drafters
from funcattn.checkpoints import CheckpointError

CASES = {
    "eagle3": {"kind": "eagle3", "before": True},
    "eagle3, a part of the vocabulary": {"kind": "eagle3", "ids": IDS},
    "mtp": {"kind": "mtp"},
    "mtp, a part of the vocabulary": {"kind": "mtp", "ids": IDS},
}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(fa.tree.leaves(a), fa.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_head_comes_back_bit_for_bit(name, tmp_path):
    model, weights = target()
    head, params = some_head(**CASES[name])
    drafters.save_head(tmp_path / "head", head, params)
    drafters.save_head(tmp_path / "head", head, params)  # again, over the first
    got_head, got = drafters.load_head(tmp_path / "head", model, weights)
    assert got_head == head
    assert fa.tree.paths(got) == fa.tree.paths(params)
    assert equal(got, params)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_what_train_head_made_comes_back_without_what_is_the_targets(kind, tmp_path):
    model, weights = target()
    text = torch.arange(80) % V
    for vocabulary in (None, 7):
        head, params, _ = drafters.train_head(
            *(fa.key(0), model, weights, text),
            steps=1,
            rows=2,
            context=8,
            kind=kind,
            progress=False,
            vocabulary=vocabulary,
        )
        drafters.save_head(tmp_path / "head", head, params, target=weights)
        names = load_file(tmp_path / "head" / "model.safetensors").keys()
        assert "embed_tokens.weight" not in names
        assert ("lm_head.weight" in names) == (vocabulary is not None)
        got_head, got = drafters.load_head(tmp_path / "head", model, weights)
        assert (got_head, got.embedding is weights.embedding) == (head, True)
        assert equal(got, params)


def test_names_and_settings_are_those_of_the_layout(tmp_path):
    head, params = some_head("eagle3", ids=IDS)
    drafters.save_head(tmp_path, head, params, length=5)
    found = load_file(tmp_path / "model.safetensors")
    in_layer = ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    in_layer += [f"self_attn.{x}_proj" for x in "qkvo"]
    in_layer += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = {f"layers.0.{name}.weight" for name in in_layer}
    names |= {f"{name}.weight" for name in ("fc", "norm", "lm_head", "embed_tokens")}
    assert found.keys() == names | {"d2t", "t2d"}
    assert (torch.arange(len(IDS)) + found["d2t"]).tolist() == IDS.tolist()
    assert found["t2d"].nonzero().squeeze(-1).tolist() == IDS.tolist()
    assert found["fc.weight"].shape == (E, 3 * E)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["speculators_model_type"] == "eagle3"
    assert settings["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    assert settings["draft_vocab_size"] == len(IDS)
    assert settings["transformer_layer_config"]["model_type"] == "llama"
    assert settings["transformer_layer_config"]["vocab_size"] == V
    proposal = settings["speculators_config"]["proposal_methods"][0]
    assert proposal == {"proposal_type": "greedy", "speculative_tokens": 5}


def test_what_cannot_be_saved_is_refused(tmp_path):
    head, params = some_head("eagle3")
    save = drafters.save_head
    with pytest.raises(TypeError, match=r"drafters\.save_head: head, params should be"):
        save(tmp_path, params, head)
    with pytest.raises(TypeError, match=r"drafters\.save_head: q should be a floating tensor"):
        save(tmp_path, head, fa.quantize(fa.int8, r"layers\.0\.q")(params))
    with pytest.raises(ValueError, match="length should be an int, at least 1"):
        save(tmp_path, head, params, length=0)
    far = drafters.Head("eagle3", head.config, ("layers.0.attention.q", *TAPS[1:]))
    with pytest.raises(CheckpointError, match="taps should be embedding or layers"):
        save(tmp_path, far, params)
    assert not any(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"one that holds notes\.txt"):
        save(tmp_path, head, params)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
