"""Whether training fits on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .source.base import Reads, Run
from .spent import Spent
from .transforms import summarise
from .words import GIB

SIZES = (*(2.0**k for k in range(-20, 0)), 1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""Memories of common devices in GiB, and smaller ones for small models."""

_UNITS = ((1.0, "GiB"), (2.0**-10, "MiB"), (2.0**-20, "KiB"))
_WHOLE = ("peak", "rss")
_DEVICE = "zo.device_memory"


def peak(run: Run, source: Reads) -> float:
    """Peak memory of training in GiB; nan when the run has not logged it."""
    return Spent(source).peak(run) / GIB


def unit(largest: float) -> tuple[float, str]:
    """The unit in which a budget is chosen: how many GiB it is, and its name.

    Args:
        largest: the upper end of the slider, in GiB.
    """
    return next((size, name) for size, name in _UNITS if largest >= size or size == _UNITS[-1][0])


def named(size: float) -> str:
    """A budget in words: "12 GiB", "64 MiB".

    Args:
        size: in GiB.
    """
    whole, name = unit(size)
    return f"{size / whole:.4g} {name}"


def parts(runs: Sequence[Run], source: Reads) -> dict[str, list[float]]:
    """The parts of the runs' peaks, in GiB: those that they logged, and the rest of the peak as ``other``.

    Args:
        runs: each has a peak.
        source: its points.
    """
    names = sorted({key.removeprefix("memory/") for run in runs for key in run.keys if key.startswith("memory/")} - {*_WHOLE})
    found = {name: [_last(run, f"memory/{name}", source) for run in runs] for name in names}
    peaks = [peak(run, source) for run in runs]
    rest = [max(0.0, whole - sum(values[i] for values in found.values())) for i, whole in enumerate(peaks)]
    return found | ({"other": rest} if any(value > 0.005 * one for value, one in zip(rest, peaks, strict=True)) else {})


def devices(runs: Sequence[Run]) -> dict[float, str]:
    """Memories in GiB of the devices that runs say they ran on (tag ``zo.device_memory``, in bytes), and words for each."""
    found = set()
    for run in runs:
        text = run.tags.get(_DEVICE, "")
        if text.isascii() and text.isdigit() and 0 < int(text) < 2**60:
            found.add(int(text) / GIB)
    return {size: f"device: {named(size)}" for size in sorted(found)}


def suggested(peaks: Sequence[float]) -> float:
    """A budget that some fit and others do not, in GiB: a common size near the middle of the peaks.

    Args:
        peaks: in GiB, finite.
    """
    if not peaks:
        return 1.0
    middle = math.sqrt(max(min(peaks), SIZES[0]) * max(*peaks, SIZES[0]))
    return float(min(SIZES, key=lambda size: abs(math.log(size / middle))))


def largest(peaks: Sequence[float], budget: float) -> float:
    """The upper end of a budget's slider: a common size above everything that is shown."""
    most = max([*peaks, budget])
    return float(next((size for size in SIZES if size > 1.2 * most), math.ceil(2 * most)))


def _last(run: Run, key: str, source: Reads) -> float:
    value = summarise(source.series(run.id, key), "max").last if key in run.keys else 0.0
    return value / GIB if math.isfinite(value) else 0.0
