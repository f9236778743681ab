"""What is computed from tensors, cached as long as they live and are not modified.

    prepared_from([codes, scale], make, "tiles")    make() the first time, its result afterwards

For weights in another memory layout, which is worth computing once and not at every step. A whole
tree of weights is recognized by `fingerprints` instead, without a Python loop over its tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import ref

from torch import Tensor

T = TypeVar("T")


class _Entry(NamedTuple):
    """The tensors that a value was computed from, without keeping them alive, and the value."""

    alive: tuple[ref[Tensor], ...]
    versions: tuple[int, ...]
    value: Any


_entries: dict[tuple[Any, ...], _Entry] = {}  # by kind and ids


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each tensor was modified in place; of inference tensors torch does not count it."""
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def prepared_from(sources: Sequence[Tensor], make: Callable[[], T], kind: str) -> T:
    """The cached result of make() for these tensors, recomputed after an in-place change.

    Modifications that torch does not count in `_version` are missed, as by `Fingerprint`. Threads
    may use it at once: two that meet no entry may both call make, and get results of equal value.

    Args:
        sources: tensors; the entry is dropped when one of them is freed.
        make: called without arguments; computes the value from the tensors, and must not return
            one of them, or a view, which would keep it alive.
        kind: distinguishes several values that are computed from the same tensors.

    Law: one call of make for the same unmodified tensors, none kept alive
        (test_tensor_cache.py::test_it_is_made_once_for_the_same_tensors,
        test_tensor_cache.py::test_an_entry_dies_with_any_of_its_tensors).
    """
    key = (kind, *map(id, sources))
    held = _entries.get(key)
    if held is not None:
        for source, alive, version in zip(sources, held.alive, held.versions, strict=True):
            if alive() is not source or version != (
                0 if source.is_inference() else source._version
            ):
                break
        else:
            return held.value
    forget = functools.partial(_entries.pop, key, None)
    alive = tuple(ref(source, lambda _: forget()) for source in sources)
    before = versions(sources)  # what another thread writes while make runs is a later version
    _entries[key] = made = _Entry(alive, before, make())
    return made.value
