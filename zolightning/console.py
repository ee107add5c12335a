"""Commands talk to a person: progress and results go to standard output as they come."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
