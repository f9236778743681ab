"""What a drafter hears of the target: values at its taps, for each token that is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import taps
from ...core import errors


class Features:
    """The values at some taps of a forward pass, side by side: (T, F) of T tokens.

    Args:
        verb: of error messages.
        names: of the taps, such as `layers.3.output`; none listens to nothing.
    """

    def __init__(self, verb: str, names: Sequence[str]) -> None:
        self.verb, self.names = verb, tuple(names)
        self.heard: dict[str, list[Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the taps; a listener outside goes on."""
        if not self.names:
            yield
            return
        outer, self.heard = taps.listener(), {name: [] for name in self.names}

        def hear(name: str, x: Tensor) -> Tensor:
            x = x if outer is None else outer(name, x)
            if name in self.heard:
                self.heard[name].append(x)
            return x

        with taps.listening(hear):
            yield

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
