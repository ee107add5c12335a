"""The runs of an entry: first those that choose its learning rate, then the final ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from filelock import FileLock

from ..console import say
from ..demo.run import Task
from ..processes import OwnProcess, ProcessFailed
from .budget import Budget
from .entries import Entry
from .run import Outcome, Run, train

TUNING_SEED = 1000
"""Of the runs that choose a learning rate; final runs count theirs from 0."""


@dataclass(frozen=True)
class Plan:
    """The runs of an entry."""

    entry: Entry
    tuning: tuple[Run, ...]
    """A short run for each learning rate; none when there is one."""
    finals: tuple[Run, ...]
    """A run for each seed, with the first of the learning rates until another is chosen."""

    @staticmethod
    def of(entry: Entry, task: Task, budget: Budget, seeds: int, tuning: float, threads: int) -> Plan:
        """The plan of an entry in a sweep; see :func:`.main.sweep` for the arguments.

        Raises:
            ValueError: a share, seeds or threads out of range.
        """
        if not 0 < tuning <= 1:
            raise ValueError(f"`tuning` must be in (0, 1], got {tuning}")
        for name, value in (("seeds", seeds), ("threads", threads)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}")
        task = replace(task, precision=entry.precision or task.precision)
        budget = replace(budget, amount=entry.amount or budget.amount)
        base = replace(entry.method, steps=0, seeds=1)
        short = replace(budget, amount=tuning * budget.amount)
        quick = replace(task, validations=1)
        tried = [Run(quick, replace(base, lr=lr), TUNING_SEED, short, threads, final=False) for lr in entry.lrs]
        first = replace(base, lr=entry.lrs[0])
        finals = [Run(task, first, seed, budget, threads, final=True) for seed in range(entry.seeds or seeds)]
        return Plan(entry, tuple(tried) if len(tried) > 1 else (), tuple(finals))


def finish(plan: Plan, label: str, report_only: bool = False) -> list[Outcome]:
    """Run the runs that are not done yet; outcomes of the final runs.

    Args:
        plan: The runs.
        label: before each line that is said.
        report_only: run nothing; give the outcomes of finished runs.
    """
    finals = plan.finals
    if plan.tuning:
        tried = [o for run in plan.tuning if (o := outcome(run, label, report_only)) is not None]
        best = choose_lr(tried)
        if best is None:
            say(f"{label} {plan.entry.method.title}: no learning rate has come to a finite loss yet")
            return []
        say(f"{label} {plan.entry.method.title}: learning rate {best:g} of {', '.join(f'{o.lr:g}' for o in tried)}")
        finals = tuple(replace(run, method=replace(run.method, lr=best)) for run in finals)
    return [o for run in finals if (o := outcome(run, label, report_only)) is not None]


def choose_lr(tried: list[Outcome]) -> float | None:
    """The learning rate with the lowest validation loss at the end; None where no loss is finite."""
    losses = {outcome.lr: outcome.history[-1]["loss"] for outcome in tried}
    finite = [lr for lr, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__, default=None)


def outcome(run: Run, label: str, report_only: bool) -> Outcome | None:
    """The run's file, made now if it is not there; None where the run failed or is not to be made."""
    if not report_only and not run.path.exists():
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(run.path.with_suffix(".lock")):  # another process with the same sweep
            if not run.path.exists():
                say(f"{label} {run.name}: {run.budget}")
                try:
                    OwnProcess(run.threads).call(train, run).save(run.path)
                except ProcessFailed:
                    say(f"{label} {run.name} failed and is left out; the same command tries it again")
                    return None
    if not run.path.exists():
        return None
    done = Outcome.load(run.path)
    last = done.test or done.history[-1]
    kind = "test" if done.test else "validation"
    say(f"{label} {run.name}: {done.steps} steps, {kind} accuracy {100 * last['accuracy']:.1f} %, loss {last['loss']:.3f}")
    return done
