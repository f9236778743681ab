"""register_transformers: tiny random models of transformers against their own attention, and under transforms."""

import pytest
import torch
import transformers
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcattn as fa
from funcattn.interop import functional, huggingface, override_sdpa, register_transformers, sdpa

EXACT = 1e-10  # float64: two layers of sums of some hundred products, at up to two orders of derivative
T = 20
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}
IDS = fa.random.randint(fa.key(0), (2, T), 1, 50)
PADDING = (torch.arange(T) >= torch.tensor([[0], [5]])).long()  # the second row begins with five pads


def build(family, implementation, **options):
    register_transformers()
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**SIZES, **FAMILIES.get(family, {}), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
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
        monkeypatch.setattr(module, name, lambda *args, ours=ours, **options: seen.append(args) or ours(*args, **options))
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
        logits = apply(params, input_ids=ids.unsqueeze(0), attention_mask=None if padding is None else padding.unsqueeze(0)).logits
        each = logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        return -(each if padding is None else each * padding[:-1]).mean()

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_registered_model_gives_the_logits_of_sdpa(family, calls):
    theirs, ours = build(family, "sdpa"), build(family, "funcattn")
    close(ours(IDS).logits, theirs(IDS).logits)
    keep = PADDING.unsqueeze(-1)
    close(ours(IDS, attention_mask=PADDING).logits * keep, theirs(IDS, attention_mask=PADDING).logits * keep)
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
    close(ours.float()(IDS).logits, theirs.float()(IDS).logits, 1e-5)  # transformers' experts know no float64
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
    each = lambda f: torch.stack([f(ids, padding) for ids, padding in zip(IDS, PADDING, strict=True)])
    f = lambda ids, padding: loss(apply)(params, ids, padding)
    close(vmap(f)(IDS, PADDING), each(f))
    gradient = lambda ids, padding: grad(loss(apply))(params, ids, padding)["lm_head.weight"]
    close(vmap(gradient)(IDS, PADDING), each(gradient))


def test_without_registering_such_a_vmap_still_stops_inside_transformers():
    """The day this passes, docs/gotchas.md has a section too many."""
    apply, params = functional(build("llama", "sdpa"))
    with override_sdpa(), pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(lambda ids, padding: loss(apply)(params, ids, padding))(IDS, PADDING)


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
    gradients = lambda: torch.autograd.grad(model(IDS, use_cache=False).logits.sin().sum(), tuple(model.parameters()))
    wanted = gradients()
    model.activation_checkpointing_enable()
    with override_sdpa():
        close(gradients(), wanted)
    assert len(calls) == 2 * 2


def test_the_soft_cap_of_gemma_is_kept_under_derivatives(calls):
    options = {"sliding_window": 4, "attn_logit_softcapping": 0.01}
    theirs, ours = build("gemma2", "eager", **options), build("gemma2", "funcattn", **options)
    rounding = 1e-6  # transformers' own softmax is in float32, whatever the model
    close(ours(IDS, attention_mask=PADDING).logits[0], theirs(IDS, attention_mask=PADDING).logits[0], rounding)
    assert len(calls) == 2
    close(derivatives(ours, None), derivatives(theirs, None), rounding)
    assert (build("gemma2", "funcattn", sliding_window=4)(IDS).logits - ours(IDS).logits).abs().max() > 100 * rounding


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
    out = lambda mask, **options: huggingface._attend(torch.nn.Module(), q, q, q, mask, position_bias=bias, **options)[0]
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
