"""What the parts of a layer are made of: its norm, and weight x + bias."""

from collections.abc import Sequence

from torch import Tensor

from .. import layers
from ..layers import Weight
from ..records import is_absent
from . import parallel
from .config import Config


def norm_of(config: Config, x: Tensor, weight: Tensor, bias: Weight) -> Tensor:
    """The norm of the config, with a weight and perhaps a bias."""
    if config.norm == "rms":
        return layers.rms_norm(x, weight, epsilon=config.norm_epsilon, offset=config.norm_offset)
    weight = weight + config.norm_offset if config.norm_offset else weight
    return layers.layer_norm(x, weight, bias, epsilon=config.norm_epsilon)


def affine(weight: Weight, bias: Weight, x: Tensor, *, ends: bool = False) -> Tensor:
    """weight x + bias; `ends` is True where the outputs of all devices are summed (psum)."""
    y = parallel.reduce_from_region(layers.linear(weight, x)) if ends else layers.linear(weight, x)
    return y if is_absent(bias) else y + bias


def affines(weights: Sequence[Weight], biases: Sequence[Weight], x: Tensor) -> tuple[Tensor, ...]:
    """`affine` of several weights and one x."""
    each = zip(layers.linears(weights, x), biases, strict=True)
    return tuple(y if is_absent(bias) else y + bias for y, bias in each)
