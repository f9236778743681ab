"""Every family against its original: tiny random models made by transformers, read, run, decoded
step by step, saved, read back.
"""

import json
import math
import shutil

import pytest
import torch
import transformers
from family_models import IDEAS, LATEST, MODELS, MORE, TEXT, TOWERS, T, V, settings, wrap_text
from safetensors.torch import load_file, save_file
from samples import load
from torch.func import grad, jvp, vmap
from transformers import AutoConfig, AutoModelForCausalLM

import funcattn as fa

FAST = {*MODELS} - (LATEST.keys() - IDEAS)
marked = lambda name, fast: pytest.param(name, marks=[pytest.mark.slow] * (name not in fast))
WHOLE = [marked(name, FAST) for name in MODELS]
EACH = [marked(name, MODELS.keys() - MORE.keys() - LATEST.keys()) for name in MODELS]


def biases(model):
    """Weights that are buffers: what routers add for the choice of experts, scales of layers."""
    ends = "correction_bias", "expert_bias", "layer_scalar"
    return [x for name, x in model.named_buffers() if name.endswith(ends)]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Name -> (their model, the folder it was saved in), each made once."""
    made = {}

    def make(name):
        if name not in made:
            config = AutoConfig.for_model(
                MODELS[name][0], **settings(name), attn_implementation="eager"
            )
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            # as made, norms are one and biases zero, and an error in either would not show
            with torch.no_grad():
                for parameter in (*model.parameters(), *biases(model)):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


def tokens(n=T, seed=0):
    """Without id 1, the padding of RoBERTa, to which it gives no position."""
    ids = fa.random.randint(fa.key(seed), (n,), 0, V)
    return torch.where(ids == 1, 3, ids)


def theirs(model, ids):
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_those_of_the_original(originals, name):
    model, folder = originals(name)
    config, params, _ = load(folder)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)


WITHOUT_CACHE = {"openai-gpt"}  # in the original


@pytest.mark.parametrize("name", EACH)
def test_decoding_step_by_step_is_that_of_the_original_beyond_window_and_scaling(originals, name):
    """Chunks of 10 and then single tokens; where angles follow the length, the original reads the
    whole text each time.
    """
    model, folder = originals(name)
    config, params, _ = load(folder)
    ours, past, mine, other, cache = (
        fa.decoder(config),
        None,
        [],
        [],
        transformers.DynamicCache(config=model.config),
    )
    past = ours.cache(T)
    for piece in tokens().split([10, 10, *([1] * (T - 20))]):
        logits, past = ours.apply(params, piece, past)
        mine.append(logits)
        # the original limits the steps of a state space in passes of several tokens alone
        limited = config.step_limit[1] < math.inf
        if config.follows_length or limited or name in WITHOUT_CACHE:
            other.append(theirs(model, tokens()[: past.length])[-len(piece) :])
            continue
        options = {"past_key_values": cache, "use_cache": True}
        if name.startswith("bamba"):  # which counts positions from 0 in each call
            end = int(past.length)
            options["position_ids"] = torch.arange(end - len(piece), end)[None]
        with torch.no_grad():
            other.append(model(piece[None], **options).logits[0])
    torch.testing.assert_close(torch.cat(mine), torch.cat(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_a_saved_model_is_read_by_transformers_with_equal_logits(originals, name, tmp_path):
    model, folder = originals(name)
    config, params, _ = load(folder)
    fa.save(tmp_path / "ours", config, params)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(theirs(read, tokens()), theirs(model, tokens()), atol=2e-5, rtol=0)
    again = load(tmp_path / "ours")
    assert again.config == config
    assert fa.tree.allclose(again.params, params, atol=0, rtol=0)


# the first that says the same
SPELLED_AS_ANOTHER = {
    "mistral-full": "llama",
    "phi3": "mistral",
    "phi3-longrope": "llama",
    **dict.fromkeys(("exaone", "internlm3", "iquestcoder", "helium", "ernie4_5"), "llama"),
    "cwm": "smollm3",
    "ministral": "smollm3",
    "seed_oss": "qwen2",
    "xglm": "biogpt",
    **dict.fromkeys(("dots1", "solar_open", "hy_v3"), "glm4_moe"),
    "granitemoehybrid-rope": "granite",
    "codegen": "gptj",
    "jais2": "starcoder2",
    "falcon-serial": "starcoder2",
    "gpt_bigcode-heads": "gpt2",
    "opt": "gpt2",
    "openai-gpt": "opt",
    "sarvam_mla": "deepseek_v3",
    "apertus1p5_text": "apertus",
    "qwen3_5_moe_text": "qwen3_next",
    "sarvam_moe": "glm4_moe",
    "gpt-sw3": "gpt2",
    "phi4_multimodal": "llama",
    **dict.fromkeys(("ernie", "electra", "roberta", "camembert", "xlm-roberta"), "bert"),
    "data2vec-text": "bert",
    "big_bird": "bert",
    "megatron-bert": "xlm-roberta-xl",
    **dict.fromkeys(("plbart", "mvp", "trocr"), "bart"),
    **dict.fromkeys(("pegasus", "blenderbot"), "biogpt"),
    "bigbird_pegasus-biases": "biogpt",
    "whisper": "gpt2",
}


@pytest.mark.parametrize("name", EACH)
def test_a_model_keeps_its_family(originals, name):
    _, folder = originals(name)
    settings = json.loads((folder / "config.json").read_text())
    config = fa.families.read_config(settings)
    assert fa.families.family_for(config).name == SPELLED_AS_ANOTHER.get(
        name, settings["model_type"]
    )


@pytest.mark.parametrize("name", EACH)
def test_every_family_composes(originals, name):
    """vmap of grad is the loop, and a jvp along a direction is the gradient's product with it: in
    every family.
    """
    _, folder = originals(name)
    config, params, _ = load(folder, dtype=torch.float64)
    model = fa.decoder(config)
    batch = torch.stack([tokens(12, 1), tokens(12, 2)])

    def loss(params, ids):
        return torch.nn.functional.cross_entropy(
            model.logits(params, model.hidden(params, ids[:-1])[0]), ids[1:]
        )

    each = vmap(grad(loss), (None, 0))(params, batch)
    for row in range(2):
        one = grad(loss)(params, batch[row])
        assert fa.tree.allclose(
            fa.tree.map(lambda g, row=row: g[row], each), one, atol=1e-12, rtol=1e-9
        )
    direction = fa.tree.map(torch.ones_like, params)
    moved = jvp(lambda p: loss(p, batch[0]), (params,), (direction,))[1]
    first = grad(loss)(params, batch[0])
    wanted = sum(g.sum() for g in fa.tree.leaves(first))
    torch.testing.assert_close(moved, wanted, atol=1e-10, rtol=1e-9)


def wrapper(name, folder):
    """A model that takes images too, saved in a folder."""
    text, eyes, more = TOWERS[name]
    config = AutoConfig.for_model(name, text_config={**TEXT, **text}, vision_config=eyes, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name",
    # llama in the latter, as in llava
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("deepseek_vl"))
        for name in TOWERS
    ],
)
def test_the_text_of_a_model_of_images_is_that_of_the_original(name, tmp_path):
    """And, saved, a model of text alone with equal logits."""
    model = wrapper(name, tmp_path)
    with pytest.warns(UserWarning, match=f"is a {name}, of which the text is read"):
        config, params, _ = load(tmp_path)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    # Llama 4 does not run but with images
    model = model.language_model if name == "llama4" else model
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)
    fa.save(tmp_path / "ours", config, params)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(
        theirs(read.eval(), tokens()), theirs(model, tokens()), atol=2e-5, rtol=0
    )


@pytest.mark.slow
def test_the_text_of_gemma3n_is_read_of_the_files_of_its_wrapper(originals, tmp_path):
    model, folder = originals("gemma3n")
    shutil.copytree(folder, tmp_path / "whole")
    wrap_text(tmp_path / "whole", "gemma3n", "Gemma3nForConditionalGeneration")
    with pytest.warns(UserWarning, match="is a gemma3n, of which the text is read"):
        config, params, _ = load(tmp_path / "whole")
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)


def test_keys_that_published_files_have_of_layers_without_are_left_out(originals, tmp_path):
    """Those of layers that read the keys of others; of another layer they are an error."""
    _, folder = originals("gemma4")
    shutil.copytree(folder, tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.k_norm.weight": torch.ones(8) for i in (4, 5)}
    save_file({**tensors, **extra}, tmp_path / "more" / "model.safetensors")
    assert fa.tree.allclose(load(tmp_path / "more").params, load(folder).params, atol=0, rtol=0)
    extra = {"model.layers.3.self_attn.v_norm.weight": torch.ones(8)}
    save_file({**tensors, **extra}, tmp_path / "more" / "model.safetensors")
    with pytest.raises(fa.families.CheckpointError, match="v_norm"):
        load(tmp_path / "more")


def test_heads_of_far_layers_are_read_of_older_files_too(originals):
    """By `global_head_dim`, where a file has no `per_layer_config`."""
    _, folder = originals("gemma4-experts")
    settings = json.loads((folder / "config.json").read_text())
    older = {**settings, "per_layer_config": None, "global_head_dim": 12}
    older["num_global_key_value_heads"] = 1
    wanted = fa.families.read_config(settings)
    assert fa.families.read_config(older) == wanted
    assert (wanted.head_size, wanted.local_head_size, wanted.kv_heads) == (12, 8, 1)
    odd = {**settings, "per_layer_config": {"0": {"head_dim": 12}}}
    for given in (odd["per_layer_config"], {"1": {"head_dim": 12}}, {"1": 3}, [], "x"):
        with pytest.raises(fa.families.CheckpointError, match="per_layer_config in config"):
            fa.families.read_config({**settings, "per_layer_config": given})


def test_what_is_neither_text_nor_known_of_images_is_refused_by_name(tmp_path):
    wrapper("llava", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="the text is read"),
        pytest.raises(fa.families.CheckpointError, match=r"unknown: audio_tower\.weight"),
    ):
        load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(fa.families.CheckpointError, match=r"text_scale in config\.json"):
        fa.families.read_config({**settings, "text_scale": 2.0})


def test_experts_are_read_in_either_order_of_their_axes(tmp_path):
    model = wrapper("qwen3_vl_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {
        name: x.mT.contiguous() if ".mlp.experts." in name else x for name, x in tensors.items()
    }
    save_file(turned, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="the text is read"):
        config, params, _ = load(tmp_path)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)


def test_a_router_with_a_bias_for_the_choice_is_computed_in_float32(originals):
    """In bfloat16, where its rounding would choose other experts: as in the original."""
    model, folder = originals("glm4_moe")
    config, params, _ = load(folder, dtype=torch.bfloat16)
    layer = params.layers[1]
    assert (layer.choice_bias.dtype, layer.router.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(layer.choice_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    seen = {}

    def listen(name, x):
        seen[name] = x.dtype
        return x

    with fa.taps.listening(listen):
        fa.decoder(config).hidden(params, tokens())
    assert seen["layers.1.feed_forward.router"] == torch.float32
    assert seen["layers.1.output"] == torch.bfloat16


@pytest.mark.parametrize(("name", "layer"), [("deepseek_v3", 61), ("glm4_moe", 92)])
def test_layers_that_predict_a_second_token_are_left_out(originals, tmp_path, name, layer):
    """Those behind the last of the published models; other layers too many are an error."""
    _, folder = originals(name)
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    more = {f"model.layers.{layer}.eh_proj.weight": torch.ones(2, 2)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    assert fa.tree.allclose(load(tmp_path).params, load(folder).params, atol=0, rtol=0)
    more = {f"model.layers.{layer - 1}.eh_proj.weight": torch.ones(2, 2)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    with pytest.raises(fa.families.CheckpointError, match="eh_proj"):
        load(tmp_path)
