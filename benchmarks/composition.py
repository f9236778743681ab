"""What composes with what? Every nesting of grad, jvp and vmap to depth two, and the Hessian four
ways, against plain operations.

python benchmarks/composition.py            print the table
python benchmarks/composition.py --write    put it between the marks in README.md and docs/index.md

A cell counts the nestings that agree, in float64, to 1e-9 of the greatest entry, alone and under
one more vmap. One that did not would not be left out: `check_transforms` raises, and there is no
table.
"""

import argparse
from pathlib import Path

import torch

import funcattn as fa
from funcattn.testing import check_transforms

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
BEGIN, END = (
    "<!-- composition: benchmarks/composition.py --write -->",
    "<!-- end of composition -->",
)
COLUMNS = {  # by the nestings' names
    "grad, jvp": ("grad(f)", "jvp(f)"),
    "grad and jvp of each other": ("grad(grad(f))", "grad(jvp(f))", "jvp(grad(f))", "jvp(jvp(f))"),
    "vmap of and in them": (
        "vmap(f)",
        "vmap(vmap(f))",
        "vmap(grad(f))",
        "vmap(jvp(f))",
        "grad(vmap(f))",
        "jvp(vmap(f))",
    ),
    "Hessian": tuple(f"jac{a}(jac{b}(f))" for a in ("fwd", "rev") for b in ("fwd", "rev")),
}


def subjects():
    """What the README speaks of: a name, the function and its arguments, and the same in plain
    operations.
    """
    config = fa.Config(
        layers=1, width=8, heads=2, kv_heads=1, head_size=4, feed_forward=8, vocabulary=5
    )
    model, plain = fa.decoder(config), fa.decoder(config, kernel="reference")
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    tokens = torch.tensor([3, 1, 4])
    past = model.apply(params, tokens, model.cache(4, dtype=torch.float64))[1]
    moving, rest = fa.tree.partition(past, "floating")
    layer, others = fa.tree.partition(
        params, lambda path, _: path in ("layers.0.k", "layers.0.norm")
    )
    small = fa.quantize(fa.int4(group=4))(params)
    adapted = fa.lora(2)(fa.key(1), params)
    low, base = fa.tree.partition(adapted, fa.low_rank.is_trained)
    low = fa.tree.map(lambda x: x + 0.1, low)
    x = fa.random.normal(fa.key(2), (3, 8), torch.float64)
    logits = fa.random.normal(fa.key(3), (5,), torch.float64)
    sampler = fa.sampling.chain(fa.sampling.temperature(0.8), fa.sampling.top_k(3))
    feed = lambda w: (
        lambda x: fa.layers.linear(
            w.layers[0].down, torch.tanh(fa.layers.linear(w.layers[0].up, x))
        )
    )
    step = lambda model: (
        lambda moving: model.extend(params, tokens[:1], fa.tree.combine(moving, rest))[0]
    )
    loss = lambda model: lambda layer: fa.loss(model, fa.tree.combine(layer, others), tokens)
    lost = lambda model: lambda low: fa.loss(model, fa.tree.combine(low, base), tokens)
    f = lambda x: (x.sin() @ x.mT).softmax(-1)
    return [
        (
            "`fa.attention`, grouped heads, causal",
            lambda q, k, v, mask: fa.attention(q, k, v, mask, kernel="flash"),
            (),
            None,
        ),
        (
            "`fa.attend`: the log-sum-exp too",
            lambda q, k, v, mask: fa.attend(q, k, v, mask, kernel="flash"),
            (),
            None,
        ),
        ("`fa.loss` of a decoder, by its weights", loss(model), (layer,), loss(plain)),
        ("a step, by the past it reads", step(model), (moving,), step(plain)),
        ("low-rank adaptations", lost(model), (low,), lost(plain)),
        (
            "weights in four bits, by activations",
            feed(small),
            (x,),
            feed(fa.dequantize(small, torch.float64)),
        ),
        ("`fa.remat`", fa.remat(f), (x,), f),
        (
            "the law of a sampler",
            lambda x: fa.sampling.law(sampler)(x).exp(),
            (logits,),
            lambda x: torch.where(x >= x.sort().values[2], x / 0.8, -torch.inf).softmax(-1),
        ),
    ]


def table() -> str:
    """The table in Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " :-: |" * len(COLUMNS)]
    for name, f, args, reference in subjects():
        rows = {
            row.nesting: row
            for row in check_transforms(f, *args, depth=2, reference=reference).rows
        }
        assert set(rows) == {nesting for nestings in COLUMNS.values() for nesting in nestings}
        cells = [f"{len(nestings)} of {len(nestings)}" for nestings in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(page: str, found: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{found}\n\n{END}{after}"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md and docs/index.md")
    found = table()
    if not parser.parse_args().write:
        print(found)
        return
    for path in PAGES:
        path.write_text(written(path.read_text(), found))


if __name__ == "__main__":
    main()
