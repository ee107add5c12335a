"""``zolightning sweep``: which method trains best, at equal budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..clock import Clock
from ..console import say
from ..demo.main import prepare, settle_precision
from ..demo.run import Task
from .budget import Budget
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

    Each run has a process of its own and leaves a file; the same command again takes the runs that are not done yet. A sweep
    of your own is a file: ``zolightning sweep --config examples/sweep/ranking.yaml``.

    Args:
        entries: The list of compared entries, in a configuration file. Default: default, reft, spsa, spsa-all, mezo,
            mezo-published, adamw, checkpointed, lora.
        methods: The names of the entries to run now, separated by commas. Default: all.
        seconds: The budget of a run in seconds of training. Validation and logging are not counted.
        forwards: The budget of a run in forward passes, instead of seconds.
        clock: The clock of the seconds. cpu counts the CPU time of all threads, which is fair where other programs share
            the machine.
        seeds: The number of final runs of each entry, unless the entry says otherwise.
        tuning: The share of the budget for each learning rate when several are tried, on a seed of its own.
        target: The accuracy to reach on validation examples, such as 0.8, or the name of the entry whose last mean accuracy
            it is.
        threads: The number of CPU threads of a run.
        task: The model, the texts, the evaluation, the precision, and the places where everything is recorded.
        report_only: Run nothing; report the runs that are finished.
    """
    chosen = choose(entries, methods)
    if target is not None:
        check_target(target, [entry.method.name for entry in choose(entries, None)])
    if (seconds is None) == (forwards is None):
        raise ValueError("a run needs one budget; give `seconds` or `forwards`")
    budget = Budget(seconds, "seconds", clock) if seconds is not None else Budget(float(forwards or 0), "forwards", clock)
    task = replace(task, precision=settle_precision(task.precision))
    plans = [Plan.of(entry, task, budget, seeds, tuning, threads) for entry in chosen]
    if not report_only:
        prepare(task, max(entry.method.batch_size for entry in chosen))
    say(f"{budget} a run, {tuning:g} of it for each learning rate that is tried; {threads} threads")
    outcomes = [o for i, plan in enumerate(plans) for o in finish(plan, f"[{i + 1}/{len(plans)}]", report_only)]
    if not outcomes:
        raise ValueError(f"no final run is finished in {task.out}; run the same command without `report_only`")
    goal = None if target is None else target_accuracy(outcomes, target)
    if target is not None and goal is None:
        say(f"no run of {target}, whose accuracy is the target, is finished: the table leaves out the cost of reaching it")
    image = write(outcomes, Path(task.out), goal)
    say("\n" + text(outcomes, goal))
    say(f"\npicture: {image}\ncompare the runs: zolightning dash --store {task.store}")
