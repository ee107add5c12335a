"""The state of a fit under Lightning, and the questions that users and callbacks have about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from ..engine.session import Session
from ..engine.updates import UpdateStats
from ..methods.estimators import Estimator
from ..parallel import Parallel
from ..space import View
from ..types import StepRecord
from ._lightning import pl
from .devices import DevicesStrategy
from .offloading import InMemory
from .run_ledger import RunLedger


class FitStrategy(DevicesStrategy):
    """The fit that runs, or the last one: its session, ledger and weights."""

    def __init__(self, parallel: Parallel, *lightning: Any) -> None:
        super().__init__(parallel, *lightning)
        self.measure_update = False
        """Set it to get ``last_stats`` of the next step."""
        self.records: list[StepRecord] = []
        """Optimizer steps of the last batch: none inside an accumulation window, several in a manual training step."""
        self._session: Session | None = None
        self._run_ledger: RunLedger | None = None
        self._weights: InMemory | None = None

    @property
    def session(self) -> Session:
        """The engine of the fit that runs, or of the last one.

        Raises:
            RuntimeError: there was none yet.
        """
        if self._session is None:
            raise RuntimeError("ZOStrategy has not been set up for a fit; call trainer.fit(...) first")
        return self._session

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule of the fit."""
        module = self.lightning_module
        if module is None:
            raise RuntimeError("ZOStrategy has no LightningModule yet; call trainer.fit(...) first")
        return module

    @property
    def weights(self) -> InMemory:
        """Where the module's weights are."""
        if self._weights is None:
            self._weights = InMemory(self.module)  # until the strategy is set up
        return self._weights

    @property
    def estimator(self) -> Estimator:
        return self.session.estimator

    @property
    def seed(self) -> int:
        """Seed of the perturbations."""
        return self.session.seed

    @property
    def zo_step(self) -> int:
        """Optimizer steps taken: the step of the next perturbation's key."""
        return self.session.step if self._session is not None else 0

    @property
    def last_record(self) -> StepRecord | None:
        """The last optimizer step."""
        return None if self._session is None else self._session.last_record

    @property
    def last_stats(self) -> UpdateStats | None:
        """The changes of the last update."""
        return None if self._session is None else self._session.last_stats

    @property
    def ledger_path(self) -> Path | None:
        """Where this fit's replay ledger goes; None when it keeps none, and between fits."""
        return None if self._run_ledger is None else self._run_ledger.path

    def view(self, optimizer: Optimizer) -> View:
        """The subspace that this optimizer's steps search now; known from its first step on."""
        return self.session.view(optimizer)
