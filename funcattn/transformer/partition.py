"""How each weight of a decoder is sharded over a mesh: the one table of it.

    weight                        over "tensor"                  over "data" (fsdp)
    q k v, gate up, and biases    rows: whole heads, features    columns
    o down                        columns: partial sums, one     rows
                                  psum a region
    embedding head                rows: shards of the vocabulary columns
    positions                     replicated                     columns
    recurrent layers              replicated                     columns or rows
    q_down kv_down                replicated, in a region        columns
    norms, routers, the rest      replicated                     replicated

`sharding.tensor_parallel` and `fsdp` derive their specs from it; `parallel` derives the local
shapes, and which weights are copied into a region. A new weight is one line here; a weight without
one is an error wherever a mesh is bound.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..core import errors
from .config import Config

TENSOR, DATA = "tensor", "data"


@dataclass(frozen=True)
class Cut:
    """How a weight is sharded. Axes count from the last (-2 rows, -1 columns, or that of a vector).

    An axis that the weight does not have is not sharded: head norms (D,) have no rows, (H, D) have.
    """

    tensor: int | None = None  # the axis that is sharded over "tensor"
    data: int | None = None  # the axis that fsdp shards over "data"
    by_head: bool = False  # rows of one head stay together
    of_kv: bool = False  # replicated where there are fewer key/value heads than devices
    region: bool = False  # replicated, and used in a region, where its gradients differ by device
    once: bool = False  # added to a partial sum, by the first device only


WHOLE = Cut()
CUTS = {
    **dict.fromkeys(("embedding", "head"), Cut(-2, -1)),
    "positions": Cut(data=-1),
    # What is beside attention and the feed-forward is computed on every device of "tensor".
    **dict.fromkeys(("layer_embedding", "layer_projection", "input_gate"), Cut(data=-1)),
    **dict.fromkeys(("laurel_down", "streams_in", "streams_out"), Cut(data=-1)),
    **dict.fromkeys(("input_out", "laurel_up"), Cut(data=-2)),
    **dict.fromkeys(("layer_scale", "input_norm", "laurel_norm", "layer_projection_norm"), WHOLE),
    **dict.fromkeys(("stream_router", "stream_norm", "stream_predict"), WHOLE),
    **dict.fromkeys(("stream_correct", "stream_scale"), WHOLE),
    **dict.fromkeys(("router_scale", "expert_scale"), Cut(region=True)),
    **dict.fromkeys(("expert_after_norm", "shared_norm", "shared_after_norm"), WHOLE),
    "attention_gate": Cut(-2, -1),
    "activation_weights": Cut(region=True),
    **dict.fromkeys(("q_norm_bias", "k_norm_bias"), Cut(region=True)),
    **dict.fromkeys(("embedding_in", "embedding_out"), WHOLE),
    **dict.fromkeys(("embedding_norm", "embedding_norm_bias"), WHOLE),
    **dict.fromkeys(("transform", "transform_bias"), WHOLE),
    **dict.fromkeys(("transform_norm", "transform_norm_bias"), WHOLE),
    "q": Cut(-2, -1, by_head=True),
    **dict.fromkeys(("k", "v"), Cut(-2, -1, by_head=True, of_kv=True)),
    **dict.fromkeys(("o", "down", "shared_down"), Cut(-1, -2)),
    **dict.fromkeys(("gate", "up", "shared_gate", "shared_up"), Cut(-2, -1)),
    "q_bias": Cut(-1, by_head=True),
    **dict.fromkeys(("k_bias", "v_bias"), Cut(-1, by_head=True, of_kv=True)),
    **dict.fromkeys(("gate_bias", "up_bias", "sinks"), Cut(-1)),
    "q_norm": Cut(-2, region=True),
    "k_norm": Cut(-2, of_kv=True, region=True),
    **dict.fromkeys(("router", "router_bias", "choice_bias", "shared_router"), Cut(region=True)),
    **dict.fromkeys(("q_down", "kv_down"), Cut(data=-1, region=True)),
    **dict.fromkeys(("q_down_norm", "q_down_bias", "kv_down_norm"), Cut(region=True)),
    "kv_down_bias": Cut(region=True),
    "head_bias": Cut(-1),
    **dict.fromkeys(
        ("attention_norm", "feed_forward_norm", "attention_after_norm", "feed_forward_after_norm"),
        WHOLE,
    ),
    **dict.fromkeys(
        ("attention_norm_bias", "feed_forward_norm_bias", "o_bias", "down_bias"), WHOLE
    ),
    **dict.fromkeys(("norm", "norm_bias"), WHOLE),
    # Recurrent layers are computed on every device of "tensor", outside of a region.
    **dict.fromkeys(("mixer_in", "mixer_gate", "mixer_beta", "mixer_rate"), Cut(data=-1)),
    **dict.fromkeys(("mixer_gate_down", "mixer_rate_down"), Cut(data=-1)),
    "mixer_out": Cut(data=-2),
    **dict.fromkeys(("mixer_in_bias", "mixer_out_bias", "mixer_norm"), WHOLE),
    **dict.fromkeys(("convolution", "convolution_bias", "log_rate", "rate_bias"), WHOLE),
    **dict.fromkeys(("mixer_skip", "mixer_gate_bias", "mixer_rate_bias"), WHOLE),
}
OF_EXPERTS = {"down_bias": Cut(once=True)}  # weights that layers of experts shard differently


class Division(NamedTuple):
    """`Cut` of one weight for one config and number of devices; axes count from the first."""

    tensor: int | None
    data: int | None
    block: int  # rows that stay together
    replicated: bool  # whole; each device uses the rows of the key/value heads of its query heads
    region: bool  # True where its replicated tensors are copied into a region
    once: bool

    def over_tensor(self, shape: tuple[int, ...], n: int) -> tuple[int, ...]:
        """The local shape on one of n devices along "tensor"."""
        return tuple(size // n if dim == self.tensor else size for dim, size in enumerate(shape))


def division(
    config: Config | None, name: str, rank: int, n: int, *, experts: bool = False
) -> Division:
    """How a weight is sharded over n devices along "tensor".

    Args:
        config: None treats rows as divisible anywhere, not by heads.
        name: a field of `Layer` or `Params`.
        rank: the number of axes of the weight.
        n: devices along "tensor".
        experts: True for a layer with experts.

    Raises:
        ValueError: the table has no such weight.

    Law: specs and what a device computes with agree for every weight of every family
        (test_partition.py::test_a_device_takes_the_parts_that_the_specs_give_it).
    """
    if name not in CUTS:
        remedy = "Say in CUTS how it is divided."
        errors.fail(
            "decoder",
            name,
            "a weight of the table in funcattn.transformer.partition",
            "another",
            remedy,
        )
    cut = OF_EXPERTS.get(name, CUTS[name]) if experts else CUTS[name]
    tensor, data = (
        None if axis is None or rank + axis < 0 else rank + axis for axis in (cut.tensor, cut.data)
    )
    few = config is not None and config.kv_heads < n and cut.of_kv and tensor is not None
    block = _block(config, name) if config is not None and cut.by_head else 1
    region = cut.region or tensor is not None
    return Division(None if few else tensor, data, block, few, region, cut.once)


def _block(config: Config, name: str) -> int:
    """Rows of one head: features of a query or key, or of a value."""
    D, Dv = config.head_sizes
    if name.startswith("v"):
        return Dv
    return D - (config.rotary_size or 0) if name == "k" and config.latent_size else D
