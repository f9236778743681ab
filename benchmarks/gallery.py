"""What does `funcattn check` say of other people's kernels? Each on the CPU of this machine.

python benchmarks/gallery.py                    print the table
python benchmarks/gallery.py sdpa_math          one kernel, with its failing inputs
python benchmarks/gallery.py --write            put the table into docs/gallery.md

Kernels of packages that are not installed are left out, and said so; `--packages FOLDER` names a
folder to which `pip install --no-deps --target FOLDER` has put them:

    einops memory-efficient-attention-pytorch performer-pytorch axial-positional-embedding
    local-attention hyper-connections x-transformers einx torch-einops-utils loguru frozendict

A kernel is told what it does not claim (`--without`), so that what is said of it is what it
promises: a kernel that writes in its docs that every query sees a key is not tried without one.
"""

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _torch_facts import PYTORCH, facts
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import funcattn as fa
from funcattn.testing.checking import check
from funcattn.testing.findings import Findings

PAGE = Path(__file__).parent.parent / "docs" / "gallery.md"
BEGIN, END = "<!-- gallery: benchmarks/gallery.py --write -->", "<!-- end of gallery -->"


class Entry(NamedTuple):
    """A kernel and what is said about it.

    name: in the table.
    options: of `check`.
    needs: a package that has to be installed.
    reports: numbers of issues of PyTorch, or addresses.
    """

    name: str
    f: Callable[..., Any]
    options: dict[str, Any]
    needs: str
    reports: tuple[int | str, ...]


ENTRIES: dict[str, Entry] = {}


def entry(
    name: str, *reports: int | str, needs: str = "torch", **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the gallery."""

    def enter(f: Callable[..., Any]) -> Callable[..., Any]:
        ENTRIES[f.__name__] = Entry(name, f, options, needs, reports)
        return f

    return enter


NO_JVP, NO_DOUBLE = 128971, 116350
ONE_NUMBER = 125674  # exp(S - lse) in the backward pass


@entry("`fa.attend`", signature="mask")
def closed(q, k, v, mask):
    return fa.attend(q, k, v, mask)


@entry("`F.scaled_dot_product_attention`, math", signature="sdpa")
def sdpa_math(q, k, v, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


@entry("`F.scaled_dot_product_attention`, flash", NO_JVP, NO_DOUBLE, ONE_NUMBER, signature="sdpa")
def sdpa_flash(q, k, v, **options):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


@entry(
    "`F.scaled_dot_product_attention`, as torch chooses",
    NO_JVP,
    NO_DOUBLE,
    ONE_NUMBER,
    signature="sdpa",
)
def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def flex(run: Callable[..., Any], q: Any, k: Any, v: Any, mask: Any) -> Any:
    see = lambda b, h, i, j: mask[b, h, i, j]
    B, H, T, S = mask.shape
    blocks = create_block_mask(see, B, H, T, S, device="cpu")
    return run(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


@entry("`flex_attention`, eager", 154332, 148752, signature="dense", seconds=120.0)
def flex_eager(q, k, v, mask):
    return flex(flex_attention, q, k, v, mask)


@entry(
    "`flex_attention`, compiled",
    154332,
    148752,
    signature="plain",
    laws=("kernel", "transforms"),
    depth=1,
    examples=2,
    seconds=240.0,
)
def flex_compiled(q, k, v):
    return torch.compile(flex_attention)(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


@entry(
    "`nn.MultiheadAttention`, identity projections",
    NO_JVP,
    NO_DOUBLE,
    ONE_NUMBER,
    signature="dense",
)
def multihead(q, k, v, mask):
    (B, H, T, D), S = q.shape, k.shape[2]
    if k.shape[1] != H or v.shape[-1] != D:
        raise ValueError("as many heads, and as wide values, as the module has")
    eye, none = torch.eye(H * D, dtype=q.dtype), torch.zeros(3 * H * D, dtype=q.dtype)
    joined = lambda x: x.permute(2, 0, 1, 3).reshape(x.shape[2], B, H * D)
    out, _ = F.multi_head_attention_forward(
        *map(joined, (q, k, v)),
        H * D,
        H,
        eye.repeat(3, 1),
        none,
        None,
        None,
        False,
        0.0,
        eye,
        none[: H * D],
        need_weights=False,
        attn_mask=~mask.reshape(B * H, T, S),
    )
    return out.reshape(T, B, H, D).permute(1, 2, 0, 3)


class Attention(torch.nn.Module):
    """What attention functions of transformers read of the module that calls them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, False
        self.eval()


def of_transformers(run: Callable[..., Any], q: Any, k: Any, v: Any, mask: Any) -> Any:
    module = Attention(q.shape[1] // k.shape[1])
    out, _ = run(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0)
    return out.transpose(1, 2)


@entry(
    "transformers, eager (Llama)",
    needs="transformers",
    signature="dense",
    without=("empty_rows",),
)
def transformers_eager(q, k, v, mask):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    added = torch.where(mask, 0, torch.finfo(q.dtype).min).to(q.dtype)
    return of_transformers(eager_attention_forward, q, k, v, added)


@entry(
    "transformers, sdpa",
    NO_JVP,
    NO_DOUBLE,
    ONE_NUMBER,
    needs="transformers",
    signature="dense",
)
def transformers_sdpa(q, k, v, mask):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return of_transformers(sdpa_attention_forward, q, k, v, mask)


MEMORY = "memory_efficient_attention_pytorch"


@entry(
    "memory-efficient-attention-pytorch, `memory_efficient_attention`",
    "[functorch#993](https://github.com/pytorch/functorch/issues/993)",  # torch's checkpoint
    needs=MEMORY,
    signature="flash",
    dtype=torch.float32,  # it adds 1e-8 to the normalizer, which float64 sees
)
def memory_efficient(q, k, v, causal=False):
    from memory_efficient_attention_pytorch.memory_efficient_attention import (
        memory_efficient_attention,
    )

    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = memory_efficient_attention(*heads_first, causal=causal, q_bucket_size=2, k_bucket_size=2)
    return out.transpose(1, 2)


@entry(
    "memory-efficient-attention-pytorch, `FlashAttentionFunction`",
    needs=MEMORY,
    signature="dense",
    dtype=torch.float32,
)
def flash_function(q, k, v, mask):
    from memory_efficient_attention_pytorch.flash_attention import FlashAttentionFunction

    return FlashAttentionFunction.apply(q, k, v, mask, False, 2, 2)


@entry(
    "x-transformers, `Attend`",
    needs="x_transformers",
    signature="dense",
    dtype=torch.float32,  # that of its softmax
    without=("empty_rows", "grouped"),  # its groups are of heads that are not neighbours
)
def x_attend(q, k, v, mask):
    from x_transformers.attend import Attend

    out = Attend()(q, k, v, mask=mask)
    return out[0] if isinstance(out, tuple) else out


# A linear attention is another function: of the laws, those that no softmax enters are tried.
DEFINED = (
    "agrees_with_the_reference",
    "shifting_all_logits_of_a_query_changes_only_lse",
    "shifting_all_logits_of_a_row_changes_nothing",
    "gradient_agrees_with_the_reference",
    "jvp_agrees_with_the_reference",
    "hvp_agrees_with_the_reference",
    "shifting_all_logits_of_a_row_changes_no_tangents",
    "merge_of_any_split_is_the_whole",
)


@entry(
    "performer-pytorch, `linear_attention` of softmax(q), exp(k)",
    needs="performer_pytorch",
    signature="plain",
    laws=("kernel",),
    without=(*DEFINED, "large_logits"),
)
def linear(q, k, v):
    from performer_pytorch.performer_pytorch import linear_attention

    return linear_attention(q.softmax(-1), k.exp(), v)


def run(name: str) -> Findings:
    """The findings of one kernel."""
    given = ENTRIES[name]
    return check(f"{Path(__file__).relative_to(Path.cwd())}:{name}", **given.options)


def innermost(nestings: list[str]) -> list[str]:
    """Those that contain no other: jvp(f), grad(jvp(f)) and jacrev(jacfwd(f)) -> jvp(f)."""
    plain = [name.replace("jacfwd", "jvp").replace("jacrev", "grad") for name in nestings]
    of = lambda name: name[: name.index("f)")]
    holds = lambda name: any(of(x) in of(name) and x != name for x in plain)
    kept = [name for name, x in zip(nestings, plain, strict=True) if not holds(x)]
    return [name for name in kept if "jac" not in name or len(kept) == 1]


def row(name: str, found: Findings, seconds: float) -> str:
    """A line of the table."""
    given, total = ENTRIES[name], {}
    for finding in found.rows:
        total.setdefault(finding.status, []).append(finding.law)
    broken = [f"`{law}`" for law in total.get("broken", []) if "(" not in law]
    nested = [f"`{law}`" for law in total.get("broken", []) if "(" in law]
    broken += nested if len(nested) < 4 else [f"{len(nested)} nestings"]
    raised = [law for law in total.get("raises", []) if "(" in law]
    raises = [law for law in total.get("raises", []) if "(" not in law]
    nestings = sum("(" in finding.law for finding in found.rows)
    said = [f"{len(raises)} laws"] if raises else []
    if raised:
        first = ", ".join(f"`{law}`" for law in innermost(raised))
        said.append(f"{first} ({len(raised)} of {nestings} nestings)")
    links = ", ".join(f"[#{x}]({PYTORCH}{x})" if isinstance(x, int) else x for x in given.reports)
    cells = (
        given.name,
        str(len(total.get("passed", []))),
        ", ".join(broken) or "none",
        "; ".join(said) or "none",
        links or "none known",
        f"{seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Check all, and print or write the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("kernel", nargs="*", help=", ".join(ENTRIES))
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument("--packages", help="a folder with packages of others")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.packages:
        sys.path.append(options.packages)
    torch._logging.set_logs(all=50)  # what Dynamo says of what it cannot trace
    lines, absent = [], []
    for name, given in ENTRIES.items():
        if options.kernel and name not in options.kernel:
            continue
        if importlib.util.find_spec(given.needs) is None:
            absent.append(given.needs)
            continue
        begun = time.process_time()
        found = run(name)
        lines.append(row(name, found, time.process_time() - begun))
        print(found if options.kernel else lines[-1], flush=True)
    if absent:
        print(f"not installed: {', '.join(dict.fromkeys(absent))}", file=sys.stderr)
    if options.write:
        head = (
            "| kernel | hold | broken | raise | reports | seconds |\n"
            "| --- | --: | --- | --- | --- | --: |"
        )
        where = f"torch {torch.__version__} on {platform.machine()}, one thread; seconds of this process."
        text = PAGE.read_text()
        before, after = text[: text.index(BEGIN)], text[text.index(END) :]
        table = "\n".join([head, *lines])
        both = f"{table}\n\nMeasured with {where}\n\n## What is no kernel\n\n{facts()}"
        PAGE.write_text(f"{before}{BEGIN}\n\n{both}\n\n{after}")


if __name__ == "__main__":
    main()
