"""How weights are offloaded, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Offload:
    """Weights live elsewhere, and come into the device's memory one matrix at a time.

    Args:
        tier: "cpu" for host memory, "disk" for files, which no page cache holds.
        pool: bytes of weights, with their optimizer's state, that are in memory at once. None: twice the largest matrix.
        prefetch: matrices that are read ahead, >= 0.
        write_every: steps whose updates a matrix collects before it is written, >= 1. More spare a disk; each read then
            replays the updates that the disk lacks.
        folder: of the work files under "disk", with room for two copies of the trained weights. None: ``offload`` beside
            the run's ledger.
        lockstep: forwards of a step that go through the weights together, so that each weight is read once for all of them, and
            that need memory for so many activations, >= 1. It is done where the first batch shows the same losses.

    Raises:
        ValueError: a value that makes no sense.
    """

    tier: Literal["cpu", "disk"] = "disk"
    pool: int | None = None
    prefetch: int = 2
    write_every: int = 1
    folder: str | Path | None = None
    lockstep: int = 2

    def __post_init__(self) -> None:
        if self.tier not in ("cpu", "disk"):
            raise ValueError(f"`Offload(tier=...)` must be 'cpu' or 'disk', got {self.tier!r}")
        for name, value, least in (
            ("pool", self.pool, 0),
            ("prefetch", self.prefetch, 0),
            ("write_every", self.write_every, 1),
            ("lockstep", self.lockstep, 1),
        ):
            if value is not None and (int(value) != value or value < least):
                raise ValueError(f"`Offload({name}=...)` must be a whole number >= {least}, got {value}")
