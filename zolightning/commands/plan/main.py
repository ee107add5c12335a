"""``zolightning plan``: a table of methods, their memory and their seconds a step, and the one to take."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ...records.memory import device_memory as memory_of
from ...records.memory import rss
from ..bench.workload import DTYPES, Spec, Unavailable
from ..console import say
from ..tables import aligned
from .rates import Rates, measured
from .rows import Need, Row, chosen

_GIB = 1 << 30
_HEADER = ("method", "trains", "device GiB", "host GiB", "disk GiB", "moved a step", "s a step", "")


class Limits(NamedTuple):
    """Bytes that there are."""

    device: int
    host: int
    disk: int

    def lacks(self, need: Need) -> list[str]:
        """The tiers that are too small."""
        return [tier for tier in self._fields if getattr(need, tier) > getattr(self, tier)]


class Planned(NamedTuple):
    """A row of the table; ``need`` is None where the method cannot run, and ``reason`` says why it does not fit or run."""

    row: Row
    need: Need | None
    seconds: float = 0.0
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.need is not None and not self.reason


def plan(
    model: str = "smollm2-135m",
    batch: int = 8,
    length: int = 128,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    logits: Literal["full", "last"] = "last",
    device: Literal["cpu", "cuda"] = "cpu",
    device_memory: float | None = None,
    host_memory: float | None = None,
    disk: float | None = None,
    folder: str = ".",
    methods: str | None = None,
) -> None:
    """Say which methods fit a machine. Example: zolightning plan --model opt-13b --precision bf16 --host-memory 16

    A step of each method runs on tensors without data, so any Hugging Face architecture can be planned for, and only its
    configuration is read. Seconds come from rates that are measured on this machine in a few seconds; those of data loading
    are not counted.

    Args:
        model: A named shape (those of ``zolightning bench --help``, such as smollm2-135m, llama-7b, opt-13b), a local folder,
            or a Hugging Face id.
        batch: The number of examples in a step.
        length: The number of tokens in an example.
        precision: The dtype of weights and products.
        logits: full for a loss at every token, last for a loss at the last one, as of a classifier.
        device: cpu, or cuda for a device with a memory of its own.
        device_memory: The memory of the device in GiB. Default: that of this machine.
        host_memory: The memory of the host in GiB. Default: that of this machine.
        disk: The space for work files in GiB. Default: the space that is free in the folder.
        folder: The place of the work files.
        methods: Names of rows, separated by commas. Default: all of them.
    """
    for name, value in (("device_memory", device_memory), ("host_memory", host_memory), ("disk", disk)):
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be > 0 GiB, got {value}")
    spec = Spec(model, batch, length, precision, None, logits, "cpu", torch.get_num_threads())
    limits = _limits(device, device_memory, host_memory, disk, Path(folder))
    rows = chosen(None if methods is None else methods.split(","))
    here = device == "cpu" or torch.cuda.is_available()
    rates = measured(DTYPES[precision], torch.device(device), Path(folder)) if here else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers', of names that the next release has not
        planned = [_planned(row, spec, limits, rates, device == "cpu") for row in rows]
    say(
        f"{model}, {batch} × {length} tokens, {precision}. There are {limits.device / _GIB:.1f} GiB on the device, "
        f"{limits.host / _GIB:.1f} of the host and {limits.disk / _GIB:.1f} of disk, after the {rss() / _GIB:.2f} of the host "
        "that Python and its libraries take."
    )
    say(str(rates) if rates is not None else "There is no CUDA device here, so seconds are not predicted.")
    say(aligned(_HEADER, [_cells(one) for one in planned]))
    say(advice(planned))


def _limits(device: str, own: float | None, host: float | None, disk: float | None, folder: Path) -> Limits:
    machine = memory_of(torch.device("cpu"))
    of_host = max(0, (int(host * _GIB) if host is not None else machine) - rss())
    free = shutil.disk_usage(folder).free if disk is None else int(disk * _GIB)
    if device == "cpu":
        shared = of_host if own is None else min(of_host, int(own * _GIB))
        return Limits(shared, shared, free)
    if own is None and not torch.cuda.is_available():
        raise ValueError("`device=cuda`: PyTorch finds none here, so say how much memory it has: --device-memory 24")
    return Limits(int(own * _GIB) if own is not None else memory_of(torch.device("cuda")), of_host, free)


def _planned(row: Row, spec: Spec, limits: Limits, rates: Rates | None, one_memory: bool) -> Planned:
    try:
        need = row.need(spec)
    except Unavailable as error:
        return Planned(row, None, reason=str(error))
    need = need.on_one_memory() if one_memory else need
    lacks = limits.lacks(need)
    return Planned(row, need, rates.seconds(need) if rates else 0.0, f"too little {' and '.join(lacks)}" if lacks else "")


def _cells(one: Planned) -> tuple[str, ...]:
    need = one.need
    if need is None:
        return (one.row.title, one.row.trains, "", "", "", "", "", one.reason)
    moved = need.read + need.written
    return (
        one.row.title,
        one.row.trains,
        f"{need.device / _GIB:.2f}",
        f"{need.host / _GIB:.2f}" if need.host else "",
        f"{need.disk / _GIB:.2f}" if need.disk else "",
        f"{moved / 1e9:.2f} GB" if moved else "",
        (f"{one.seconds:.0f}" if one.seconds >= 10 else f"{one.seconds:.2g}") if one.seconds else "",
        one.reason or "fits",
    )


def advice(planned: Sequence[Planned]) -> str:
    """The method to take: a gradient by backprop where one fits, since it needs fewer steps; else the quickest that fits."""
    fits = [one for one in planned if one.fits]
    if not fits:
        return "Nothing fits. Take a shorter or smaller batch, a smaller model, or more disk for offload=disk."
    if exact := [one for one in fits if one.row.first_order]:
        return (
            f"Take {exact[0].row.title}: backprop fits and is the better choice, since its gradient needs far fewer steps than "
            "one from forward passes. Zeroth-order steps are for losses without a gradient and for models that do not fit."
        )
    best = min(fits, key=lambda one: one.seconds)
    return f"No backprop fits. Take {best.row.title}: of the methods that fit, its step is the quickest."
