"""Backprop for the last two blocks and probes for the others, beside both parents and LoRA, at equal CPU seconds.

    python examples/hybrid.py --seconds 100 --out zolightning-hybrid     # three seeds of five methods, about half an hour

``ZOStrategy("mezo", backprop="last:2")`` is the hybrid of ZO-Bench (arXiv:2402.11592). Each run is one of the demo: its model,
texts and evaluation, in a process of its own, whose peak memory is the run's. A method's first run has four steps, which say
how many fill the seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch.optim import AdamW

from zolightning.commands.demo.methods import ADAMW, LORA, MEZO, ZO, Method
from zolightning.commands.demo.module import MakeOptimizer
from zolightning.commands.demo.report import text_table, write
from zolightning.commands.demo.run import Result, Task, machine, run_alone, settings
from zolightning.methods.backprop import Backprop


@dataclass(frozen=True)
class Hybrid(Method):
    """A row whose last blocks AdamW steps, and the others the recipe."""

    def make_optimizer(self) -> MakeOptimizer:
        """Of the module: the recipe brings its own for the weights that are probed."""
        return partial(AdamW, lr=self.lr or 0.0, weight_decay=0.0)


LAST = {"backprop": Backprop("last:2", lr=ADAMW.lr)}
METHODS: dict[str, Method] = {
    "mezo": MEZO,
    "zo": ZO,
    "hybrid": Hybrid("hybrid", "MeZO, last 2 blocks by AdamW", recipe="mezo", overrides=LAST, lr=1e-6),
    "lora": LORA,
    "adamw": ADAMW,
}


def steps_within(task: Task, method: Method, seconds: float) -> int:
    """The number of steps that take so many CPU seconds of training."""
    tried = run_alone(task, replace(method, name=f"{method.name}-first", steps=4), 0, threads=1)
    return max(1, round(4 * seconds / tried.cpu_seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=100.0, help="CPU seconds of training of each run (default: 100)")
    parser.add_argument("--test", type=int, default=300, help="test texts (default: 300)")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--out", default="zolightning-hybrid", help="the folder for the results")
    options = parser.parse_args()
    store = f"sqlite:///{Path(options.out, 'mlflow.db')}"
    task = Task(
        out=options.out,
        store=store,
        experiment="hybrid",
        offline=options.offline,
        validation=64,
        test=options.test,
        validations=1,
    )
    Path(options.out).mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for method in (METHODS[name] for name in options.methods):
        steps = steps_within(task, method, options.seconds)
        for seed in options.seeds:
            results.append(run_alone(task, replace(method, steps=steps), seed, threads=1))
            print(f"{method.title}, seed {seed}: {100 * results[-1].accuracy:.1f} % after {steps} steps", flush=True)
            write(results, Path(options.out), settings(task) | {"machine": machine()})
    print(text_table(results))


if __name__ == "__main__":
    main()
