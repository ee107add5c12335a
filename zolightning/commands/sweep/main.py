"""``zolightning sweep``: which method trains best, at equal budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..console import say
from ..demo.main import prepare, settle_precision
from ..demo.run import Task
from .budget import Budget, Clock
from .entries import Entry, choose
from .plan import Plan, finish
from .report import check_target, target_accuracy, text, write

_TASK = Task(experiment="zolightning-sweep", out="zolightning-sweep", precision="auto")


def sweep(
    entries: list[Entry] | None = None,
    methods: list[str] | str | None = None,
    seconds: float | None = None,
    forwards: int | None = None,
    clock: Clock = "wall",
    seeds: int = 2,
    tuning: float = 0.2,
    target: str | None = None,
    threads: int = 1,
    task: Task = _TASK,
    report_only: bool = False,
) -> None:
    """Compare methods and learning rates over seeds at equal budgets. Example: zolightning sweep --seconds 300

    Each run has a process of its own and leaves a file; the same command again does what is not done yet. A sweep of your
    own is a file: ``zolightning sweep --config examples/sweep/ranking.yaml``.

    Args:
        entries: what is compared, in a file. Default: default, reft, spsa, spsa-all, mezo, mezo-published, adamw,
            checkpointed, lora.
        methods: names of the entries to run now, separated by commas. Default: all.
        seconds: training seconds of a run; validation and logging are not counted.
        forwards: instead of seconds, forward passes of a run.
        clock: of the seconds. cpu: CPU time of all threads, fair where other programs share the machine.
        seeds: final runs of each entry, unless it says otherwise.
        tuning: share of the budget that each learning rate gets when several are tried, on a seed of its own.
        target: accuracy to reach, such as 0.8, or the name of the entry whose last mean accuracy it is, on validation examples.
        threads: CPU threads of a run.
        task: model, texts, evaluation, precision (auto: by the measured speed of matrix products), and where everything is
            recorded.
        report_only: run nothing; report what is finished.
    """
    chosen = choose(entries, methods)
    if target is not None:
        check_target(target, [entry.method.name for entry in choose(entries, None)])
    if (seconds is None) == (forwards is None):
        raise ValueError("give the budget of a run: one of `seconds` and `forwards`")
    budget = Budget(seconds, "seconds", clock) if seconds is not None else Budget(float(forwards or 0), "forwards", clock)
    task = replace(task, precision=settle_precision(task.precision))
    plans = [Plan.of(entry, task, budget, seeds, tuning, threads) for entry in chosen]
    if not report_only:
        prepare(task, max(entry.method.batch_size for entry in chosen))
    say(f"{budget} a run, {tuning:g} of it for each learning rate that is tried; {threads} threads")
    outcomes = [o for i, plan in enumerate(plans) for o in finish(plan, f"[{i + 1}/{len(plans)}]", report_only)]
    if not outcomes:
        raise ValueError(f"no final run is finished in {task.out}")
    goal = None if target is None else target_accuracy(outcomes, target)
    if target is not None and goal is None:
        say(f"no run of {target}, whose accuracy is the target, is finished: what it took is left out of the table")
    image = write(outcomes, Path(task.out), goal)
    say("\n" + text(outcomes, goal))
    say(f"\npicture: {image}\ncompare the runs: zolightning dash --store {task.store}")
