"""Two Llama-shaped models for the tests of other people's tools, and the ways to run each.

By hand: a module around F.scaled_dot_product_attention. By transformers: LlamaForCausalLM, by its
attn_implementation. Both have RMSNorm, grouped heads and a gate of silu, in float64; a shop is one
of the two. A product is a function of a model, what a tool computes of it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcattn as fa
from funcattn.interop import closed, register_transformers

VOCABULARY, WIDTH, HEADS, HEAD = 11, 8, 2, 4
EXACT = 1e-10  # float64: two layers of sums of some ten products, at up to two orders of derivative
# The eager attention of transformers rounds its softmax to float32, 2^-24 = 6e-8 of each weight; two
# layers at two orders of derivative, with some hundred such roundings between a weight and a number.
EAGER = 1e-5
# with which torch's own attention raises
NO_JVP = "forward AD with _scaled_dot_product"
NO_SECOND = "derivative for aten::_scaled_dot_product"

# Texts of six tokens. Token 0 is transformers' padding.
TRAIN = fa.random.randint(fa.key(0), (4, 6), 1, VOCABULARY)
TEST = fa.random.randint(fa.key(1), (3, 6), 1, VOCABULARY)
CLASSES = torch.tensor([0, 1, 2, 1])  # of TRAIN


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = Norm(), Norm()
        self.q, self.o = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, HEAD, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (
            weight(y).unflatten(-1, (-1, HEAD)).transpose(-3, -2)
            for weight in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(-3, -2).flatten(-2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ByHand(nn.Module):
    """Tokens (*lead, T) -> logits (*lead, T, V)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class OfTransformers(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), of the LlamaForCausalLM in `model`."""

    def __init__(self, implementation: str):
        super().__init__()
        register_transformers()
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            head_dim=HEAD,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=False,
            attn_implementation=implementation,
        )
        self.model = transformers.LlamaForCausalLM(config)

    @property
    def embedding(self) -> nn.Module:
        return self.model.model.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


class Classifier(nn.Module):
    """Tokens (B, T) -> logits (B, 3) of three classes: the first of the last position's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, -1, :3]


class Route(NamedTuple):
    """How a model is made, and a context to run a tool in."""

    build: Callable[[], nn.Module]
    context: Callable[[], contextlib.AbstractContextManager[Any]]


def _transformers(implementation: str) -> Callable[[], nn.Module]:
    return lambda: OfTransformers(implementation)


SHOPS = ("by hand", "transformers")
DENSE = {  # torch's dense attention: every derivative, T x T numbers
    "by hand": Route(ByHand, lambda: sdpa_kernel(SDPBackend.MATH)),
    "transformers": Route(_transformers("sdpa"), lambda: sdpa_kernel(SDPBackend.MATH)),
}
DOCUMENTED = Route(_transformers("eager"), contextlib.nullcontext)
STOCK = {
    "by hand": Route(ByHand, contextlib.nullcontext),
    "transformers": Route(_transformers("sdpa"), contextlib.nullcontext),
}
CLOSED = {
    "by hand": Route(ByHand, closed),
    "transformers": Route(_transformers("sdpa"), closed),
}
REGISTERED = Route(_transformers("funcattn"), contextlib.nullcontext)
REGISTERED_AND_CLOSED = Route(_transformers("funcattn"), closed)


def run(product: Callable[[nn.Module], Tensor], route: Route) -> Tensor:
    """A product by a route, with the same weights and state of torch's generator each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = route.build().eval()
            torch.manual_seed(1)
            with route.context():
                return product(model).detach()
    finally:
        torch.set_default_dtype(before)


def same(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    """Both are of one shape, finite, not zero, and near each other."""
    assert found.shape == wanted.shape
    assert 0 < wanted.abs().max() < torch.inf
    assert (found - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


def hold(product: Callable[[nn.Module], Tensor], shop: str, *, stock: str | None) -> None:
    """A product by our routes is the dense one, and the one of eager attention, as a tool's pages
    advise.

    stock: the message with which torch's own attention raises, or None where it has that product.
    """
    wanted = run(product, DENSE[shop])
    same(run(product, CLOSED[shop]), wanted)
    if shop == "transformers":
        same(run(product, DOCUMENTED), wanted, EAGER)
        same(run(product, REGISTERED), wanted)
        same(run(product, REGISTERED_AND_CLOSED), wanted)
    if stock is None:
        same(run(product, STOCK[shop]), wanted)
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match=stock):
            run(product, STOCK[shop])


def vector(*shape: int) -> Tensor:
    """Normal numbers, the same for each shape."""
    return fa.random.normal(fa.key(2), shape, dtype=torch.float64)


def shifted(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the next token: logits (B, T - 1, V), tokens (B, T)."""
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction=reduction)


def flat(tree: dict[str, Tensor]) -> Tensor:
    """All leaves as one vector."""
    return torch.cat([leaf.flatten() for leaf in tree.values()])
