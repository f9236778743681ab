"""What does a step of training cost, beside the same model written with torch's own modules?

    python benchmarks/training.py --threads 1 [--eager] [--large]

The twin is a nn.Module of the same mathematics (RMSNorm, rotary attention, SwiGLU, tied head), with
one linear for q, k and v, torch's fused attention and AdamW(fused=True), as nanoGPT trains. Both
begin with the same weights, and must agree on three losses.
"""

import argparse

import torch
import torch.nn.functional as F
from _timing import interleave
from torch import Tensor, nn

import funcattn as fa

SMALL = (
    fa.Config(
        vocabulary=65,
        width=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head_size=32,
        feed_forward=344,
        context=64,
    ),
    12,
    64,
)
LARGE = (
    fa.Config(
        vocabulary=65,
        width=384,
        layers=6,
        heads=6,
        kv_heads=6,
        head_size=64,
        feed_forward=1024,
        context=256,
    ),
    4,
    256,
)
RATE, BETAS, DECAY, LENGTH = 1e-3, (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    def __init__(self, c: fa.Config):
        super().__init__()
        self.heads = c.heads
        self.attention_norm, self.feed_forward_norm = (
            nn.RMSNorm(c.width, eps=c.norm_epsilon) for _ in range(2)
        )
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.o = nn.Linear(c.width, c.width, bias=False)
        self.gate, self.up = (nn.Linear(c.width, c.feed_forward, bias=False) for _ in range(2))
        self.down = nn.Linear(c.feed_forward, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, E = x.shape
        q, k, v = (
            y.view(B, T, self.heads, -1).transpose(1, 2)
            for y in self.qkv(self.attention_norm(x)).split(E, -1)
        )
        y = F.scaled_dot_product_attention(
            turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(B, T, E))
        y = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Twin(nn.Module):
    """The decoder of a Config without grouped heads, as one writes it with modules."""

    def __init__(self, c: fa.Config):
        super().__init__()
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_epsilon)
        angle = torch.arange(c.context)[:, None] / c.rope_base ** (
            torch.arange(0, c.head_size, 2) / c.head_size
        )
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x, T = self.embedding(tokens[:, :-1]), tokens.shape[1] - 1
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def take(self, params: fa.Params) -> "Twin":
        """The weights of ours."""
        self.embedding.weight.copy_(params.embedding)
        self.norm.weight.copy_(params.norm)
        for block, layer in zip(self.blocks, params.layers, strict=True):
            block.attention_norm.weight.copy_(layer.attention_norm)
            block.feed_forward_norm.weight.copy_(layer.feed_forward_norm)
            block.qkv.weight.copy_(torch.cat([layer.q, layer.k, layer.v]))
            for name in ("o", "gate", "up", "down"):
                getattr(block, name).weight.copy_(getattr(layer, name))
        return self


class Theirs:
    """The usual loop body: forward, backward, clip, fused AdamW, all in place."""

    def __init__(self, config: fa.Config, params: fa.Params, tokens: Tensor, *, compile: bool):
        self.module, self.tokens = Twin(config).take(params), tokens
        weights = list(self.module.parameters())
        groups = [{"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY}]
        groups += [{"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
        self.forward = torch.compile(self.module) if compile else self.module

    def __call__(self) -> Tensor:
        loss = self.forward(self.tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), LENGTH)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours:
    """The pure step, with the variable that a loop holds."""

    def __init__(
        self,
        config: fa.Config,
        params: fa.Params,
        tokens: Tensor,
        *,
        compile: bool,
        kernel: str | None = "sdpa",
    ):
        optimizer = fa.training.chain(
            fa.training.clip(LENGTH), fa.training.adamw(RATE, betas=BETAS, weight_decay=DECAY)
        )
        self.tokens, self.held = tokens, (params, optimizer.init(params))
        self.step = fa.training.step(fa.decoder(config, kernel=kernel), optimizer)
        if compile:
            self.step = torch.compile(self.step, fullgraph=True)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        *self.held, metrics = self.step(*self.held, self.tokens)
        return metrics.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="leave the compiled ones out")
    parser.add_argument("--large", action="store_true", help="6 layers of width 384, 4 rows of 256")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, rows, T = LARGE if options.large else SMALL
    params = fa.decoder(config).init(fa.key(0))
    tokens = fa.random.randint(fa.key(1), (rows, T + 1), 0, config.vocabulary)
    given = (config, params, tokens)
    candidates = {"twin": Theirs(*given, compile=False), "step": Ours(*given, compile=False)}
    candidates["step, closed attention"] = Ours(*given, compile=False, kernel=None)
    if not options.eager:
        candidates["compiled twin"] = Theirs(*given, compile=True)
        candidates["compiled step"] = Ours(*given, compile=True)
    agree(candidates)
    print(f"{fa.tree.count(params):,} weights, {rows} rows of {T} tokens")
    timings = interleave(candidates, repeats=options.rounds, warmup=2)
    print(f"eager: twin / step {timings['twin'].wall / timings['step'].wall:.2f}", end="")
    print(
        ""
        if options.eager
        else f"; compiled: {timings['compiled twin'].wall / timings['compiled step'].wall:.2f}"
    )


def agree(candidates: dict[str, Theirs | Ours]) -> None:
    losses = {
        name: [float(candidate()) for _ in range(3)] for name, candidate in candidates.items()
    }
    for name, values in losses.items():
        torch.testing.assert_close(
            values,
            losses["twin"],
            rtol=1e-4,
            atol=0,
            msg=f"{name}: {values}, the twin {losses['twin']}",
        )


if __name__ == "__main__":
    main()
