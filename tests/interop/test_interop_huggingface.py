"""register_transformers: tiny random models of transformers against their own attention, and under
transforms.
"""

import pytest
import torch
import transformers
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcattn as fa
from funcattn.interop import functional, huggingface, override_sdpa, register_transformers, sdpa

# float64: two layers of sums of some hundred products, at up to two orders of derivative
EXACT = 1e-10
T = 20
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}
IDS = fa.random.randint(fa.key(0), (2, T), 1, 50)
# the second row begins with five pads
PADDING = (torch.arange(T) >= torch.tensor([[0], [5]])).long()


def build(family, implementation, **options):
    register_transformers()
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**SIZES, **FAMILIES.get(family, {}), **options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    assert model.config._attn_implementation == implementation
    return model.double().eval()


@pytest.fixture
def calls(monkeypatch):
    """How often our attention was called from either door, one entry a call."""
    seen = []
    for module, name in (
        (sdpa, "attention"),
        (huggingface, "attention"),
        (huggingface, "attend"),
        (huggingface, "attention_with_score"),
    ):
        ours = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, ours=ours, **options: seen.append(args) or ours(*args, **options),
        )
    return seen


def close(found, wanted, tolerance=EXACT):
    found, wanted = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted)
    assert len(found) == len(wanted) > 0
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())


def loss(apply):
    """The negative log-likelihood of one sequence, as a function of params."""

    def of(params, ids, padding):
        logits = apply(
            params,
            input_ids=ids.unsqueeze(0),
            attention_mask=None if padding is None else padding.unsqueeze(0),
        ).logits
        each = logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        return -(each if padding is None else each * padding[:-1]).mean()

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_registered_model_gives_the_logits_of_sdpa(family, calls):
    theirs, ours = build(family, "sdpa"), build(family, "funcattn")
    close(ours(IDS).logits, theirs(IDS).logits)
    keep = PADDING.unsqueeze(-1)
    close(
        ours(IDS, attention_mask=PADDING).logits * keep,
        theirs(IDS, attention_mask=PADDING).logits * keep,
    )
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_registered_model_generates_what_sdpa_generates(family, calls):
    theirs, ours = build(family, "sdpa"), build(family, "funcattn")
    options = {"attention_mask": PADDING, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))
    assert len(calls) == 5 * 2


def test_the_sinks_of_gpt_oss_are_one_more_logit(calls):
    options = {"num_local_experts": 4, "sliding_window": 4}
    theirs, ours = build("gpt_oss", "eager", **options), build("gpt_oss", "funcattn", **options)
    for model in (theirs, ours):
        for block in model.model.layers:
            block.self_attn.sinks.data = torch.linspace(-1, 2, 4, dtype=torch.float64)
    # transformers' experts know no float64
    close(ours.float()(IDS).logits, theirs.float()(IDS).logits, 1e-5)
    assert len(calls) == 2


def derivatives(model, padding):
    apply, params = functional(model)
    tangents = {name: torch.full_like(p, 0.1) for name, p in params.items()}
    f = lambda params: loss(apply)(params, IDS[1], padding)
    return grad(f)(params), jvp(f, (params,), (tangents,)), jvp(grad(f), (params,), (tangents,))[1]


@pytest.mark.parametrize("padding", [None, PADDING[1]], ids=["whole", "padded"])
def test_models_have_every_derivative_when_registered_and_when_overridden(padding, calls):
    with sdpa_kernel(SDPBackend.MATH):
        wanted = derivatives(build("llama", "sdpa"), padding)
    assert not calls
    close(derivatives(build("llama", "funcattn"), padding), wanted)
    with override_sdpa():
        close(derivatives(build("llama", "sdpa"), padding), wanted)
    assert len(calls) == 2 * 3 * 2


def test_a_vmap_of_a_registered_model_takes_a_mask_for_each_row():
    apply, params = functional(build("llama", "funcattn"))
    each = lambda f: torch.stack(
        [f(ids, padding) for ids, padding in zip(IDS, PADDING, strict=True)]
    )
    f = lambda ids, padding: loss(apply)(params, ids, padding)
    close(vmap(f)(IDS, PADDING), each(f))
    gradient = lambda ids, padding: grad(loss(apply))(params, ids, padding)["lm_head.weight"]
    close(vmap(gradient)(IDS, PADDING), each(gradient))


def test_outside_of_the_override_such_a_vmap_still_stops_inside_transformers():
    """The day this passes, docs/gotchas.md has a section too many."""
    apply, params = functional(build("llama", "sdpa"))
    f = lambda ids, padding: loss(apply)(params, ids, padding)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(f)(IDS, PADDING)
    with override_sdpa():
        close(vmap(f)(IDS, PADDING), torch.stack([f(*x) for x in zip(IDS, PADDING, strict=True)]))


def test_tied_embeddings_are_one_entry_of_the_params():
    _, params = functional(build("llama", "funcattn", tie_word_embeddings=True))
    assert "lm_head.weight" not in params
    assert "model.embed_tokens.weight" in params


def test_dropout_takes_its_key_from_the_override():
    model = build("gpt2", "funcattn", attn_pdrop=0.5, embd_pdrop=0.0, resid_pdrop=0.0).train()
    with pytest.raises(ValueError, match=r"override_sdpa\(key=fa.key\(0\)\)"):
        model(IDS)
    runs = []
    for seed in (0, 0, 1):
        with override_sdpa(key=fa.key(seed)):
            runs.append(model(IDS).logits)
    close(runs[0], runs[1], 0)
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], model.eval()(IDS).logits)


def test_gradient_checkpointing_trains_inside_the_override(calls):
    model = build("llama", "sdpa").train()
    gradients = lambda: torch.autograd.grad(
        model(IDS, use_cache=False).logits.sin().sum(), tuple(model.parameters())
    )
    wanted = gradients()
    model.activation_checkpointing_enable()
    with override_sdpa():
        close(gradients(), wanted)
    assert len(calls) == 2 * 2


def test_the_soft_cap_of_gemma_is_kept_under_derivatives(calls):
    options = {"sliding_window": 4, "attn_logit_softcapping": 0.01}
    theirs, ours = build("gemma2", "eager", **options), build("gemma2", "funcattn", **options)
    rounding = 1e-6  # transformers' own softmax is in float32, whatever the model
    close(
        ours(IDS, attention_mask=PADDING).logits[0],
        theirs(IDS, attention_mask=PADDING).logits[0],
        rounding,
    )
    assert len(calls) == 2
    close(derivatives(ours, None), derivatives(theirs, None), rounding)
    assert (
        build("gemma2", "funcattn", sliding_window=4)(IDS).logits - ours(IDS).logits
    ).abs().max() > 100 * rounding


def test_what_no_kernel_does_is_refused_by_name():
    q = torch.ones(2, 4, 5, 8)
    f = lambda *args, **options: huggingface._attend(torch.nn.Module(), q, q, q, *args, **options)
    with pytest.raises(ValueError, match="attention_mask should be of booleans with a soft cap"):
        f(torch.zeros(2, 1, 5, 5), softcap=1.0)
    with pytest.raises(ValueError, match="dropout should be 0 with sinks or a soft cap"):
        f(None, softcap=1.0, dropout=0.5)
    with pytest.raises(ValueError, match="cache should be None, got a paged cache"):
        f(None, cache=object())


def test_a_bias_of_positions_joins_the_mask():
    q, bias = fa.random.normal(fa.key(1), (2, 4, 5, 8)), fa.random.normal(fa.key(2), (1, 4, 5, 5))
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    out = lambda mask, **options: huggingface._attend(
        torch.nn.Module(), q, q, q, mask, position_bias=bias, **options
    )[0]
    wanted = fa.attention(q, q, q, seen, bias=bias).transpose(1, 2)
    hidden = torch.zeros(2, 1, 5, 5).masked_fill(~seen, float("-inf"))
    for found in (out(seen), out(None), out(hidden)):
        close(found, wanted, 1e-6)
    close(out(None, is_causal=False), fa.attention(q, q, q, bias=bias).transpose(1, 2), 1e-6)


def test_a_registered_model_compiles_whole(calls):
    model = build("llama", "funcattn")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS, attention_mask=PADDING, use_cache=False).logits
    assert len(calls) == 2
    close(found, model(IDS, attention_mask=PADDING, use_cache=False).logits)


def attentions(output):
    return {name: value for name, value in output.items() if "attentions" in name}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "bart"])
def test_attention_weights_are_those_of_eager(family):
    """GPT-2 does not pass output_attentions on to its attention; Gemma 2 caps logits, gpt-oss has
    sinks, BART attends across.
    """
    options = {
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
        "gemma2": {"sliding_window": 4},
    }.get(family, {})
    sizes = SIZES | FAMILIES.get(family, {}) | options
    if family == "bart":
        sizes = {
            "d_model": 32,
            "vocab_size": 50,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        }
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    register_transformers()

    def output(implementation):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[family](**sizes)
        kind = transformers.AutoModel if family == "bart" else transformers.AutoModelForCausalLM
        # in float32, as their experts want
        model = kind.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            return model(input_ids=IDS, attention_mask=None, output_attentions=True)

    wanted, found = attentions(output("eager")), attentions(output("funcattn"))
    assert {name: len(value) for name, value in found.items()} == {
        name: len(value) for name, value in wanted.items()
    }
    assert any(wanted.values())
    for name in wanted:
        if wanted[name]:
            close(found[name], wanted[name], 1e-5)


def test_weights_are_not_made_where_they_are_not_asked_for():
    q = torch.ones(1, 2, 3, 4)
    assert huggingface._attend(torch.nn.Module(), q, q, q, None)[1] is None
    assert huggingface._attend(torch.nn.Module(), q, q, q, None, output_attentions=True)[
        1
    ].shape == (1, 2, 3, 3)


def test_an_option_that_is_not_read_is_refused_by_name():
    q = torch.ones(2, 4, 5, 8)
    f = lambda *args, **options: huggingface._attend(torch.nn.Module(), q, q, q, *args, **options)
    for name in ("head_mask", "block_indices", "alibi", "made_up"):
        with pytest.raises(ValueError, match=f"{name} should be None, since nothing here reads it"):
            f(None, **{name: torch.ones(4)})
        f(None, **{name: None})
    with pytest.raises(ValueError, match="sliding_window should be at least 5"):
        f(None, sliding_window=3)
    f(None, sliding_window=5)
    f(torch.ones(5, 5, dtype=torch.bool), sliding_window=3)  # which the mask says
    with pytest.raises(ValueError, match="in a batch of one, got a batch of 2"):
        f(None, cu_seq_lens_q=torch.tensor([0, 5]), cu_seq_lens_k=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="seq_idx should be"):
        f(None, seq_idx=torch.zeros(2, 4))


def test_what_the_loss_reads_passes_through_attention():
    options = {"labels": IDS, "shift_labels": IDS.roll(-1, -1), "ignore_index": 7}
    wanted = build("llama", "sdpa")(input_ids=IDS, **options).loss
    close(build("llama", "funcattn")(input_ids=IDS, **options).loss, wanted, 1e-6)  # in float32

    model = build("llama", "funcattn")
    seen = {}
    model.loss_function = lambda logits, labels, **others: seen.update(others) or logits.sum()
    model(input_ids=IDS, labels=IDS, example_weight=torch.ones(2), shift_loss_mask=IDS > 0)
    assert {"example_weight", "shift_loss_mask"} <= seen.keys()


def test_packed_documents_do_not_see_each_other():
    q, k, v = (fa.random.normal(key, (1, 4, 7, 8)) for key in fa.split(fa.key(0), 3))
    f = lambda mask, **options: huggingface._attend(torch.nn.Module(), q, k, v, mask, **options)[0]
    parts = [slice(0, 3), slice(3, 7)]
    wanted = torch.cat(
        [
            fa.attention(q[:, :, s], k[:, :, s], v[:, :, s], fa.masks.causal(s.stop - s.start))
            for s in parts
        ],
        -2,
    )
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    triangle = torch.ones(7, 7, dtype=torch.bool).tril()
    hidden = torch.zeros(7, 7).masked_fill(~triangle, float("-inf"))
    for mask in (None, triangle, hidden):
        packed = f(mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=4, max_length_k=4)
        close(packed, wanted.transpose(1, 2), 1e-6)
        close(f(mask, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]])), wanted.transpose(1, 2), 1e-6)


def test_a_sparse_query_sees_the_keys_that_indices_choose():
    """DeepSeek 3.2 puts them into the mask for "eager" and "sdpa", and leaves every other
    implementation to read them.
    """
    q = fa.random.normal(fa.key(0), (1, 2, 5, 8))
    indices = torch.tensor([[[0, -1], [0, 1], [0, 2], [1, 3], [4, 0]]])
    seen = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    ).bool()
    for mask in (None, torch.ones(5, 5, dtype=torch.bool).tril(), torch.zeros(5, 5)):
        found = huggingface._attend(torch.nn.Module(), q, q, q, mask, indices=indices)[0]
        close(found, fa.attention(q, q, q, seen).transpose(1, 2), 1e-6)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
    }
    sizes |= {
        "v_head_dim": 4,
        "first_k_dense_replace": 1,
        "index_topk": 3,
        "index_n_heads": 2,
        "index_head_dim": 8,
    }

    def logits(implementation):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING["deepseek_v32"](**sizes)
        with torch.no_grad():
            return (
                transformers.AutoModelForCausalLM.from_config(
                    config, attn_implementation=implementation
                )
                .eval()(IDS)
                .logits
            )

    register_transformers()
    close(logits("funcattn"), logits("eager"), 1e-5)


def test_sinks_of_each_query_are_one_more_logit():
    q, sinks = fa.random.normal(fa.key(0), (1, 2, 5, 8)), fa.random.normal(fa.key(1), (1, 2, 5, 1))
    found, weights = huggingface._attend(
        torch.nn.Module(), q, q, q, None, sinks=sinks, is_causal=False, output_attentions=True
    )
    wanted = torch.cat([q @ q.mT / 8**0.5, sinks], -1).softmax(-1)[..., :-1]
    close(weights, wanted, 1e-6)
    close(found, (wanted @ q).transpose(1, 2), 1e-6)
