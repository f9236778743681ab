"""What do other people's tools cost with eager attention, as their pages advise, and with ours?

    make test-peers ARGS="--collect-only --quiet"    # installs the tools in .venv-peers
    .venv-peers/bin/python benchmarks/tools.py [--quick] [--only ggn hvp] [--tokens 2048] [--write]

A Llama of transformers with two layers of width 256 (4 heads of 64, 2 of keys), float32, one text
unless a tool needs two. Each measurement is a process of its own with one thread: the CPU time and
the rise of its resident memory over a call, after the same call on 32 tokens. Routes take turns,
round after round; medians. "Eager" is attn_implementation="eager", "ours" "funcattn" inside of
closed(), "torch's" the default "sdpa". Results are compared. --quick is one round at 512 tokens.
"""

import argparse
import contextlib
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcattn as fa

ROUTES = {"eager": "eager", "ours": "funcattn", "torch's": "sdpa"}
VOCABULARY = 256
PAGE = Path(__file__).parent.parent / "docs" / "tools.md"
BEGIN, END = "<!-- tools: benchmarks/tools.py --write -->", "<!-- end of tools -->"
MB = 2**20
Product = Callable[[], Tensor]


class Logits(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


class ClassesSecond(Logits):
    """Tokens (B, T) -> logits (B, V, T), as nn.CrossEntropyLoss takes them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).transpose(1, 2)


class Classifier(Logits):
    """Tokens (B, T) -> logits (B, 3) of three classes."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, -1, :3]


def llama(implementation: str) -> nn.Module:
    import transformers

    fa.interop.register_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
        initializer_range=0.06,
        use_cache=False,
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config).eval()


def cross_entropy(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Of the next token: logits (B, T - 1, V), tokens (B, T)."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction=reduction)


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.detach().flatten() for leaf in tree.values()])


def direction(n: int) -> Tensor:
    return fa.random.normal(fa.key(2), (n,))


# The tools: a model and texts (2, T) -> what is timed.


def operator(kind: str, model: nn.Module, texts: Tensor) -> Product:
    import curvlinops

    data = [(texts[:1, :-1], texts[:1, 1:])]
    module, parameters = ClassesSecond(model), list(model.parameters())
    made = getattr(curvlinops, kind)(
        module, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )
    return lambda: made @ direction(made.shape[1])


def hessian_operator(model: nn.Module, texts: Tensor) -> Product:
    import hessian_eigenthings as tool

    batch = {"input_ids": texts[:1], "labels": texts[:1]}
    made = tool.HessianOperator(model, [batch], tool.hf_lm_loss())
    return lambda: made.matvec(direction(made.size))


def gauss_newton(model: nn.Module, texts: Tensor) -> Product:
    import posteriors
    from torch.func import functional_call

    params = {name: p.detach() for name, p in model.named_parameters()}
    tangent = {name: fa.random.normal(fa.key(2), p.shape) for name, p in params.items()}
    forward = lambda params: functional_call(model, params, (texts[:1, :-1],)).logits
    loss = lambda z: cross_entropy(z, texts[:1])
    return lambda: flat(posteriors.ggnvp(forward, loss, (params,), (tangent,))[1])


def influence(model: nn.Module, texts: Tensor) -> Product:
    from dattri.algorithm import IFAttributorCG
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.utils.data import DataLoader, TensorDataset

    module = Logits(model)

    def loss(params: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        tokens = data[0] if data[0].dim() == 2 else data[0][None]
        return cross_entropy(functional_call(module, params, (tokens[:, :-1],)), tokens)

    task = AttributionTask(loss_func=loss, model=module, checkpoints=module.state_dict())
    train, test = (DataLoader(TensorDataset(text[None])) for text in texts)

    def attribute() -> Tensor:
        attributor = IFAttributorCG(task=task, max_iter=1, regularization=1.0)
        attributor.cache(train)
        return attributor.attribute(train, test).flatten()

    return attribute


def tokens_influence(model: nn.Module, texts: Tensor) -> Product:
    from bergson.score.output_influence import output_token_influence

    options = SimpleNamespace(loss_fn="ce", loss_reduction="mean", label_smoothing=0.0)
    queries = [
        (direction(p.numel())[:, None], name, None, False)
        for name, p in model.named_parameters()
        if "proj" in name
    ]
    text = texts[:1]
    return lambda: output_token_influence(model, text, text, queries, options)[0].flatten()


def through_training(model: nn.Module, texts: Tensor) -> Product:
    import torchopt
    from bergson.magic import Trainer
    from bergson.utils import weighted_causal_lm_ce
    from torch.func import functional_call

    model.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
    trainer, state = Trainer.initialize(model, torchopt.sgd(0.1))
    for parameter in state.params.values():
        parameter.requires_grad_()

    def derivative() -> Tensor:
        weights = torch.ones(2, requires_grad=True)
        batch = {"input_ids": texts, "labels": texts, "example_weight": weights}
        after = trainer.step(state, batch, trace=True)
        query = {"input_ids": texts[1:], "labels": texts[1:]}
        loss = functional_call(trainer.model, after.params, (), query).loss
        return torch.autograd.grad(loss, weights)[0]

    return derivative


def each_text(model: nn.Module, texts: Tensor) -> Product:
    from opacus import GradSampleModule

    module = GradSampleModule(Logits(model).train(), strict=False)

    def gradients() -> Tensor:
        module.zero_grad()
        cross_entropy(module(texts[:, :-1]), texts).backward()
        return flat({name: p.grad_sample for name, p in module.named_parameters()})

    return gradients


def laplace(model: nn.Module, texts: Tensor) -> Product:
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN
    from torch.utils.data import DataLoader, TensorDataset

    module = Classifier(model)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("proj" in name)
    data = DataLoader(TensorDataset(texts[:1], torch.tensor([1])))

    def fit() -> Tensor:
        posterior = Laplace(
            module,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=CurvlinopsGGN,
        )
        torch.manual_seed(0)  # the labels of its Fisher matrix are drawn
        posterior.fit(data)
        return torch.cat([e.flatten() for pair in posterior.H.eigenvalues for e in pair])

    return fit


def attribution(model: nn.Module, texts: Tensor) -> Product:
    from captum.attr import LayerIntegratedGradients

    layered = LayerIntegratedGradients(Classifier(model), model.model.embed_tokens)
    text = texts[:1]
    attribute = partial(layered.attribute, baselines=torch.zeros_like(text), target=1, n_steps=4)
    return lambda: attribute(text).flatten()


class Tool(NamedTuple):
    package: str
    does: str
    make: Callable[[nn.Module, Tensor], Product]


TOOLS = {
    "ggn": Tool(
        "curvlinops-for-pytorch",
        "`GGNLinearOperator` times a vector",
        partial(operator, "GGNLinearOperator"),
    ),
    "hessian": Tool(
        "curvlinops-for-pytorch",
        "`HessianLinearOperator` times a vector",
        partial(operator, "HessianLinearOperator"),
    ),
    "hvp": Tool("hessian-eigenthings", "`HessianOperator` times a vector", hessian_operator),
    "ggnvp": Tool("posteriors", "`ggnvp`", gauss_newton),
    "influence": Tool("dattri", "`IFAttributorCG`, one step, of one text on one", influence),
    "tokens": Tool("bergson", "`output_token_influence`, one query", tokens_influence),
    "training": Tool(
        "bergson", "`Trainer.step(trace=True)`, and back, two texts", through_training
    ),
    "samples": Tool("opacus", "`GradSampleModule`, two texts", each_text),
    "laplace": Tool("laplace-torch", '`Laplace(hessian_structure="kron").fit`, one text', laplace),
    "attribution": Tool("captum", "`LayerIntegratedGradients`, four steps", attribution),
}


# One measurement, in a process of its own.


def measure(name: str, route: str, T: int, path: str) -> None:
    """Save what the tool computes, and print CPU seconds and bytes, or the error, as json."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = llama(ROUTES[route])
    closed = fa.interop.closed if route == "ours" else contextlib.nullcontext
    texts = fa.random.randint(fa.key(0), (2, T), 1, VOCABULARY)
    with closed():
        try:
            TOOLS[name].make(llama(ROUTES[route]), texts[:, :32])()  # what is allocated once
            call = TOOLS[name].make(model, texts)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident
            before, begun = resident("VmRSS"), time.process_time()
            result = call()
            seconds, rise = time.process_time() - begun, resident("VmHWM") - before
        except (RuntimeError, NotImplementedError) as error:
            print(json.dumps({"error": str(error).splitlines()[0]}))
            return
    torch.save(result.detach(), path)
    print(json.dumps({"seconds": seconds, "rise": rise}))


def resident(field: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Measured(NamedTuple):
    """Medians of the rounds, and what was computed; or an error."""

    seconds: float = float("nan")
    rise: float = float("nan")
    result: Tensor | None = None
    error: str = ""


def compare(name: str, options: argparse.Namespace) -> dict[str, Measured]:
    """The routes in turns, each a process. torch's own once: it is not what is compared."""
    found: dict[str, list[dict[str, Any]]] = {route: [] for route in ROUTES}
    results: dict[str, Tensor] = {}
    for turn in range(options.rounds):
        for route in ROUTES:
            if (turn and route == "torch's") or (found[route] and "error" in found[route][0]):
                continue
            with tempfile.NamedTemporaryFile() as file:
                arguments = ["--one", name, route, file.name, "--tokens", str(options.tokens)]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
                found[route].append(json.loads(done.stdout.splitlines()[-1]))
                if "error" not in found[route][-1]:
                    results[route] = torch.load(file.name)
    return {
        route: Measured(error=runs[0]["error"])
        if "error" in runs[0]
        else Measured(
            median(run["seconds"] for run in runs),
            median(run["rise"] for run in runs),
            results[route],
        )
        for route, runs in found.items()
    }


def distance(a: Measured, b: Measured) -> float:
    """Between two results, as a part of the norm of the second; NaN where one raised."""
    if a.result is None or b.result is None:
        return float("nan")
    return float((a.result - b.result).norm() / b.result.norm())


def short(error: str) -> str:
    """The operation that an error names, or nothing where there is none."""
    operation = re.search(r"(?:aten::|_)_?(scaled_dot_product|\w+)", error)
    return f"raises: `{operation[1] if operation else error}`" if error else ""


def row(name: str, measured: dict[str, Measured]) -> str:
    """A line of the table: times over ours, and megabytes."""
    eager, ours, stock = (measured[route] for route in ROUTES)
    tool = TOOLS[name]
    cell = lambda m: short(m.error) or f"{m.seconds / ours.seconds:.1f}, {m.rise / MB:.0f} MB"
    cells = [f"{tool.package} {version(tool.package)}", tool.does, *map(cell, (eager, stock, ours))]
    cells += ["" if eager.error else f"{distance(ours, eager):.0e}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round at 512 tokens")
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=[*TOOLS])
    parser.add_argument("--write", action="store_true", help="the table into docs/tools.md")
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "ROUTE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 512, 1
    if options.one:
        name, route, path = options.one
        measure(name, route, options.tokens, path)
        return
    lines = [
        "| tool | what it computes | eager | torch's | ours | ours differs from eager by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name in options.only:
        measured = compare(name, options)
        lines.append(row(name, measured))
        print(lines[-1], flush=True)
        times = (f"{route} {m.seconds:.2f} s" for route, m in measured.items())
        print("   ", ", ".join(times), file=sys.stderr, flush=True)
    remark = f"{options.tokens} tokens, {options.rounds} round(s), torch {torch.__version__}, transformers {version('transformers')}."
    print(f"\n{remark}")
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        table = "\n".join([*lines, "", remark])
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
