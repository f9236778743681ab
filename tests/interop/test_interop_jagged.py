"""Jagged attention: each document as if it were alone, at the cost of each document alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp

import funcattn as fa
from funcattn.interop import document_mask, nested_attention, override_sdpa, sdpa
from funcattn.kernels.backends import masking, torch_blocks

pytestmark = [
    # torch says so at their first use
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.real(
        "torch's own attention of nested tensors aborts the process elsewhere than on "
        "a CPU or a GPU"
    ),
]

EXACT = 1e-12  # float64: sums of some ten products
H, D = 4, 3
LENGTHS = [3, 1, 0, 20]


def normal(number: int, *shape: int) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape, dtype=torch.float64)


def pack(parts):
    """Documents (H, n, D) as one jagged tensor (B, H, j, D)."""
    values = torch.cat([part.transpose(0, 1) for part in parts])
    offsets = torch.tensor([0] + [part.shape[1] for part in parts]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


def documents(number, lengths, heads=H):
    return [normal(number + 10 * i, heads, n, D) for i, n in enumerate(lengths)]


def close(found, wanted, tolerance=EXACT):
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert not x.numel() or (x - y).abs().max() <= tolerance * (1 + y.abs().max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("keys", "heads"),
    [(LENGTHS, H), (LENGTHS, 2), ([2, 5, 3, 0], 1)],
    ids=["self", "grouped", "cross"],
)
def test_jagged_attention_is_attention_of_each_document(keys, heads, causal):
    q, k, v = documents(1, LENGTHS), documents(2, keys, heads), documents(3, keys, heads)
    alone = lambda q, k, v: fa.attention(
        q, k, v, fa.masks.causal(q.shape[1], k.shape[1]) if causal else None, scale=0.7
    )
    out = nested_attention(pack(q), pack(k), pack(v), causal=causal, scale=0.7)
    close(out.unbind(), [alone(*x) for x in zip(q, k, v, strict=True)])


def test_the_output_is_as_ragged_as_the_queries():
    q, k = pack(documents(1, [2, 4])), pack(documents(2, [3, 1]))
    out = q + nested_attention(q, k, k)
    assert out.transpose(1, 2).flatten(-2).unbind()[1].shape == (4, H * D)


def test_training_gives_the_gradients_of_each_document():
    parts = [x.requires_grad_() for x in documents(1, LENGTHS)]
    alone = sum(fa.attention(x, x, x, fa.masks.causal(x.shape[1])).sin().sum() for x in parts)
    wanted = torch.autograd.grad(alone, parts)
    x = pack(parts)
    close(
        torch.autograd.grad(nested_attention(x, x, x, causal=True).values().sin().sum(), parts),
        wanted,
    )


def test_a_nested_leaf_has_a_nested_gradient():
    x = torch.nested.nested_tensor(
        [normal(1, n, H, D) for n in (3, 5)], layout=torch.jagged, requires_grad=True
    )
    heads = x.transpose(1, 2)
    (found,) = torch.autograd.grad(nested_attention(heads, heads, heads).values().sin().sum(), x)
    (wanted,) = torch.autograd.grad(
        F.scaled_dot_product_attention(heads, heads, heads).values().sin().sum(), x
    )
    close(found.unbind(), wanted.unbind())


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_own_function_takes_jagged_tensors_inside_the_override(causal, monkeypatch):
    seen = []
    ours = sdpa.nested_attention
    monkeypatch.setattr(
        sdpa,
        "nested_attention",
        lambda *args, **options: seen.append(args) or ours(*args, **options),
    )
    x = pack(documents(1, LENGTHS))
    with override_sdpa():
        found = F.scaled_dot_product_attention(x, x, x, is_causal=causal)
    close(found.unbind(), nested_attention(x, x, x, causal=causal).unbind(), 0)
    assert len(seen) == 1
    with (
        override_sdpa(),
        pytest.raises(ValueError, match="attn_mask should be None for nested tensors"),
    ):
        F.scaled_dot_product_attention(x, x, x, torch.ones(1, 1))


def test_dropout_follows_the_key():
    x = pack(documents(1, [40, 30]))
    with override_sdpa(key=fa.key(0)):
        found = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    close(
        found.unbind(),
        nested_attention(x, x, x, dropout=0.5, key=fa.fold_in(fa.key(0), 0)).unbind(),
        0,
    )
    assert not torch.equal(found.values(), nested_attention(x, x, x).values())


@pytest.mark.parametrize("causal", [False, True])
def test_documents_cut_out_of_a_padded_batch_need_no_copy(causal):
    rows, begin, lengths = normal(1, 3, 6, H, D), torch.tensor([0, 1, 2]), torch.tensor([3, 5, 2])
    x = torch.nested.narrow(rows, 1, begin, lengths, layout=torch.jagged).transpose(1, 2)
    parts = [
        rows[i, s : s + n].transpose(0, 1)
        for i, (s, n) in enumerate(zip(begin.tolist(), lengths.tolist(), strict=True))
    ]
    alone = [
        fa.attention(part, part, part, fa.masks.causal(part.shape[1]) if causal else None)
        for part in parts
    ]
    close(nested_attention(x, x, x, causal=causal).unbind(), alone)


def test_the_values_under_the_mask_go_through_every_transform():
    x = pack(documents(1, LENGTHS))
    mask = document_mask(x, x, causal=True)
    f = lambda values: fa.attention(values, values, values, mask)
    values, tangent = x.values(), normal(9, *x.values().shape)
    close([f(values)], [nested_attention(x, x, x, causal=True).values()], 0)
    hvp = lambda f: jvp(grad(lambda values: f(values).sin().sum()), (values,), (tangent,))[1]
    apart = lambda values: torch.cat(
        [fa.attention(y, y, y, fa.masks.causal(y.shape[1])) for y in values.split(LENGTHS, 1)], 1
    )
    close([hvp(f)], [hvp(apart)])


def test_the_cost_is_that_of_each_document(monkeypatch):
    """Twice as many documents of a length are twice as many pairs of a query and a key, forward and
    backward.
    """
    pairs = []
    walk = masking.Blocks.walk

    def counting(self):
        for line, columns in walk(self):
            pairs.append(
                (line.stop - line.start) * sum(column.stop - column.start for column, _ in columns)
            )
            yield line, columns

    monkeypatch.setattr(masking.Blocks, "walk", counting)
    monkeypatch.setattr(torch_blocks, "KEYS", 16)

    def cost(n):
        pairs.clear()
        x = pack(documents(1, [32] * n)).detach().requires_grad_()
        torch.autograd.grad(nested_attention(x, x, x).values().sum(), x)
        return sum(pairs)

    assert cost(16) <= 2.2 * cost(8)
    # one pass over all pairs; forward and backward are two or more
    assert cost(16) < (16 * 32) ** 2


def test_it_compiles_whole():
    x = pack(documents(1, [3, 20]))
    found = torch.compile(
        lambda x: nested_attention(x, x, x, causal=True), backend="aot_eager", fullgraph=True
    )(x)
    close(found.unbind(), nested_attention(x, x, x, causal=True).unbind())


def test_what_is_not_jagged_is_a_clear_error():
    x = pack(documents(1, [2, 3]))
    with pytest.raises(
        TypeError, match="nested_attention: q should be a jagged NestedTensor, got a dense tensor"
    ):
        nested_attention(normal(1, 2, H, 3, D), x, x)
    strided = torch.nested.nested_tensor([normal(1, H, 2, D), normal(2, H, 3, D)])
    with override_sdpa(), pytest.raises(TypeError, match="got a nested tensor of layout"):
        F.scaled_dot_product_attention(strided, strided, strided)
    with pytest.raises(
        ValueError,
        match=r"k should be .* got 4 axes, ragged at 1\. Bring the heads before the tokens",
    ):
        nested_attention(x, x.transpose(1, 2), x)
    with pytest.raises(ValueError, match=r"of as many documents each, got \[2, 3, 3\]"):
        nested_attention(x, *[pack(documents(1, [2, 3, 1]))] * 2)
    with pytest.raises(ValueError, match="v should be as ragged as k"):
        nested_attention(x, x, pack(documents(1, [3, 2])))
    with pytest.raises(
        TypeError,
        match=r"under torch.func, call attention of its values with interop.document_mask",
    ):
        grad(
            lambda values: nested_attention(
                *[torch.nested.nested_tensor_from_jagged(values, x.offsets()).transpose(1, 2)] * 3
            ).sum()
        )(x.values().transpose(0, 1).contiguous())
