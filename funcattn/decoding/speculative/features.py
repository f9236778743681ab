"""What a drafter hears of the target: values at its taps, for each token that is read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import taps
from ...caches import Delta
from ...core import errors
from ...models import Model, Past
from ...records import ABSENT
from ...tree import Tree

OUTPUT = ("output",)  # the tap of what `Model.hidden` returns


class Features:
    """The values at some taps of a forward pass, side by side: (T, F) of T tokens.

    What `hidden` returns is taken from there, without a listener: compiled steps stay compiled.

    Args:
        verb: of error messages.
        names: of the taps, such as `layers.3.output`; none listens to nothing.
        model: the target. The attribute `model` is the one to call inside of `listening`.
    """

    def __init__(self, verb: str, names: Sequence[str], model: Model) -> None:
        self.verb, self.names = verb, tuple(names)
        self.heard: dict[str, list[Tensor]] = {}
        self.open = False
        self.model = _telling(model, self._hear) if self.names == OUTPUT else model

    def _hear(self, name: str, x: Tensor) -> None:
        if self.open and name in self.heard:
            self.heard[name].append(x)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the taps; a listener outside goes on."""
        if not self.names:
            yield
            return
        self.heard, self.open = {name: [] for name in self.names}, True
        try:
            if self.names == OUTPUT:
                yield
                return
            outer = taps.listener()

            def hear(name: str, x: Tensor) -> Tensor:
                x = x if outer is None else outer(name, x)
                self._hear(name, x)
                return x

            with taps.listening(hear):
                yield
        finally:
            self.open = False

    def rows(self, T: int, room: int | None = None) -> list[Tensor]:
        """[features (T, F)] of the T tokens read last, padded to `room` rows; [] without taps."""
        if not self.names:
            return []
        sides = [torch.cat(found, -2) if found else None for found in self.heard.values()]
        for name, side in zip(self.names, sides, strict=True):
            if side is None or side.shape[-2] != T:
                got = "nothing" if side is None else f"{side.shape[-2]} tokens"
                remedy = "A trained head drafts for a decoder that reads each token once."
                errors.fail(self.verb, f"the tap {name}", f"heard for {T} tokens", got, remedy)
        found = torch.cat([side for side in sides if side is not None], -1)
        return [found if room is None else F.pad(found, (0, 0, 0, room - T))]


def _telling(model: Model, tell: Callable[[str, Tensor], None]) -> Model:
    """The model, which tells what its `hidden` returns."""

    def hidden(
        params: Tree, tokens: Tensor, cache: Past = ABSENT, **given: object
    ) -> tuple[Tensor, Delta]:
        x, delta = model.hidden(params, tokens, cache, **given)  # pyright: ignore[reportArgumentType]
        tell("output", x)
        return x, delta

    return model.wrap("heard", lambda other: _telling(other, tell), {"hidden": hidden})
