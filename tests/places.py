"""Where the checkout is: a file of tests, in whatever folder, and what it starts find the rest of
it here.
"""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
