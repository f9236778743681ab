"""What does each scheme cost in perplexity, and how much of it do GPTQ, AWQ and smoothing give
back?

    python benchmarks/quantization.py TEXT [--tokens 50000] [--calibration 8192] [--only int8 w8a8]
    [--scores FOLDER]

SmolLM2-135M on a plain text, such as that of the King James Bible in Debian's package
bible-kjv-text. Its first tokens calibrate; what is measured begins behind them. Each scheme reads
the same tokens in windows of 512, of which the last 384 are scored; what is compared with is
float32 of the same weights, and errors of the mean are those of the differences of single tokens.
The file's weights lie on a grid of 4 bits and groups of 32 columns, on which rounding would lose
nothing: so int4 has groups of 64. With a folder for scores each run may measure one scheme: what
others gave on the same tokens is read from there.
"""

import argparse
import time
from pathlib import Path

import torch

import funcattn as fa

CONTEXT, STRIDE = 512, 384


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--calibration", type=int, default=8192)
    parser.add_argument(
        "--only", nargs="*", help="names of what is measured beside float32; all of it by default"
    )
    parser.add_argument("--scores", type=Path, help="a folder that keeps the score of each token")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, params, tokenizer = fa.load("smollm2-135m")
    model, scheme, by_rows = fa.decoder(config), fa.int4(group=64), fa.w8a8(group=None)
    ids = torch.tensor(
        tokenizer.encode(options.text.read_text()[: 8 * (options.tokens + options.calibration)])
    )
    before, text = ids[: options.calibration], ids[options.calibration :][: options.tokens]
    print(f"{len(text)} tokens behind {len(before)} of calibration")
    candidates = {
        "float32": lambda: params,
        "int8": lambda: fa.dequantize(fa.quantize(fa.int8)(params)),
        "int4, groups of 64, to nearest": lambda: fa.dequantize(fa.quantize(scheme)(params)),
        "int4, groups of 64, GPTQ": lambda: fa.dequantize(fa.gptq(model, before, scheme)(params)),
        "int4, groups of 64, AWQ": lambda: fa.dequantize(fa.awq(model, before, scheme)(params)),
        "int4, groups of 64, smoothed, GPTQ": lambda: fa.dequantize(
            fa.gptq(model, before, scheme)(fa.smooth(model, before, scheme)(params))
        ),
        "w8a8": lambda: fa.quantize(fa.w8a8)(params),
        "w8a8, smoothed": lambda: fa.quantize(fa.w8a8)(fa.smooth(model, before, fa.w8a8)(params)),
        "w8a8, by rows": lambda: fa.quantize(by_rows)(params),
        "w8a8, by rows, smoothed": lambda: fa.quantize(by_rows)(
            fa.smooth(model, before, by_rows)(params)
        ),
    }
    if options.only is not None:
        candidates = {
            name: make
            for name, make in candidates.items()
            if name == "float32" or name in options.only
        }
    scores: dict[str, torch.Tensor] = {}
    for name, make in candidates.items():
        begin = time.perf_counter()
        kept = options.scores and options.scores / f"{name}, {len(text)} behind {len(before)}.pt"
        with torch.no_grad():
            scores[name] = (
                torch.load(kept) if kept and kept.exists() else score(model, make(), text)
            )
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(scores[name], kept)
        losses = -scores[name].double()
        more = losses + scores["float32"].double()  # of each token
        mean, error = float(more.mean()), float(more.std() / len(more) ** 0.5)
        perplexity = float(losses.mean().exp())
        print(
            f"{name:36} perplexity {perplexity:8.4f}  {torch.tensor(mean).expm1().item():+.3%} +- "
            f"{error:.3%}"
            f"  ({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    loss = {name: -float(found.double().mean()) for name, found in scores.items()}
    for how in ("GPTQ", "AWQ", "smoothed, GPTQ"):
        if {f"int4, groups of 64, {how}", "int4, groups of 64, to nearest"} <= {*loss}:
            nearest, fitted = (
                loss[f"int4, groups of 64, {by}"] - loss["float32"] for by in ("to nearest", how)
            )
            print(f"{how} gives back {1 - fitted / nearest:.0%} of what rounding to nearest loses")


def score(model: fa.Model, params: fa.Params, text: torch.Tensor) -> torch.Tensor:
    """The log probability of each token but the first, in windows."""
    windows = fa.evaluation.windows(len(text), context=CONTEXT, stride=STRIDE)
    parts = [
        fa.score_continuation(model, params, text[begin:first], text[first:end])
        for begin, first, end in windows
    ]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
