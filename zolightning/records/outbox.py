"""A run's log on its way to MLflow: a thread sends it, a file keeps it while the store is away, training never waits."""

from __future__ import annotations

import atexit
import logging
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from .pending_file import Entry, PendingFile, decoded

if TYPE_CHECKING:
    from mlflow import MlflowClient

TICK = 1.0  # seconds between two batches, and between two attempts while the store is away
WAIT = 30.0  # seconds that the end of a run waits at most
MEMORY = 20_000  # entries in memory, about 20 MB; more go to the file at once
_BATCH = 1000  # MLflow's limit for metrics
_HEAD = 200  # entries sent and ticked off together
_NAME = "zolightning-outbox"

log = logging.getLogger(__name__)


class Outbox:
    """The log of one run, in order, until MLflow has stored it. No method raises or blocks for MLflow's sake, but :meth:`wait`.

    Own thread and synchronous calls rather than MLflow's asynchronous queue: that one drops a batch that fails, keeps no order
    between its ten workers, and joins them without limit at exit.

    While the store is away, entries move to a file, so that they take no memory and outlive the process; an entry that is sent
    twice is stored once, as MLflow keeps one of equal (key, time, step, value) rows. The user is told when trouble begins and
    when it is over.

    Args:
        client: The store's ``MlflowClient``.
        run_id: of a run that exists.
        folder: The folder of the file, ``pending-metrics-<run_id>.jsonl``; made when needed.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path) -> None:
        self._client, self.run_id = client, run_id
        self._file = PendingFile(folder.absolute() / f"pending-metrics-{run_id}.jsonl", run_id)
        self._entries: deque[Entry] = deque()
        self._artifacts: dict[str, Path] = {}
        self._changed = threading.Condition()  # guards all of this; the thread lets go of it while it sends
        self._thread: threading.Thread | None = None
        self._hurry = self._away = self._gave_up = False
        self._complaints: set[str] = set()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step at the time of this call."""
        self._put({"step": step, "time_ms": _now(), "metrics": {key: float(value) for key, value in values.items()}})

    def params(self, values: Mapping[str, object]) -> None:
        """Log settings, each once."""
        self._put({"params": {key: str(value) for key, value in values.items()}})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._put({"tags": dict(values)})

    def status(self, status: str) -> None:
        """End the run at the time of this call, as 'FINISHED' or 'FAILED'; 'RUNNING': it goes on."""
        self._put({"status": status, "time_ms": _now()})

    def artifact(self, path: Path) -> None:
        """Upload a file, in place of the one of the same name; it may grow meanwhile."""
        with self._changed:
            self._artifacts[path.name] = Path(path)  # an object of its own: a later request for the same file is another one
            self._work()

    def wait(self) -> bool:
        """Return when MLflow has stored everything, or after ``WAIT`` seconds with the unsent lines in the file.

        Returns:
            whether all is stored. Once it was not, it is not waited for again before MLflow is back.
        """
        with self._changed:
            if self._pending():
                self._work()
            self._hurry = True
            self._changed.notify_all()
            done = False
            try:
                done = self._changed.wait_for(lambda: not self._pending(), 0 if self._gave_up else WAIT)
            finally:  # also when the user has waited enough
                if not done:
                    self._give_up()
        return done

    def _give_up(self) -> None:
        unwritten = self._spool()
        self._file.sync()
        if self._gave_up:
            return
        self._away = self._gave_up = True
        left = f"are in {self._file.path}: send them later with `zolightning.records.outbox.send_pending(path, store)`."
        if unwritten:
            left = f"will be lost with this process ({unwritten})."
        files = "".join(f" {path} is not uploaded." for path in self._artifacts.values())
        log.warning(
            "%s did not take all that this run logged within %g s. The entries that are left %s%s",
            self._store(),
            WAIT,
            left,
            files,
        )

    def _put(self, entry: Entry) -> None:
        with self._changed:
            self._entries.append(entry)
            if len(self._entries) > MEMORY:
                self._spool()
            self._work()

    def _work(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
            atexit.register(self.wait)
            self._thread.start()

    def _run(self) -> None:
        while self._due():
            try:
                self._send()
            except Exception as error:  # of any kind: training goes on
                self._trouble(error)
            else:
                self._well()

    def _due(self) -> bool:
        """Wait for a batch to gather; say whether there is anything to send."""
        with self._changed:
            self._changed.wait_for(lambda: self._hurry, TICK)
            self._hurry = False
            if self._pending():
                return True
            self._thread = None
            atexit.unregister(self.wait)
            return False

    def _pending(self) -> bool:
        return bool(self._entries or self._file.waiting or self._artifacts)

    def _send(self) -> None:
        if self._away:
            self._client.get_run(self.run_id)  # raises, for less work than a batch is
        while entries := self._head():
            for reason in deliver(self._client, self.run_id, entries):
                self._complain("refused", f"{self._store()} refuses something that this run logs: {reason}")
            self._drop(entries)
        for name, path in list(self._artifacts.items()):
            self._upload(path)
            with self._changed:
                if self._artifacts[name] is path:
                    del self._artifacts[name]

    def _head(self) -> list[Entry]:
        with self._changed:
            return self._file.head() or list(islice(self._entries, _HEAD))

    def _drop(self, sent: Sequence[Entry]) -> None:
        with self._changed:
            if self._entries and self._entries[0] is sent[0]:
                for _ in sent:
                    self._entries.popleft()
            else:  # from the file, or moved there meanwhile, and then sent once more
                self._file.drop()

    def _upload(self, path: Path) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._client.log_artifact(self.run_id, shutil.copy(path, folder))
        except Exception as error:
            self._client.get_run(self.run_id)  # raises when it is the whole store that is away
            self._complain(path.name, f"{path} was not uploaded to {self._store()}: {_short(error)}")

    def _trouble(self, error: Exception) -> None:
        with self._changed:
            unwritten = self._spool()
        self._file.sync()  # with the lock open, so that no step waits for a slow disk
        with self._changed:
            if not self._away:
                self._away = True
                place = f"in memory ({unwritten})" if unwritten else f"in {self._file.path}"
                text = (
                    "%s does not take the entries of this run: %s. Training goes on; new entries wait %s until MLflow is back."
                )
                log.warning(text, self._store(), _short(error), place)

    def _well(self) -> None:
        with self._changed:
            if self._away:
                self._away = self._gave_up = False
                log.warning("%s is back: everything that waited has been sent.", self._store())
            self._changed.notify_all()

    def _spool(self) -> str:
        """Move the entries in memory to the file; return why that was not possible, or nothing."""
        try:
            self._file.append(self._entries)
        except OSError as error:
            while len(self._entries) > MEMORY:
                self._entries.popleft()
                self._complain("lost", f"more than {MEMORY} entries wait for {self._store()}: the oldest are lost")
            return f"{self._file.path} cannot be written: {error.strerror or error}"
        self._entries.clear()
        return ""

    def _complain(self, about: str, text: str) -> None:
        if about not in self._complaints:
            self._complaints.add(about)
            log.warning("%s", text)

    def _store(self) -> str:
        return f"MLflow at {_without_login(self._client.tracking_uri)}"


def deliver(client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> list[str]:
    """Store entries in order.

    Args:
        client: an ``MlflowClient``.
        run_id: The id of the run.
        entries: may have been stored before.

    Returns:
        the entries that MLflow refuses for good, such as a setting that already has another value, with the reason: one text
        for each entry of which something was refused. All else is stored.

    Raises:
        Exception: the store is away, or the run is gone; some of the entries may be stored.
    """
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    try:
        for rows, group in groupby(entries, lambda entry: "metrics" in entry):
            if rows:
                metrics = [Metric(k, v, e["time_ms"], e["step"]) for e in group for k, v in e["metrics"].items()]
                for first in range(0, len(metrics), _BATCH):
                    client.log_batch(run_id, metrics[first : first + _BATCH], synchronous=True)
                continue
            for entry in group:
                if entry.get("status") == "RUNNING":
                    client.update_run(run_id, "RUNNING")
                elif "status" in entry:
                    client.set_terminated(run_id, entry["status"], entry["time_ms"])
                else:
                    params = [Param(k, v) for k, v in entry.get("params", {}).items()]
                    tags = [RunTag(k, v) for k, v in entry.get("tags", {}).items()]
                    client.log_batch(run_id, params=params, tags=tags, synchronous=True)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE" or client.get_run(run_id).info.lifecycle_stage != "active":
            raise
        if len(entries) > 1:
            return [reason for entry in entries for reason in deliver(client, run_id, [entry])]
        reasons = [reason for part in _parts(entries[0]) for reason in deliver(client, run_id, [part])]
        return ["; ".join(reasons) or f"{str(entries[0])[:200]}: {_short(error)}"]
    return []


def _parts(entry: Entry) -> list[Entry]:
    """An entry of several values as one entry for each, so that one that is refused takes no other with it."""
    parts: list[Entry] = [{**entry, "metrics": {name: value}} for name, value in entry.get("metrics", {}).items()]
    parts += [{**entry, "params": {name: value}} for name, value in entry.get("params", {}).items()]
    parts += [{**entry, "tags": {name: value}} for name, value in entry.get("tags", {}).items()]
    return parts if len(parts) > 1 else []


def send_pending(path: str | Path, store: str) -> int:
    """Send the metrics that a run could not send: the file ``pending-metrics-<run_id>.jsonl`` that it left. May be repeated.

    Args:
        path: The path of the file, which is kept.
        store: MLflow tracking URI of the run's store.

    Returns:
        how many entries MLflow has now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no entries.
        Exception: MLflow's own, when the store is away or has no such run.
    """
    from mlflow import MlflowClient

    lines = Path(path).read_bytes().splitlines()
    found = [entry for entry in map(decoded, lines) if entry]
    if not found:
        raise ValueError(f"`send_pending(path={str(path)!r})` holds no entries; give a pending-metrics-<run_id>.jsonl")
    damaged = sum(bool(line.strip()) for line in lines) - len(found)
    if damaged:
        log.warning("%s: %d damaged lines are left out", path, damaged)
    client, refused = MlflowClient(store), list[str]()
    for run_id, group in groupby(found, lambda pair: pair[0]):
        refused += deliver(client, run_id, [entry for _, entry in group])
    for reason in refused:
        log.warning("%s refuses %s", _without_login(store), reason)
    return len(found) - len(refused)


def _now() -> int:
    return int(time.time() * 1000)


def _short(error: Exception) -> str:
    """The first line of the error."""
    return _without_login((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def _without_login(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)


class _Elsewhere(logging.Filter):
    """Silences the libraries' messages about each attempt: the outbox reports it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != _NAME


for _noisy in ("mlflow.store.db.utils", "urllib3.connectionpool"):
    logging.getLogger(_noisy).addFilter(_Elsewhere())
