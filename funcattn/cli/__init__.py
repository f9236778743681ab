"""The command line: `funcattn generate`, `chat`, `inspect`, `eval`, `train` and `finetune`; one
file a command.
"""

from . import terminal
from .commands import main

__all__ = ["main", "terminal"]
