"""The data that the dashboard reads, wherever it is stored: experiments, runs, and points of metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..addresses import masked
from .artifacts import Artifact, contents, files, folder


class SourceError(Exception):
    """The store cannot be read: names it, the reason and the cure; no password, whatever address is in the message."""

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class NoStoreYet(SourceError):
    """Nothing has been logged there so far: the place to say how to log a first run."""


@dataclass(frozen=True)
class Experiment:
    """A group of runs."""

    id: str
    name: str


@dataclass(frozen=True)
class Run:
    """One run as the store describes it. All strings come from outside: show them as text only.

    Args:
        id: MLflow's run id.
        name: the run's name.
        experiment_id: where it belongs.
        status: MLflow's: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        started: seconds since the epoch; nan when unknown.
        ended: likewise; nan while it runs.
        params: hyperparameters.
        tags: labels, MLflow's own (``mlflow.*``) among them.
        keys: names of the metrics it has logged so far, sorted.
        artifacts: address of the folder with its files; "": unknown.
        latest: of each metric the step, the milliseconds and the value of the last point, up to the last poll.
    """

    id: str
    name: str
    experiment_id: str
    status: str
    started: float
    ended: float
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    latest: Mapping[str, tuple[int, int, float]] = field(default_factory=dict, compare=False)
    artifacts: str = ""


class Series(NamedTuple):
    """The points of one metric of one run, ordered by (step, time), as they were logged: nothing dropped or thinned.

    Args:
        step: int64, shape (n,).
        time: float64 seconds since the epoch, shape (n,).
        value: float64, shape (n,); nan and ±inf are kept (MLflow stores inf as ±1.797e308).
    """

    step: NDArray[np.int64]
    time: NDArray[np.float64]
    value: NDArray[np.float64]


class Extremes(NamedTuple):
    """The smallest and the largest finite value of a metric; nan when it has none."""

    low: float
    high: float


def extremes(series: Series) -> Extremes:
    """Of these points."""
    finite = series.value[np.isfinite(series.value)]
    return Extremes(float(finite.min()), float(finite.max())) if len(finite) else Extremes(math.nan, math.nan)


class Reads(Protocol):
    """The data from which the figures of a run are worked out."""

    def series(self, run_id: str, key: str) -> Series:
        """All points of a metric."""

    def extremes(self, run_id: str, key: str) -> Extremes:
        """The ends of its values."""


def newest_first(runs: Iterable[Run]) -> list[Run]:
    """By start, those without one last."""
    return sorted(runs, key=lambda run: (math.isnan(run.started), -run.started, run.id))


class MetricSource(ABC):
    """A store that is read only, never written. Safe to call from several threads."""

    @abstractmethod
    def experiments(self) -> Sequence[Experiment]:
        """Active experiments, newest last."""

    @abstractmethod
    def runs(self, experiment_ids: Sequence[str]) -> Sequence[Run]:
        """Active runs of these experiments, newest first."""

    @abstractmethod
    def poll(self) -> int:
        """Look for news; a number that grows when any run, tag, parameter or point was added or changed."""

    @abstractmethod
    def edition(self, run_id: str) -> int:
        """A number that grows when this run, or a point of it, was added or changed, as of the last poll."""

    @abstractmethod
    def load(self, run_ids: Sequence[str], key: str) -> None:
        """Fetch one metric of many runs at once, so that :meth:`series` has it. Never needed, only faster."""

    @abstractmethod
    def series(self, run_id: str, key: str) -> Series:
        """All points of a metric, up to the last poll; empty when there are none."""

    def load_extremes(self, run_ids: Sequence[str], key: str) -> None:
        """As :meth:`load`, for :meth:`extremes`: where the store can find these by itself, the points stay there."""
        self.load(run_ids, key)

    def extremes(self, run_id: str, key: str) -> Extremes:
        """The smallest and the largest finite value of a metric, up to the last poll."""
        return extremes(self.series(run_id, key))

    def values_at(self, steps: Mapping[str, int], key: str) -> dict[str, float]:
        """The metric's last finite value at exactly this step of each run; runs that have none there are left out."""
        self.load(list(steps), key)
        found = {}
        for run_id, step in steps.items():
            series = self.series(run_id, key)
            values = series.value[slice(*np.searchsorted(series.step, (step, step + 1)))]
            if len(values := values[np.isfinite(values)]):
                found[run_id] = float(values[-1])
        return found

    def artifacts(self, run: Run) -> Sequence[Artifact]:
        """The files that the run left, by path.

        Raises:
            SourceError: they cannot be listed from here.
        """
        return files(self._folder(run))

    def artifact(self, run: Run, path: str, most: int) -> bytes:
        """The beginning of one of these files, at most so many bytes.

        Raises:
            SourceError: it cannot be read.
        """
        try:
            return contents(self._folder(run), path, most)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error

    def _folder(self, run: Run) -> Path:
        there = folder(run.artifacts)
        if there is None:
            raise SourceError(f"its files are at {run.artifacts or 'an unknown place'}, which is no folder of this machine")
        return there

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and threads."""
