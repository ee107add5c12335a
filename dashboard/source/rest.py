"""An MLflow tracking server, read over its REST API.

The server spends some 0.1 ms on each point however it is asked, so few must be asked for. A poll is one search for
the runs, which brings the latest point of every metric, and then one small request for each loaded metric whose latest
point changed: ``get-history-bulk-interval`` from the last known step on, which is complete up to 2500 points. A point that
was logged late, at a step that others had passed, is no metric's latest. So each poll also asks for the newest points
of one loaded metric of a running run, each in turn, and when a run ends, of all of its metrics.
"""

from __future__ import annotations

import base64
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from ..addresses import shown_address
from .artifacts import MOST_FILES, Artifact
from .base import Experiment, MetricSource, Run, Series, SourceError, newest_first
from .buffer import Points, SeriesBuffer, as_points

_TIMEOUT = (3.05, 30.0)  # seconds to connect and to answer
_ONCE_MORE = Retry(total=1, allowed_methods=None)  # a kept connection may have been closed meanwhile
_PAGE = 20_000
_INTERVAL = 2_500  # the most that one interval request gives unthinned
_WORKERS = 4
_FIRST_STEP, _LAST_STEP = -(2**63), 2**63 - 1

T = TypeVar("T")

Name = tuple[str, str]
"""Run and metric."""


class RestSource(MetricSource):
    """Reads an MLflow tracking server. ``poll`` looks at the experiments whose runs were asked for.

    Args:
        url: of the server, as for MLflow's tracking URI.

    Raises:
        SourceError: nothing answers there, or it is not an MLflow server.
    """

    def __init__(self, url: str) -> None:
        self._url = shown_address(url).rstrip("/")  # without the password: errors of the library name the address
        self._lock = threading.RLock()
        self._session = requests.Session()
        self._session.auth = _credentials(url)
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self._session.headers["Authorization"] = f"Bearer {token}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=_ONCE_MORE))
        self._workers = ThreadPoolExecutor(_WORKERS, "dashboard-rest")
        self._version = 0
        self._experiments: list[Experiment] = []
        self._found: dict[str, dict[str, Any]] = {}  # each run of the experiments asked for, as the server describes it
        self._asked: list[str] = []
        self._editions: dict[str, int] = {}
        self._buffers: dict[Name, SeriesBuffer] = {}
        self._turn = 0
        self._pages = True  # the server goes by page tokens; MLflow 2 does not
        self.poll()

    # ---- the contract --------------------------------------------------------------------------------------------------

    def experiments(self) -> Sequence[Experiment]:
        with self._lock:
            return list(self._experiments)

    def runs(self, experiment_ids: Sequence[str]) -> Sequence[Run]:
        with self._lock:
            wanted = [id_ for id_ in experiment_ids if id_ in {e.id for e in self._experiments}]
            new = [id_ for id_ in wanted if id_ not in self._asked]
            if new:
                self._found |= self._search(new)
                self._asked += new
            return newest_first(_run(found) for found in self._found.values() if found["info"]["experiment_id"] in wanted)

    def poll(self) -> int:
        with self._lock:
            experiments = self._all_experiments()
            self._asked = [id_ for id_ in self._asked if id_ in {e.id for e in experiments}]
            found = self._search(self._asked)
            self._buffers = {name: buffer for name, buffer in self._buffers.items() if name[0] in found}
            loaded = list(self._buffers)
            before = [_latest(self._found.get(run_id)).get(key) for run_id, key in loaded]
            after = [_latest(found[run_id]).get(key) for run_id, key in loaded]
            changed = [name for name, old, new in zip(loaded, before, after, strict=True) if old != new]
            self._each(self._catch_up, changed)
            suspects = self._suspects(found)
            late = {name[0] for name, some in zip(suspects, self._each(self._find_late, suspects), strict=True) if some}
            different = late | {run_id for run_id, one in found.items() if one != self._found.get(run_id)}
            if different or experiments != self._experiments or found.keys() != self._found.keys():
                self._version += 1
                self._editions.update(dict.fromkeys(different, self._version))
            self._experiments, self._found = experiments, found
            return self._version

    def edition(self, run_id: str) -> int:
        with self._lock:
            return self._editions.get(run_id, self._version)

    def load(self, run_ids: Sequence[str], key: str) -> None:
        with self._lock:
            having = [id_ for id_ in run_ids if key in _latest(self._found.get(id_))]
            names = [(id_, key) for id_ in having if (id_, key) not in self._buffers]
            for name, points in zip(names, self._each(self._history, names), strict=True):
                self._buffers[name] = buffer = SeriesBuffer()
                buffer.extend(points)

    def series(self, run_id: str, key: str) -> Series:
        with self._lock:
            self.load([run_id], key)
            return self._buffers.get((run_id, key), SeriesBuffer()).series

    def close(self) -> None:
        with self._lock:
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._session.close()

    # ---- points --------------------------------------------------------------------------------------------------------

    def _each(self, ask: Callable[[Name], T], names: Sequence[Name]) -> list[T]:
        return list(self._workers.map(ask, names))

    def _history(self, name: Name) -> Points:
        return as_points(_rows(self._pages_of(name, 0)))

    def _pages_of(self, name: Name, offset: int) -> list[dict[str, Any]]:
        """Points in the order of their time, but for so many of the first."""
        rows: list[dict[str, Any]] = []
        token = _page_token(offset) if offset else None
        while True:
            query = {"run_id": name[0], "metric_key": name[1], "max_results": _PAGE, "page_token": token}
            answer = self._ask("GET", "metrics/get-history", params=query)
            rows += answer.get("metrics", [])
            token = answer.get("next_page_token")
            if not token:
                return rows

    def _catch_up(self, name: Name) -> None:
        """Fetch the points at the last known step or behind it."""
        buffer = self._buffers[name]
        start = int(buffer.series.step[-1]) if len(buffer) else 0
        query = {
            "run_ids": name[0],
            "metric_key": name[1],
            "start_step": start,
            "end_step": _LAST_STEP,
            "max_results": _INTERVAL,
        }
        rows = self._ask("GET", "metrics/get-history-bulk-interval", params=query).get("metrics", [])
        if len(rows) < _INTERVAL:
            buffer.replace_from(start, as_points(_rows(rows)))
        else:
            buffer.replace_from(_FIRST_STEP, self._history(name))

    def _suspects(self, found: dict[str, dict[str, Any]]) -> list[Name]:
        """Loaded metrics that may have points at steps already passed: of runs that just ended, and one that is running."""
        running = [name for name in self._buffers if _status(found[name[0]]) == "RUNNING"]
        ended = [name for name in self._buffers if name not in running and _status(self._found[name[0]]) == "RUNNING"]
        if not running or not self._pages:
            return ended
        self._turn += 1
        return [*ended, running[self._turn % len(running)]]

    def _find_late(self, name: Name) -> bool:
        """Fetch the points logged after the newest one known, at any step; whether there was any.

        The newest known point must be where it is expected in the order of time, else others came before it.
        """
        buffer = self._buffers[name]
        size = len(buffer)
        rows = self._pages_of(name, max(0, size - 1))
        if size and len(rows) == 1 and _place(rows[0]) == buffer.newest:
            return False
        if size > 1 and len(rows) >= size:
            self._pages = False
        if size > 1 and self._pages:
            rows = self._pages_of(name, 0)
        buffer.replace_from(_FIRST_STEP, as_points(_rows(rows)))
        return len(buffer) > size

    # ---- files -----------------------------------------------------------------------------------------------------------

    def artifacts(self, run: Run) -> Sequence[Artifact]:
        found: list[Artifact] = []
        folders = [""]
        while folders and len(found) < MOST_FILES:
            here = folders.pop()
            for one in self._ask("GET", "artifacts/list", params={"run_id": run.id, "path": here}).get("files", []):
                if one.get("is_dir"):
                    folders.append(one["path"])
                else:
                    found.append(Artifact(one["path"], int(one.get("file_size", 0))))
        return sorted(found)

    def artifact(self, run: Run, path: str, most: int) -> bytes:
        query = {"run_uuid": run.id, "path": path}
        try:
            with self._session.get(f"{self._url}/get-artifact", params=query, timeout=_TIMEOUT, stream=True) as answer:
                answer.raise_for_status()
                return next(answer.iter_content(most), b"")
        except requests.RequestException as error:
            raise SourceError(f"{self.name} does not give {path} ({type(error).__name__})") from error

    # ---- the server ----------------------------------------------------------------------------------------------------

    def _all_experiments(self) -> list[Experiment]:
        found = self._all_pages("experiments/search", "experiments", {"view_type": "ACTIVE_ONLY"})
        found.sort(key=lambda e: (int(e.get("creation_time", 0)), e["experiment_id"]))
        return [Experiment(e["experiment_id"], e["name"]) for e in found]

    def _search(self, experiment_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not experiment_ids:
            return {}
        query = {"experiment_ids": list(experiment_ids), "run_view_type": "ACTIVE_ONLY"}
        return {run["info"]["run_id"]: run for run in self._all_pages("runs/search", "runs", query)}

    def _all_pages(self, path: str, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        token = None
        while True:
            answer = self._ask("POST", path, json={**query, "max_results": 1000, "page_token": token})
            found += answer.get(what, [])
            token = answer.get("next_page_token")
            if not token:
                return found

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = self._session.request(method, f"{self._url}/api/2.0/mlflow/{path}", timeout=_TIMEOUT, **content)
            answer.raise_for_status()
            found = answer.json()
        except requests.JSONDecodeError as error:
            raise SourceError(f"{self.name} is not an MLflow tracking server: its answer is not JSON") from error
        except requests.HTTPError as error:
            raise SourceError(
                f"{self.name} refuses to answer {path}: {error.response.status_code} {_reason(error.response)}"
            ) from error
        except requests.RequestException as error:
            raise SourceError(
                f"{self.name} does not answer ({type(error).__name__}); is `mlflow server` running there?"
            ) from error
        if not isinstance(found, dict):
            raise SourceError(f"{self.name} is not an MLflow tracking server: it answered with {type(found).__name__}")
        return found

    @property
    def name(self) -> str:
        """The address without user and password."""
        return self._url


def _credentials(url: str) -> tuple[str, str] | None:
    """User and password of the address, else of MLflow's environment variables."""
    parts = urlsplit(url)
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None


def _run(found: dict[str, Any]) -> Run:
    info, data = found["info"], found.get("data", {})
    tags = {tag["key"]: tag.get("value", "") for tag in data.get("tags", [])}
    return Run(
        id=info["run_id"],
        name=info.get("run_name") or tags.get("mlflow.runName") or info["run_id"],
        experiment_id=info["experiment_id"],
        status=info["status"],
        started=_seconds(info.get("start_time")),
        ended=_seconds(info.get("end_time")),
        params={param["key"]: param.get("value", "") for param in data.get("params", [])},
        tags=tags,
        keys=tuple(sorted(_latest(found))),
        latest={key: (int(step), int(stamp or 0), float(value)) for key, (step, stamp, value) in _latest(found).items()},
        artifacts=info.get("artifact_uri", ""),
    )


def _latest(found: dict[str, Any] | None) -> dict[str, tuple[Any, ...]]:
    """The latest point of each of a run's metrics."""
    metrics = found.get("data", {}).get("metrics", []) if found else []
    return {m["key"]: (m.get("step", 0), m.get("timestamp"), str(m.get("value"))) for m in metrics}


def _status(found: dict[str, Any]) -> str:
    return str(found["info"]["status"])


def _rows(metrics: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int, float]]:
    """The numbers of points; JSON has no nan, which comes as a string."""
    return ((int(m.get("step", 0)), int(m.get("timestamp", 0)), float(m.get("value", 0.0))) for m in metrics)


def _place(metric: dict[str, Any]) -> tuple[int, int]:
    return int(metric.get("step", 0)), int(metric.get("timestamp", 0))


def _page_token(offset: int) -> str:
    return base64.b64encode(json.dumps({"offset": offset}).encode()).decode()


def _seconds(milliseconds: Any) -> float:
    return int(milliseconds) / 1000.0 if milliseconds else math.nan


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("message", ""))[:300]
    except (requests.JSONDecodeError, AttributeError):
        return answer.reason
