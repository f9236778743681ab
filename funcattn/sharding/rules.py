"""Rules for the decoder, of the table in `transformer.partition`: tensor parallel, fully sharded, or both.

`fsdp` cuts every matrix over "data" besides, along the axis that "tensor" does not cut; the decoder gathers a layer when it needs
it.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from collections.abc import Iterator

from ..records import is_absent
from ..transformer import DATA, TENSOR, Config, Layer, shapes
from ..transformer.partition import CUTS, Division, division
from .partitions import P, PartitionSpec, Rule


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
    n = 1 if config is None or size is None or size % config.kv_heads else size
    rules = []
    for name in CUTS:
        ways: dict[tuple[PartitionSpec, int], list[int]] = {}  # how it is cut -> in which layers
        for number, rank, experts in _weights(config, name):
            cut = division(config, name, rank, n, experts=experts)
            ways.setdefault((_spec(cut, rank, data), cut.block), []).append(number)
        for (spec, block), numbers in ways.items():
            layers = r"\d+" if len(ways) == 1 else f"({'|'.join(map(str, numbers))})"
            path = rf"layers\.{layers}\.{name}" if name in Layer._fields else name
            rules += [Rule(path, spec, block)] if spec else []
    return (*rules, Rule(r".*", P()))


def _weights(config: Config | None, name: str) -> Iterator[tuple[int, int, bool]]:
    """Of each weight of that name: the number of its layer, its axes, and whether it is of a layer of experts."""
    if config is None:  # of matrices alone fsdp cuts something
        yield 0, 1 if CUTS[name].data is None else 2, False
        return
    whole = shapes(config)
    records = enumerate(whole.layers) if name in Layer._fields else [(0, whole)]
    for number, record in records:
        shape = getattr(record, name)
        if not is_absent(shape):
            yield number, len(shape), name in Layer._fields and config.kind(number).experts


def _spec(cut: Division, rank: int, data: str | None) -> PartitionSpec:
    """The axes of the mesh that cut a weight; P() where it is whole."""
    names = {cut.data: data, cut.tensor: TENSOR}
    spec = [names.get(dim) for dim in range(rank)]
    return P(*spec) if any(spec) else P()
