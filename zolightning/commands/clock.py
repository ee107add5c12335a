"""The clock of measured seconds."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

Clock: TypeAlias = Literal["wall", "cpu"]
"""'cpu' is the process's CPU time on all its threads, which other programs on the machine hardly change."""


def now(clock: Clock) -> float:
    """Seconds since some time before."""
    return time.process_time() if clock == "cpu" else time.perf_counter()
