"""Families of models: how Config and Params are spelled in the files of others
(`checkpoints.families`).
"""

from .checkpoints.families import *  # noqa: F403 (the names of its __all__)
from .checkpoints.families import __all__ as __all__
