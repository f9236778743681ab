"""The override in float32 and bfloat16 on the native kernel: PyTorch's samples, jagged tensors, modules of torch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcattn as fa
from funcattn import native
from funcattn.interop import nested_attention, override_sdpa

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=native.load()),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.real("it runs on CPUs alone"),
]
DTYPES = [torch.float32, torch.bfloat16]
LOGITS = 4 * 229  # as in test_interop.py
# A gradient of q or k has g . out subtracted, of g and out in the dtype of the values: eps / 2 of
# each of 8 products of up to 9 for either, times a scale of 1 / sqrt(8), times a key of up to 9.
CANCELLED = 2 * 8 * 9 / 2 / 8**0.5 * 9


@pytest.fixture
def passes(monkeypatch):
    """How often the C++ operators ran, for the equality of numbers alone proves nothing."""
    seen = []
    count = lambda f, name: lambda *args: (seen.append(name), f(*args))[1]
    operators = torch.ops.funcattn
    monkeypatch.setattr(operators, "native_attend", count(operators.native_attend, "attend"))
    monkeypatch.setattr(operators, "native_contract", count(operators.native_contract, "contract"))
    return seen


# The gradient of attention is four dot products that follow each other, each a sum of at most 32
# numbers here (features, or keys), and a sum of n is off by at most n eps / 2 of the sum of sizes.
ROUNDING = 4 * 32 / 2 * torch.finfo(torch.float32).eps


def near(found, wanted, far):
    for x, y in zip(found, wanted, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert not x.numel() or (x.double() - y.double()).abs().max() <= far * (
            1 + y.double().abs().max()
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_samples_of_pytorch_pass_with_gradients(dtype, passes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    op = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = [
        x
        for x in op.sample_inputs("cpu", dtype, requires_grad=True)
        if not x.kwargs.get("dropout_p")
    ]
    assert len(samples) >= 12
    for sample in samples:
        mask = sample.kwargs.get("attn_mask")
        tensors = [sample.input, *sample.args, *(() if mask is None else (mask,))]
        f = lambda x, s=sample: op(*x[:3], **s.kwargs | ({"attn_mask": x[3]} if len(x) > 3 else {}))
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        wanted = f(exact)
        gradients = torch.autograd.grad(wanted.sin().sum(), exact)
        before = len(passes)
        with fa.kernels.use("native"), override_sdpa():
            found = f(tensors)
            mine = torch.autograd.grad(found.sin().sum(), tensors)
        assert {"attend", "contract"} <= set(passes[before:])
        narrow = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        far = LOGITS * torch.finfo(torch.float32).eps + 8 * narrow
        near([found], [wanted.to(dtype)], far)
        near(mine, [x.to(dtype) for x in gradients], far + CANCELLED * narrow)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("keys", "heads"),
    [([3, 1, 0, 20], 4), ([3, 1, 0, 20], 2), ([2, 5, 3, 0], 1)],
    ids=["self", "grouped", "cross"],
)
def test_jagged_attention_is_attention_of_each_document(keys, heads, causal, passes):
    part = lambda n, heads, size: fa.random.normal(
        fa.key(n), (heads, size, 3), torch.float32
    ).requires_grad_()
    q, k, v = (
        [part(10 * i + j, H, n) for i, n in enumerate(sizes)]
        for j, H, sizes in ((1, 4, [3, 1, 0, 20]), (2, heads, keys), (3, heads, keys))
    )

    def pack(parts):
        offsets = torch.tensor([0] + [x.shape[1] for x in parts]).cumsum(0)
        return torch.nested.nested_tensor_from_jagged(
            torch.cat([x.transpose(0, 1) for x in parts]), offsets
        ).transpose(1, 2)

    alone = lambda q, k, v: fa.attention(
        q,
        k,
        v,
        fa.masks.causal(q.shape[1], k.shape[1]) if causal else None,
        scale=0.7,
        kernel="reference",
    )
    wanted = [alone(*(x.double() for x in one)) for one in zip(q, k, v, strict=True)]
    with fa.kernels.use("native"):
        out = nested_attention(pack(q), pack(k), pack(v), causal=causal, scale=0.7)
        near(out.unbind(), [x.float() for x in wanted], ROUNDING)
        found = torch.autograd.grad(out.values().sin().sum(), [*q, *k, *v])
    gradients = torch.autograd.grad(sum(x.sin().sum() for x in wanted), [*q, *k, *v])
    near(found, gradients, ROUNDING)
    assert {"attend", "contract"} <= set(passes)


E, B, T = 16, 2, 6
PADDED = torch.arange(T) >= torch.tensor([[T], [4]])
MODULES = {
    "self-attention": (
        lambda: nn.MultiheadAttention(E, 2, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "padded": (
        lambda: nn.MultiheadAttention(E, 2, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=PADDED)[0],
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(E, 2, 32, dropout=0.0, batch_first=True),
        lambda m, x: m(
            x,
            src_mask=nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype),
            is_causal=True,
        ),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "call"), MODULES.values(), ids=MODULES)
def test_modules_of_torch_are_those_without_the_override(make, call, dtype, passes):
    torch.manual_seed(0)
    module = make().to(dtype)
    x = fa.random.normal(fa.key(1), (B, T, E), torch.float32).to(dtype).requires_grad_()
    learned = [x, *module.parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = call(module, x)
        gradients = torch.autograd.grad(wanted.sin().sum(), learned)
    with fa.kernels.use("native"), override_sdpa():
        found = call(module, x)
        mine = torch.autograd.grad(found.sin().sum(), learned)
    assert {"attend", "contract"} <= set(passes)
    far = ROUNDING if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    near([found, *mine], [wanted, *gradients], far)


def test_torchs_own_function_on_jagged_tensors_is_near_the_override_by_default():
    x = torch.nested.nested_tensor(
        [torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (40, 3)],
        layout=torch.jagged,
    )
    heads = x.transpose(1, 2)
    wanted = F.scaled_dot_product_attention(heads, heads, heads)
    with override_sdpa():
        found = F.scaled_dot_product_attention(heads, heads, heads)
    near(found.unbind(), wanted.unbind(), ROUNDING)
