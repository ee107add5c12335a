"""The speed goals of the project beside what this machine gives: one table, every row by ``zolightning bench``.

    python examples/bench_table.py

SmolLM2-135M (random weights, no download), SPSA on all weights with exact restore, against two forwards and the published MeZO
step. About twelve minutes on two quiet cores; ``--no-memory`` leaves out the peaks and four of them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from zolightning.commands.bench.main import select_methods
from zolightning.commands.bench.report import Row
from zolightning.commands.bench.run import run
from zolightning.commands.bench.workload import Spec

OURS = ("spsa-rademacher", "spsa-gaussian")


class Goal(NamedTuple):
    """A workload and what is asked of a step on it."""

    batch: int
    length: int
    dtype: str
    master: str | None
    ratio: float
    """Most that a step with ±1 noise may take, in units of two forwards on weights of the compute dtype."""
    speedup: float
    """Least over reference MeZO with weights stored alike."""

    @property
    def name(self) -> str:
        stored = f"{self.master} masters, " if self.master else ""
        return f"{stored}{self.dtype} {self.batch}×{self.length}"


GOALS = (
    Goal(8, 64, "bf16", None, 1.10, 6.5),
    Goal(16, 128, "bf16", None, 1.10, 2.3),
    Goal(1, 64, "bf16", None, 1.30, 18),
    Goal(8, 64, "bf16", "fp32", 1.25, 6.5),
    Goal(8, 64, "fp32", None, 1.10, 2.5),
)
GAUSSIAN, PEAK = 1.25, 1.02  # of two forwards; of the peak of inference
COLUMNS = ("", "2 forwards ms", "±1 ÷ them", "goal", "Gaussian ÷", "goal", "× MeZO", "goal", "bound", "peak ÷", "goal", "exact")


def paired(row: Row, forwards: Row) -> str:
    """The ratio of the medians, and the spread of the ratios of neighbours in time."""
    ratios = [a / b for a, b in zip(row.seconds, forwards.seconds, strict=True)]
    return f"{row.ratio_to_forwards:.3f} ({min(ratios):.2f}–{max(ratios):.2f})"


def line(goal: Goal, rows: dict[str, Row]) -> list[str]:
    forwards, mezo, (signs, gaussian) = rows["forward"], rows["reference-mezo"], (rows[name] for name in OURS)
    return [
        goal.name,
        f"{forwards.step_ms:.0f}",
        paired(signs, forwards),
        f"{goal.ratio:.2f}",
        paired(gaussian, forwards),
        f"{max(goal.ratio, GAUSSIAN):.2f}",
        f"{signs.speedup:.2f}",
        f"{goal.speedup:g}",
        f"{median(mezo.seconds) / median(forwards.seconds):.2f}",
        "–" if signs.memory_ratio is None else f"{signs.memory_ratio:.3f}",
        f"{PEAK}",
        "yes" if signs.exact and gaussian.exact else "no",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu where other programs share the machine")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench-table.json"))
    options = parser.parse_args()

    lines, results = [list(COLUMNS)], []
    for goal in GOALS:
        print(f"\n{goal.name}", flush=True)
        spec = Spec(options.model, goal.batch, goal.length, goal.dtype, goal.master, "last", "cpu", options.threads)
        names = select_methods(["reference-mezo", *OURS], goal.master is not None)
        memory = not options.no_memory
        counts = {"repeats": options.repeats, "warmup": options.warmup, "memory": memory, "clock": options.clock}
        facts, rows = run(spec, names, say=print, **counts)
        lines.append(line(goal, {row.method: row for row in rows}))
        results.append({**facts, "goal": goal._asdict(), "rows": [asdict(row) for row in rows]})
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # what is done is kept

    print()
    for i, cells in enumerate(lines):
        print("| " + " | ".join(cells) + " |")
        if not i:
            print("| --- |" + " ---: |" * (len(cells) - 1))
    print(f"\n'bound' is what a step of two forwards and nothing else would gain over MeZO here. {options.out} has it all.")


if __name__ == "__main__":
    main()
