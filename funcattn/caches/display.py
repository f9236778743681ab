"""Printing caches: a line of text with the length and capacity, and a bar in a notebook.

A kind uses them by `__str__ = display.line` and `_repr_html_ = display.bar` in its class.
"""

import functools

from .. import tree
from ..core import errors
from ..records import unfolded
from .protocol import KVCache, capacity, sizes


@functools.singledispatch
def tokens(cache: KVCache) -> str:
    """Length and capacity of one cache of concrete length, as text."""
    return f"{int(cache.length)} of {capacity(cache)} tokens"


def line(self: KVCache) -> str:
    """A cache in one line: kind, tokens, sizes and bytes.

    Example:
        >>> import funcattn as fa
        >>> line(fa.decoder(fa.Config()).cache(100))
        'Cache: 0 of 100 tokens, 2 layers, 2 heads of 16, 50.5 KiB'
    """
    cache = self  # the name that a `__str__` has
    name, size = type(cache).__name__, _bytes(tree.nbytes(cache))
    if cache.length.dim():  # a batch made by vmap: `sizes` would read the wrong axes
        return f"{name}: {_held(cache)}, {size}"
    L, K, D = sizes(cache)
    return f"{name}: {_held(cache)}, {L} layers, {K} heads of {D}, {size}"


def bar(cache: KVCache) -> str:
    """A cache as HTML: a bar of length over capacity, and its tensors, folded."""
    share = _share(cache)
    inner = (
        ""
        if share is None
        else f'<div style="width:{100 * share:.1f}%;height:100%;background:#3b6ea5"></div>'
    )
    frame = (
        f'<div style="width:18em;height:.7em;border:1px solid #8888;margin:.2em 0">{inner}</div>'
    )
    record = unfolded(type(cache).__name__, cache, opened=False)
    return f"<div><small>{line(cache)}</small>{frame}{record}</div>"


def _held(cache: KVCache) -> str:
    length = errors.peek(cache.length)
    if length is None:
        return f"room for {capacity(cache)} tokens"
    if length.dim():
        least, most = int(length.min()), int(length.max())
        return (
            f"{length.numel()} pasts of {least} to {most} tokens"
            if least < most
            else f"{length.numel()} pasts of {most} tokens"
        )
    if int(length) < 0 or int(length) > 2**59:
        return "given away, or beyond its capacity"
    return tokens(cache)


def _share(cache: KVCache) -> float | None:
    length = errors.peek(cache.length)
    if length is None or length.dim() or not capacity(cache):
        return None
    return min(1.0, max(0.0, int(length) / capacity(cache)))


def _bytes(n: int) -> str:
    power = min((max(n, 1).bit_length() - 1) // 10, 3)
    return f"{n / 1024**power:.1f} {'KMG'[power - 1]}iB" if power else f"{n} B"
