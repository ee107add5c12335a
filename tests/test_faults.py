"""Training runs that are killed at any moment: the ledger replays to the weights they had, and they go on as if never killed.

``make test-slow ARGS="-k kills"`` kills a hundred runs; the default test run a handful.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_worker import END, EXIT, PHASES
from helpers import exact_epochs

from zolightning.ledger import Ledger, base_path, fingerprint, load_base, read, replay

pytestmark = pytest.mark.integration

WORKER = Path(__file__).with_name("fault_worker.py")


class Worker:
    """The process that forks the runs."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def start(self, folder: Path, number: int, resume: Path | None = None, fault: dict[str, Any] | None = None) -> int:
        """Start a run; its process id."""
        assert self.process.stdin is not None
        job = {"folder": str(folder), "number": number, "resume": None if resume is None else str(resume), "fault": fault}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The run's exit code, negative for the signal that ended it."""
        return os.waitstatus_to_exitcode(self._answer())

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.close()


def noted(folder: Path) -> dict[int, str]:
    """Step → fingerprint of the weights after it, as the run wrote it down, and END → what it ended with."""
    path = folder / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(step): weights for step, weights in (line.split() for line in lines)}


def phase(folder: Path) -> str:
    path = folder / "phase"
    return PHASES[path.read_bytes()[0]] if path.exists() and path.stat().st_size else "starting"


class Reference(NamedTuple):
    """What a run does that nobody touches."""

    weights: dict[int, str]
    seconds: float


def reference(worker: Worker, folder: Path, number: int) -> Reference:
    wait_for_start(folder, worker.start(folder, number))
    started = time.monotonic()
    assert worker.wait() == 0, (folder / "output").read_text()
    return Reference(noted(folder), time.monotonic() - started)


def wait_for_start(folder: Path, process: int) -> None:
    while phase(folder) == "starting" and _alive(process):
        time.sleep(0.001)


def replayed(ledger: Ledger, step: int) -> str:
    """Fingerprint of the weights of a step, from base and ledger."""
    parameters = load_base(base_path(ledger.path.parent, ledger.header.base))
    replay(ledger, parameters, step)
    return fingerprint(parameters.items())


class Casualty(NamedTuple):
    """A run that was killed."""

    recipe: int
    how: str
    phase: str
    steps: int
    """That it had noted."""
    ahead: int
    """Steps in the ledger that it had not: 0 or 1."""
    torn: int
    """Bytes at the ledger's end that are no record."""


def examine(folder: Path, known: dict[int, str], number: int, how: str) -> Casualty:
    """Whatever the run had: the ledger reads, and gives the weights that the run had after each of its steps."""
    had = noted(folder)
    assert had.items() <= known.items(), f"the run itself differs from an uninterrupted one: {folder}"
    path = folder / "ledger.zo"
    had.pop(END, None)
    if not path.exists():
        assert not had, f"steps without a ledger: {folder}"
        return Casualty(number, how, phase(folder), 0, 0, 0)
    if path.stat().st_size < 1000 and not had:  # killed within its first write: nothing is lost
        return Casualty(number, how, phase(folder), 0, 0, path.stat().st_size)
    ledger = read(path)
    assert not ledger.damage
    last = max(had, default=ledger.header.start)
    assert last <= ledger.last, f"the ledger lacks steps that were taken: {folder}"
    for step in range(ledger.header.start, ledger.last + 1):
        found = replayed(ledger, step)
        assert step == 0 or found == known[step], f"step {step} of {path} replays to other weights"
    return Casualty(number, how, phase(folder), len(had), ledger.last - last, ledger.torn)


def newest(folders: list[Path]) -> Path | None:
    """The checkpoint of the latest step."""
    found = [path for folder in folders for path in folder.glob("step=*.ckpt")]
    return max(found, key=lambda path: int(path.stem.removeprefix("step=")), default=None)


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("SIGKILL", {}),
    ("in an update", {"where": "update", "how": "kill"}),
    ("SIGTERM", {}),
    ("in a record", {"where": "record", "how": "kill"}),
    ("SIGINT", {}),
    ("os._exit in an update", {"where": "update", "how": "exit"}),
    ("before a checkpoint's file", {"where": "checkpoint", "how": "kill"}),
    ("before the base's name", {"where": "base", "how": "kill"}),
    *[("SIGKILL", {})] * 8,
]
"""Taken in turns: half of all kills come from outside, at a moment that nothing but chance decides."""


def strike(
    worker: Worker, folder: Path, number: int, resume: Path | None, kind: int, dice: random.Random, seconds: float
) -> str:
    """Run and be killed; returns how, or "" when the run was over before."""
    how, fault = FAULTS[kind]
    if fault:
        count = dice.randint(1, 80) if fault["where"] in ("update", "record") else dice.randint(1, 6)
        worker.start(folder, number, resume, {**fault, "count": count})
        code = worker.wait()
        assert code in (0, EXIT, -signal.SIGKILL), (folder / "output").read_text()
        return "" if code == 0 else how
    process = worker.start(folder, number, resume)
    wait_for_start(folder, process)
    time.sleep(dice.random() * seconds)
    with suppress(ProcessLookupError):
        os.kill(process, getattr(signal, how))
    code = worker.wait()
    if how == "SIGKILL":
        assert code in (0, -signal.SIGKILL), (folder / "output").read_text()
    return "" if code == 0 and END in noted(folder) else how


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def campaign(worker: Worker, folder: Path, kills: int, recipes: int, seed: int, say: Any) -> list[Casualty]:
    """Kill runs, check what they left, let them go on, kill them again, until they reach their end."""
    dice = random.Random(seed)
    references: dict[int, Reference] = {}
    casualties: list[Casualty] = []
    case, started = 0, time.monotonic()
    while len(casualties) < kills:
        number = seed * 1000 + case % recipes
        if number not in references:
            references[number] = reference(worker, folder / f"reference {number}", number)
        known, seconds = references[number]
        parts: list[Path] = []
        resume: Path | None = None
        while True:
            here = folder / f"case {case}" / str(len(parts))
            parts.append(here)
            again = dice.random() < 0.4 if len(parts) > 1 else True  # kill it once more, or let it end
            if again and len(casualties) < kills:
                kind = len(casualties) % len(FAULTS)
                how = strike(worker, here, number, resume, kind, dice, seconds)
            else:
                how = ""
                worker.start(here, number, resume)
                assert worker.wait() == 0, (here / "output").read_text()
            if not how:
                break
            casualties.append(examine(here, known, number, how))
            if len(casualties) % 10 == 0:
                say(f"{len(casualties)} kills, 0 losses, {time.monotonic() - started:.0f} s")
            resume = newest(parts)
        examine(here, known, number, "")
        assert noted(here)[END] == known[END], f"{here} ends with other weights than the uninterrupted run"
        shutil.rmtree(folder / f"case {case}")
        case += 1
    return casualties


def table(casualties: list[Casualty]) -> str:
    hows, phases = Counter(c.how for c in casualties), Counter(c.phase for c in casualties)
    lines = [f"{len(casualties)} kills, 0 losses; {len({c.recipe for c in casualties})} recipes"]
    lines += ["how: " + ", ".join(f"{how} {count}" for how, count in hows.most_common())]
    lines += ["where: " + ", ".join(f"{where} {count}" for where, count in phases.most_common())]
    lines += [
        f"a step ahead of the weights: {sum(c.ahead for c in casualties)}; torn tails: {sum(c.torn > 0 for c in casualties)}"
    ]
    return "\n".join(lines)


@exact_epochs
def test_a_handful_of_kills(worker: Worker, tmp_path: Path) -> None:
    casualties = campaign(worker, tmp_path, kills=8, recipes=4, seed=1, say=print)
    assert [c.how for c in casualties] == [how for how, _ in FAULTS[:8]]


@exact_epochs
@pytest.mark.slow
def test_a_hundred_kills(worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    casualties = campaign(worker, tmp_path, kills=100, recipes=25, seed=2, say=say)
    say(table(casualties))
    assert len(casualties) == 100
    assert len({c.how for c in casualties}) == len({how for how, _ in FAULTS})
