"""Regular expressions from a file, matched in a process that is killed after a time limit.

Python's `re` backtracks: some patterns take a time that grows exponentially with the text, and a
match cannot be interrupted from inside the process.
"""

import json
import multiprocessing.spawn
import os
import subprocess
import sys
from collections.abc import Sequence

TIMEOUT_SECONDS = 5.0
PROGRAM = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([name for name in names if re.fullmatch(pattern, name)], sys.stdout)
"""


class PatternError(ValueError):
    """Why a pattern was not evaluated."""


def full_matches(pattern: str, names: Sequence[str], seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """The names that a regular expression matches as a whole.

    Raises:
        PatternError: it is no regular expression, or takes longer than `seconds`.

    Example:
        >>> full_matches(r".*\\.[qv]_proj", ["layers.0.q_proj", "layers.0.k_proj"])
        ['layers.0.q_proj']
    """
    executable = multiprocessing.spawn.get_executable()
    if not executable or getattr(sys, "frozen", False):
        raise PatternError("a program without a Python interpreter, which matches patterns")
    try:
        done = subprocess.run(
            [os.fspath(executable), "-I", "-S", "-c", PROGRAM],
            input=json.dumps([pattern, list(names)]).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PatternError(f"a pattern that takes more than {seconds:g} seconds") from None
    except OSError as error:
        raise PatternError(f"no process to match a pattern in ({error.strerror})") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        raise PatternError(
            next((line for line in reversed(lines) if line.strip()), "no answer")[:200]
        )
    return json.loads(done.stdout)
