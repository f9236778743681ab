"""Low-rank adaptation: a few trained numbers beside a frozen weight.

adaptations   lora, merge_lora, without_lora; the record of an adapted weight
"""

from .adaptations import (
    MATRICES,
    Lora,
    is_adapted,
    is_trained,
    lora,
    merge_lora,
    without_lora,
)

__all__ = [
    "MATRICES",
    "Lora",
    "is_adapted",
    "is_trained",
    "lora",
    "merge_lora",
    "without_lora",
]
