"""Attention for models written against torch and transformers.

| name | what it does |
| --- | --- |
| closed | replaces attention, activations and checkpoints of torch inside a `with`: they compose |
| override_sdpa | its first name |
| register_transformers | makes "funcattn" an attention implementation of transformers |
| functional | splits a module into a pure function and its params |
| nested_attention | attention over jagged NestedTensors, without padding |
| document_mask | the mask with which `attention` of their values equals it |
| lm_eval_model, register_lm_eval | a model for the lm-evaluation-harness |
"""

from .closing import closed, override_sdpa
from .harness import lm_eval_model, register_lm_eval
from .huggingface import register_transformers
from .jagged import document_mask, nested_attention
from .modules import functional

__all__ = [
    "closed",
    "document_mask",
    "functional",
    "lm_eval_model",
    "nested_attention",
    "override_sdpa",
    "register_lm_eval",
    "register_transformers",
]
