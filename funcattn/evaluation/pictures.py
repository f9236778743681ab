"""Pictures of what a model computes: text where they are printed, HTML in a notebook.

    heat_map(values, rows, columns)           a table of numbers, coloured by sign and size
    lens_table(found, tokens, tokenizer)      the likeliest token of each layer and position
    attention_maps(pattern, labels)           a square for each head
    surprise(scores, tokens, tokenizer)       a text coloured by the bits of its tokens
    bars(log_probs, tokenizer)                the likeliest tokens of a distribution
    ranked(beams, tokenizer)                  beams with their scores
    curve(history)                            the losses of a fit

Each returns a `Picture`, a pair of texts. No plotting library is needed; colours are transparent,
so that they suit a light and a dark page.
"""

import html
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..core import errors
from ..core.doors import door, what_is
from ..decoding.beams import Texts
from ..decoding.detokenization import Detokenizer
from . import drawing
from .drawing import BLUE, RED, Picture
from .lenses import LogitLens


@door
def token_labels(tokens: Tensor | Sequence[int], tokenizer: Detokenizer) -> list[str]:
    """The text of each token on one line: line breaks as ⏎, a token of spaces alone as ␣.

    Args:
        tokens: integers (T,).
        tokenizer: decodes ids to text.

    Example:
        >>> import torch
        >>> class Letters:
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> token_labels(torch.tensor([72, 105, 10]), Letters())
        ['H', 'i', '⏎']
    """
    if isinstance(tokens, Tensor):
        tokens = drawing.concrete("token_labels", "tokens", tokens).tolist()
    texts = [tokenizer.decode([int(id)]) for id in tokens]
    texts = [text if text.strip(" ") else "␣" * len(text) for text in texts]
    return [errors.printable(text.replace("\n", "⏎").replace("\t", "⇥")) for text in texts]


@door
def heat_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], *, digits: int = 1
) -> Picture:
    """A table of numbers: blue above zero, red below, deeper for larger ones.

    Args:
        values: (R, C), such as the effects of a `patching_sweep`.
        rows, columns: R and C labels.
        digits: after the point.

    Raises:
        ValueError: labels of another number, values inside of vmap or torch.compile.
    """
    table = drawing.table("heat_map", "values", values, rows, columns)
    largest = max((abs(x) for line in table for x in line if math.isfinite(x)), default=0.0) or 1.0

    def shade(x: float) -> str:
        return drawing.colour(BLUE if x > 0 else RED, abs(x) / largest) if math.isfinite(x) else ""

    cells = [[(f"{x:.{digits}f}", shade(x)) for x in line] for line in table]
    return drawing.grid(cells, rows, columns)


@door
def lens_table(
    found: LogitLens,
    tokens: Tensor,
    tokenizer: Detokenizer,
    *,
    layers: Iterable[int] | None = None,
) -> Picture:
    """What each layer predicts after each token: the last layer on top, deeper where it is surer.

    Args:
        found: from `logit_lens` of one text.
        tokens: integers (T,), the text.
        tokenizer: decodes ids to text.
        layers: which of them; None is all.

    Raises:
        ValueError: a text of another length, layers that do not exist, values inside of vmap.
    """
    ids = drawing.concrete("lens_table", "found", found.ids)
    if ids.dim() != 3:
        remedy = "Show one text at a time: fa.tree.map(lambda x: x[:, 0], found), targets aside."
        errors.fail("lens_table", "found", "of one text, ids (L, T, k)", what_is(ids), remedy)
    L = len(ids)
    chosen = list(range(L)) if layers is None else [int(layer) for layer in layers]
    for layer in chosen:
        if not -L <= layer < L:
            errors.fail(
                "lens_table", "layers", f"in 0..{L - 1}", layer, "Negative ones count back."
            )
    chosen = sorted({layer % L for layer in chosen}, reverse=True)
    columns = token_labels(tokens, tokenizer)
    shares = drawing.concrete("lens_table", "found", found.log_probs)[..., 0].exp()
    rows = [f"{layer}" for layer in chosen]
    table = drawing.table("lens_table", "tokens", shares[chosen], rows, columns)
    words = [token_labels(ids[layer, :, 0], tokenizer) for layer in chosen]
    cells = [
        [(word, drawing.colour(BLUE, share)) for word, share in zip(line, each, strict=True)]
        for line, each in zip(words, table, strict=True)
    ]
    return drawing.grid(cells, rows, columns)


@door
def attention_maps(
    pattern: Tensor, labels: Sequence[str], *, heads: Iterable[int] | None = None
) -> Picture:
    """A square for each head: queries down, keys across, deeper where more is attended to.

    Args:
        pattern: (H, T, S), from `attention_pattern` or `fa.attention_weights`.
        labels: texts of the S keys, the last T of which are the queries.
        heads: which of them; None is all.

    Raises:
        ValueError: a pattern of another shape, values inside of vmap or torch.compile.
    """
    concrete = drawing.concrete("attention_maps", "pattern", pattern)
    if concrete.dim() != 3 or concrete.shape[-1] != len(labels) or len(labels) < concrete.shape[1]:
        remedy = "Give a label for each key; one text at a time."
        wanted = f"(H, T, S) with S = {len(labels)} labels"
        errors.fail("attention_maps", "pattern", wanted, what_is(pattern), remedy)
    H, T, S = concrete.shape
    chosen = range(H) if heads is None else [int(head) for head in heads]
    for head in chosen:
        if not 0 <= head < H:
            errors.fail("attention_maps", "heads", f"in 0..{H - 1}", head, "Heads count from 0.")
    texts, drawings, side = [], [], max(4, min(14, 220 // max(S, 1)))
    for head in chosen:
        lines = ["".join(drawing.shade(share) for share in row) for row in concrete[head].tolist()]
        texts.append("\n".join([f"head {head}", *lines]))
        squares = "".join(
            f'<rect x="{s * side}" y="{t * side}" width="{side}" height="{side}" '
            f'fill="rgba({BLUE},{min(1.0, share):.2f})"><title>{html.escape(labels[S - T + t])} → '
            f"{html.escape(labels[s])}: {share:.2f}</title></rect>"
            for t, row in enumerate(concrete[head].tolist())
            for s, share in enumerate(row)
            if share > 0.005
        )
        drawings.append(
            f'<div style="margin:.3em"><small>head {head}</small><br><svg width="{S * side}" '
            f'height="{T * side}" style="border:1px solid #8888">{squares}</svg></div>'
        )
    body = f'<div style="display:flex;flex-wrap:wrap">{"".join(drawings)}</div>'
    return Picture("\n\n".join(texts), body)


@door
def surprise(scores: Tensor, tokens: Tensor, tokenizer: Detokenizer) -> Picture:
    """A text in which the background of each token is its surprise, -log2 p, in bits.

    Args:
        scores: (T - 1,) log-probabilities in nats, from `fa.score(model, params, tokens)`.
        tokens: integers (T,); the first has no score.
        tokenizer: decodes ids to text.

    Raises:
        ValueError: another number of scores, values inside of vmap or torch.compile.
    """
    bits = drawing.concrete("surprise", "scores", scores).double() / -math.log(2)
    if bits.dim() != 1 or tokens.dim() != 1 or len(bits) != len(tokens) - 1:
        remedy = "Pass what fa.score returns of these tokens; one text at a time."
        wanted = f"(T - 1,) for tokens {errors.shape(tokens)}"
        errors.fail("surprise", "scores", wanted, errors.shape(scores), remedy)
    words = token_labels(tokens, tokenizer)
    largest = max((x for x in bits.tolist() if math.isfinite(x)), default=0.0) or 1.0
    width = max(map(len, words))
    lines, spans = [words[0]], [f"<span>{html.escape(words[0])}</span>"]
    for word, x in zip(words[1:], bits.tolist(), strict=True):
        share = min(1.0, max(0.0, x / largest)) if not math.isnan(x) else 0.0
        lines.append(f"{word:<{width}} {x:6.2f} {drawing.bar(share)}".rstrip())
        style, told = drawing.colour(RED, share), f"{x:.2f} bits"
        spans.append(f'<span style="{style}" title="{told}">{html.escape(word)}</span>')
    total = f"{bits.mean():.2f} bits a token"
    body = "".join(spans).replace("⏎", "⏎<br>")
    return Picture(
        "\n".join([*lines, total]),
        f'<div style="line-height:1.8;max-width:48em;white-space:pre-wrap">{body}</div>'
        f"<small>{total}</small>",
    )


@door
def bars(log_probs: Tensor, tokenizer: Detokenizer, *, k: int = 10) -> Picture:
    """The likeliest tokens of a distribution, and the rest of it, as bars.

    Args:
        log_probs: (V,), such as `fa.sampling.log_probs(sampler)(logits)`.
        tokenizer: decodes ids to text.
        k: how many tokens.

    Raises:
        ValueError: log-probabilities of another shape, a k below 1, values inside of vmap.
    """
    probs = drawing.concrete("bars", "log_probs", log_probs).double().exp()
    if probs.dim() != 1:
        remedy = "One distribution at a time."
        errors.fail("bars", "log_probs", "(V,)", what_is(log_probs), remedy)
    if not errors.is_count(k, 1):
        errors.fail("bars", "k", "at least 1", k, "How many tokens are shown.")
    best, ids = probs.topk(min(k, len(probs)))
    shown = [
        (word, p)
        for word, p in zip(token_labels(ids, tokenizer), best.tolist(), strict=True)
        if p > 0
    ]
    rest = int((probs > 0).sum()) - len(shown)
    if rest > 0:
        shown.append((f"({rest} others)", max(0.0, 1 - sum(p for _, p in shown))))
    return drawing.barred([(word, p, f"{p:.3f}") for word, p in shown])


@door
def ranked(beams: Texts, tokenizer: Detokenizer) -> Picture:
    """Beams with their scores and texts, the best first.

    Args:
        beams: the texts that `fa.beam_search` or `fa.best_of` return.
        tokenizer: decodes ids to text.

    Raises:
        ValueError: beams of many prompts, or inside of vmap.
    """
    scores = drawing.concrete("ranked", "beams", beams.scores)
    tokens, lengths = (
        drawing.concrete("ranked", "beams", x) for x in (beams.tokens, beams.lengths)
    )
    if scores.dim() != 1:
        remedy = "Show one at a time: fa.tree.map(lambda x: x[0], beams)."
        errors.fail("ranked", "beams", "of one prompt", f"scores {what_is(scores)}", remedy)
    kept = [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]
    texts = [errors.printable(tokenizer.decode(ids).replace("\n", "⏎")) for ids in kept]
    rows = list(zip(scores.tolist(), map(str, map(len, kept)), texts, strict=True))
    lines = [
        f"{n + 1:>2} {score:8.3f} {size:>4}  {text}" for n, (score, size, text) in enumerate(rows)
    ]
    body = "".join(
        f"<tr><td>{n + 1}</td><td>{score:.3f}</td><td>{size}</td>"
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for n, (score, size, text) in enumerate(rows)
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "score", "tokens", "text"))
    return Picture("\n".join(lines), f"<table><tr>{head}</tr>{body}</table>")


@door
def curve(history: Sequence[tuple[int, float, float | None]]) -> Picture:
    """The losses of a fit over its steps: training, and validation where there is one.

    Args:
        history: (step, training, validation or None) each: `history` of `fa.training.fit`.

    Raises:
        ValueError: no reports.
    """
    if not history:
        remedy = "Pass the history of fa.training.fit; report_every says how often one is made."
        errors.fail("curve", "history", "of one report or more", "none", remedy)
    lines = {
        "training": [(int(step), float(loss)) for step, loss, _ in history],
        "validation": [(int(step), float(loss)) for step, _, loss in history if loss is not None],
    }
    lines = {name: line for name, line in lines.items() if line}
    finite = [y for line in lines.values() for _, y in line if math.isfinite(y)] or [0.0]
    low, high = min(finite), max(finite)
    share = lambda y: (y - low) / ((high - low) or 1.0) if math.isfinite(y) else 1.0
    spark = lambda y: drawing.STEPS[round(share(y) * (len(drawing.STEPS) - 1))]
    text = "\n".join(
        f"{name:<10} {''.join(spark(y) for _, y in line)} "
        f"{line[0][1]:.3f} → {line[-1][1]:.3f} in {line[-1][0]} steps"
        for name, line in lines.items()
    )
    return Picture(text, drawing.plot(lines, share, (low, high)))
