"""Rules for the decoder: tensor parallel, fully sharded over the data, or both.

    path                         tensor_parallel             why
    q k v gate up, and biases    rows over "tensor"          whole heads, whole features: nothing is said between devices
    o down                       columns over "tensor"       each makes a part of the sum: one psum a block
    embedding head               rows over "tensor"          a part of the vocabulary each
    norms, routers, the rest     whole

`fsdp` cuts every matrix over "data" besides, along the axis that "tensor" does not cut; the decoder gathers a layer when it needs
it.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from typing import Any

from ..transformer import DATA, TENSOR, Config
from .partitions import P, PartitionSpec, Rule

LAYER = r"layers\.\d+\."


def tensor_parallel(config: Config | None = None, *, size: int | None = None) -> tuple[Rule, ...]:
    """Tensor parallelism over the axis "tensor".

    Args:
        config: whose heads are not cut through, and whose experts are told from dense layers. None takes every weight for what
            its path says, and finds heads that were cut through when the model runs.
        size: devices along "tensor". Where config has fewer key/value heads than that, they are kept whole on every device (each
            computes those that its query heads read, and their gradients are summed), if the heads divide the devices.

    Example:
        >>> from funcattn.sharding import specs, Grid
        >>> from funcattn.transformer import decoder
        >>> from funcattn.randomness import key
        >>> config = Config(layers=1)
        >>> specs(decoder(config).init(key(0)), Grid(tensor=2), tensor_parallel(config)).layers[0].o
        P(None, 'tensor')
    """
    return _rules(config, size, None)


def fsdp(config: Config | None = None, *, size: int | None = None) -> tuple[Rule, ...]:
    """Every matrix over the axis "data", and over "tensor" where the mesh has it; vectors of a layer are whole.

    Args: as `tensor_parallel`.
    """
    return _rules(config, size, DATA)


def replicated() -> tuple[Rule, ...]:
    """Everything whole on every device: plain data parallelism."""
    return (Rule(r".*", P()),)


def _rules(config: Config | None, size: int | None, data: str | None) -> tuple[Rule, ...]:
    D = 1 if config is None else config.head_size
    few = config is not None and size is not None and config.kv_heads < size and size % config.kv_heads == 0
    kv_rows: PartitionSpec = P(None, data) if few else P(TENSOR, data)
    kv_vector: PartitionSpec = P() if few else P(TENSOR)
    experts: Any = []
    if config is not None and config.experts:
        numbers = "|".join(str(i) for i in range(config.layers) if config.kind(i).experts)
        layer = rf"layers\.({numbers})\."
        experts = [
            Rule(layer + "(gate|up)", P(None, TENSOR, data)),
            Rule(layer + "down", P(None, data, TENSOR)),
            Rule(layer + "(gate|up)_bias", P(None, TENSOR)),
        ]
    per_head = config is not None and config.head_norm == "layer"
    norms = [Rule(LAYER + "q_norm", P(TENSOR, None)), Rule(LAYER + "k_norm", P() if few else P(TENSOR, None))] if per_head else []
    return (
        *experts,
        *norms,
        Rule(LAYER + "q", P(TENSOR, data), D),
        Rule(LAYER + "(k|v)", kv_rows, 1 if few else D),
        Rule(LAYER + "o", P(data, TENSOR)),
        Rule(LAYER + "q_bias", P(TENSOR), D),
        Rule(LAYER + "(k|v)_bias", kv_vector, 1 if few else D),
        Rule(LAYER + "sinks", P(TENSOR)),
        Rule(LAYER + "(gate|up)", P(TENSOR, data)),
        Rule(LAYER + "down", P(data, TENSOR)),
        Rule(LAYER + "(gate|up)_bias", P(TENSOR)),
        Rule("embedding|head", P(TENSOR, data)),
        Rule("positions", P(None, data)),
        Rule(r".*", P()),
    )
