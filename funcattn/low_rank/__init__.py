"""Low-rank adaptation: a few trained numbers beside a frozen weight.

adaptations   lora, merge_lora, without_lora; the record of an adapted weight
stacks        stack_lora, choose_lora: several adaptations in one tree, one for each row
"""

from .adaptations import (
    MATRICES,
    Lora,
    is_adapted,
    is_trained,
    lora,
    merge_lora,
    row_norms,
    without_lora,
)
from .stacks import LoraStack, choose_lora, stack_lora

__all__ = [
    "MATRICES",
    "Lora",
    "LoraStack",
    "choose_lora",
    "is_adapted",
    "is_trained",
    "lora",
    "merge_lora",
    "row_norms",
    "stack_lora",
    "without_lora",
]
