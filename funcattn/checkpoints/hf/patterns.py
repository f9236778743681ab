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
patterns, names = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(p, name)] for p in patterns], sys.stdout)
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
    return _matches([pattern], names, seconds)[0]


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Name -> the first of the patterns that matches it, or the end of it behind a point.

    It is how PEFT reads rank_pattern and alpha_pattern.

    Raises:
        PatternError: one is no regular expression, or they take too long.

    Example:
        >>> first_matches(["k_proj", "[qk]_proj"], ["layers.0.q_proj", "layers.0.o_proj"])
        {'layers.0.q_proj': '[qk]_proj'}
    """
    if not patterns:
        return {}
    whole = [rf"(.*\.)?({pattern})" for pattern in patterns]
    found: dict[str, str] = {}
    for pattern, matched in zip(patterns, _matches(whole, names, TIMEOUT_SECONDS), strict=True):
        found = dict.fromkeys(matched, pattern) | found
    return found


def _matches(patterns: Sequence[str], names: Sequence[str], seconds: float) -> list[list[str]]:
    executable = multiprocessing.spawn.get_executable()
    if not executable or getattr(sys, "frozen", False):
        raise PatternError("a program without a Python interpreter, which matches patterns")
    try:
        done = subprocess.run(
            [os.fspath(executable), "-I", "-S", "-c", PROGRAM],
            input=json.dumps([list(patterns), list(names)]).encode(),
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
