"""One run: memory of each method alone, then all of them set up together, warmed up, and timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import torch

from ...records.memory import tensor_bytes
from ..clock import Clock
from ..processes import quiet_libraries
from .machine import machine, versions
from .measure import Gemm, Timed, count_flops, fits, interleave, is_exact, out_of_memory, timed
from .methods import FORWARD, FORWARD_MASTER, LR, METHODS, REFERENCE, Running
from .peak import Memory, measure_memory
from .report import Row, make_row
from .workload import Spec, Unavailable, Workload

Say = Callable[[str], None]
_GEMM = "matrix product"


@quiet_libraries()
def run(
    spec: Spec, names: Sequence[str], *, repeats: int, warmup: int, memory: bool, say: Say, clock: Clock = "wall"
) -> tuple[dict[str, Any], list[Row]]:
    """Measure the methods.

    Args:
        spec: the workload.
        names: The names of the methods; 'forward' is among them, and 'forward-master' where there is a master.
        repeats: timed steps of each.
        warmup: steps of each before that.
        memory: measure peak memory too.
        say: told about progress.
        clock: of the seconds.

    Returns:
        the facts that the figures depend on, and the rows.
    """
    torch.set_num_threads(spec.threads)
    peaks = _memory(spec, names, say) if memory else {}
    session = Session(spec, peaks, clock)
    say(f"{session.work!r} on {spec.device}, {spec.threads} CPU threads")
    for i, name in enumerate(names):
        session.start(name, warmup)
        outcome = f": skipped, {session.skipped[name]}" if name in session.skipped else ""
        say(f"[warm-up {i + 1}/{len(names)}] {name}{outcome}")
    seconds = session.time(repeats, say)
    gemm_gflops = session.gemm.gflops(min(seconds[_GEMM]))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(spec) | {"repeats": repeats, "warmup": warmup, "clock": clock},
        "machine": machine(session.work.device),
        "versions": versions(),
        "model": {"name": spec.model, "parameters": session.work.numel, "bytes": tensor_bytes(session.work.model.parameters())},
        "gemm": {"size": session.gemm.size, "dtype": spec.dtype, "gflops": gemm_gflops},
    }
    return facts, session.rows(names, seconds, gemm_gflops)


def _memory(spec: Spec, names: Sequence[str], say: Say) -> dict[str, Memory]:
    peaks: dict[str, Memory] = {}
    for i, name in enumerate(names):
        found = peaks[name] = measure_memory(spec, METHODS[name])
        text = f"skipped, {found.reason}" if found.peak is None else f"{found.peak / 1e6:.1f} MB"
        say(f"[memory {i + 1}/{len(names)}] {name}: {text}")
    return peaks


class Session:
    """The methods of one process, on one set of weights.

    Args:
        spec: the workload.
        peaks: memory of each method, where it was measured.
        clock: of the seconds.
    """

    def __init__(self, spec: Spec, peaks: Mapping[str, Memory], clock: Clock = "wall") -> None:
        self.peaks, self.clock = peaks, clock
        self.work = Workload(spec)
        self.plain = Workload(spec.plain) if spec.master else self.work
        self.gemm = Gemm(spec.compute_dtype, self.work.device, clock=clock)
        self.running: dict[str, Running] = {}
        self.exact: dict[str, bool | None] = {}
        self.flops: dict[str, int] = {}
        self.skipped: dict[str, str] = {}

    def start(self, name: str, warmup: int) -> None:
        """Set a method up and warm it up, or note why not."""
        method, memory = METHODS[name], self.peaks.get(name)
        work = self.plain if method.plain else self.work  # for a quantised method: its model is smaller than this
        weights = tensor_bytes(work.model.parameters())
        needed = method.state * weights
        if memory is not None:
            if memory.peak is None:
                self.skipped[name] = memory.reason
                return
            needed = max(needed, memory.peak - memory.weights)
        if not fits(needed, work.device):
            self.skipped[name] = f"needs {needed / 1e9:.1f} GB in addition to the weights, which is not free"
            return
        try:
            running = method.setup(work if method.kind is None else method.workload(work.spec))
            exact = is_exact(running)
            counted = name == FORWARD.name or method.backprop
            flops = count_flops(running) if counted else self.flops[FORWARD.name]
            for _ in range(warmup):
                running.step(LR)
            while running.looking():
                running.step(LR)
        except Unavailable as error:
            self.skipped[name] = str(error)
        except Exception as error:
            if not out_of_memory(error) or name == FORWARD.name:
                raise
            self.skipped[name] = "out of memory"
            gc.collect()
        else:
            self.running[name], self.exact[name], self.flops[name] = running, exact, flops

    def time(self, repeats: int, say: Say) -> dict[str, list[float]]:
        """Seconds of each step, the matrix product's among them."""
        steps: dict[str, Timed] = {_GEMM: self.gemm}
        steps |= {name: partial(timed, running, self.work.device, self.clock) for name, running in self.running.items()}
        self.gemm()
        return interleave(steps, repeats, lambda number: say(f"[round {number}/{repeats}]"))

    def rows(self, names: Sequence[str], seconds: Mapping[str, Sequence[float]], gemm_gflops: float) -> list[Row]:
        """A row for each method, also for those that did not run."""
        inference = self.peaks.get(FORWARD_MASTER.name if self.work.spec.master else FORWARD.name)
        return [
            Row(name, skipped=self.skipped[name])
            if name in self.skipped
            else make_row(
                name,
                seconds[name],
                trained=self.running[name].trained,
                forwards=median(seconds[FORWARD.name]),
                reference=median(seconds[REFERENCE.name]) if REFERENCE.name in seconds else None,
                flops=self.flops[name],
                gemm_gflops=gemm_gflops,
                peak=self.peaks[name].peak if name in self.peaks else None,
                inference_peak=None if inference is None else inference.peak,
                exact=self.exact[name],
            )
            for name in names
        ]
