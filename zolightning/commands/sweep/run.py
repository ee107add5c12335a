"""One run of a sweep: a method, a learning rate, a seed and a budget, in a process of its own, kept in a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...records.monitor import ZOMonitor
from ...strategy._lightning import pl
from ..demo.methods import Method
from ..demo.run import Task, build, start_record
from ..processes import quiet_libraries
from .budget import Budget, Meter


@dataclass(frozen=True)
class Run:
    """The settings on which the result of a run depends, apart from the code and the machine."""

    task: Task
    method: Method
    seed: int
    budget: Budget
    threads: int
    final: bool
    """Whether the test examples are looked at: once, at the end. Runs that choose a learning rate never see them."""

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON would have them; where the run is recorded does not matter to it."""
        settings = asdict(self)
        for name in ("store", "experiment", "out", "offline"):
            del settings["task"][name]
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    @property
    def name(self) -> str:
        """For people, with a digest of all settings."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        kind = "" if self.final else "tune-"
        return f"{kind}{self.method.name}-lr{self.method.lr:g}-seed{self.seed}-{digest}"

    @property
    def path(self) -> Path:
        return Path(self.task.out, "runs", f"{self.name}.json")


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    settings: dict[str, Any]
    steps: int
    seconds: float
    """Of the budget's clock."""
    wall_seconds: float
    forward_passes: int
    examples: int
    peak_memory: int
    history: list[dict[str, float]]
    """``step``, ``used``, ``seconds``, ``wall_seconds``, ``forward_passes``, ``examples``, and ``loss`` and ``accuracy`` on
    the validation examples."""
    test: dict[str, float] | None
    """``loss`` and ``accuracy`` on the test examples, for final runs."""

    @property
    def title(self) -> str:
        return str(self.settings["method"]["title"])

    @property
    def lr(self) -> float:
        return float(self.settings["method"]["lr"])

    @staticmethod
    def load(path: Path) -> Outcome:
        return Outcome(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1))
        part.replace(path)


@quiet_libraries()
def train(run: Run) -> Outcome:
    """Fine-tune within the budget, and test if the run is final; everything is logged to the task's store."""
    task, method = run.task, run.method
    module, data = build(task, method, run.seed)
    logger = start_record(task, method, run.seed, run.name)
    logger.log_hyperparams({"budget": str(run.budget), "clock": run.budget.clock, "final": run.final})
    monitor = ZOMonitor(method.title)
    forwards = 2 if method.published else 1
    meter = Meter(run.budget, monitor, data, task.validations, method.decay, forwards)
    trainer = pl.Trainer(
        strategy=method.strategy(),
        max_epochs=-1,
        default_root_dir=task.out,
        precision=method.trainer_precision(task.precision),  # type: ignore[arg-type]
        devices=1,
        logger=logger,
        callbacks=[meter, monitor],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    assert monitor.meter is not None
    peak = monitor.meter.peak()
    tested = None
    if run.final:
        found = trainer.test(module, data, verbose=False)[0]
        tested = {name: found[f"test/{name}"] for name in ("accuracy", "loss")}
    outcome = Outcome(
        settings=run.settings,
        steps=trainer.global_step,
        seconds=meter.seconds,
        wall_seconds=meter.wall_seconds,
        forward_passes=meter.forward_passes,
        examples=meter.examples,
        peak_memory=peak,
        history=meter.history,
        test=tested,
    )
    logger.log_metrics({"summary/peak_memory": peak, "summary/train_seconds": outcome.seconds}, step=outcome.steps)
    logger.finalize("success")
    return outcome
