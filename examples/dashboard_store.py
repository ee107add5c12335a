"""Make an MLflow store of any size to try or measure the dashboard with, and keep logging to it if asked.

python examples/dashboard_store.py big.db                            # 50 runs x 10,000 points x 12 metrics, about a minute
python examples/dashboard_store.py live.db --runs 4 --points 500 --live 2 --rate 1000

The runs look like zolightning's (same metrics, params and tags) but nothing is trained. MLflow makes the tables and the
runs; the finished runs' points go in by SQL, for speed; live points go through MLflow itself until interrupted.
"""

from __future__ import annotations

import argparse
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from numpy.typing import NDArray

GIB = 2.0**30
SECONDS_A_STEP = 0.5
STEPS_A_FLUSH = 20  # rows of a run lie together in the file, as a buffering logger leaves them
INDEXES = ("index_metrics_run_uuid", "index_metrics_run_uuid_key_step")
NAMES = (
    "train/loss",
    "val/loss",
    "val/accuracy",
    "memory/peak",
    "memory/rss",
    "speed/train_seconds",
    "speed/steps_per_second",
    "examples_seen",
    "tokens_seen",
    "forward_passes",
    "zo/projected_grad",
    "zo/clip_rate",
)


def names(count: int) -> list[str]:
    """``count`` metrics: zolightning's first, then made-up ones."""
    return [*NAMES[:count], *(f"extra/{i}" for i in range(count - len(NAMES)))]


def values(run: int, steps: NDArray[np.int64], metrics: int) -> NDArray[np.float64]:
    """What run number ``run`` logs at ``steps`` (counted from 1), shape (len(steps), metrics)."""
    noise = np.random.default_rng([run, int(steps[0])]).normal(size=(len(steps), max(metrics, len(NAMES))))
    backprop = run % 5 == 4
    seconds = steps * SECONDS_A_STEP / (2 if backprop else 1)
    fall = np.exp(-steps / (300.0 + 40 * run))
    peak = np.full(len(steps), (5.4 if backprop else 1.1) * GIB)
    columns = (
        0.4 + fall + 0.1 * noise[:, 0],
        0.45 + fall + 0.02 * noise[:, 1],
        0.85 - 0.3 * fall + 0.01 * noise[:, 2],
        peak,
        peak * 1.3 + 1e6 * noise[:, 4],
        seconds,
        steps / seconds,
        16.0 * steps,
        700.0 * steps,
        (1.0 if backprop else 2.0) * steps,
        10 * np.abs(noise[:, 10]),
        np.zeros(len(steps)),
    )
    noise[:, : len(columns)] = np.column_stack(columns)
    if run == 1:  # one run that blew up: nan and inf must show
        noise[steps >= 2000, 0] = np.nan
        noise[steps == 1999, 0] = np.inf
    return noise[:, :metrics]


def describe(client: MlflowClient, experiment: str, run: int, started: int, sweep: bool = False) -> str:
    """A run with the params and tags that zolightning logs; its id. In a sweep most runs differ in more than their seed."""
    recipe = None if run % 5 == 4 else ("default", "mezo", "spsa")[run % 3]
    tags = {"zo.method": f"ZO ({recipe})" if recipe else "backprop AdamW", "seed": str(run // 5)}
    if recipe:
        tags["zo.recipe"] = recipe
    created = client.create_run(experiment, started, tags, run_name=f"{recipe or 'adamw'}-seed{run // 5}")
    params = {"model": "made up", "lr": "1e-3" if recipe else "2e-5", "seed": run // 5, "batch_size": 16}
    if sweep:
        params["lr"] = f"{1e-5 * 1.2 ** (run % 40):.2e}"
        params["eps"] = f"{1e-4 * 2 ** (run % 7):.1e}"
    client.log_batch(created.info.run_id, params=[Param(name, str(value)) for name, value in params.items()])
    return created.info.run_id


def points(ids: list[str], count: int, metrics: int, started: int) -> Iterator[tuple[str, float, int, str, int, int]]:
    """Rows of MLflow's ``metrics`` table, in the order in which runs side by side would have written them."""
    keys = names(metrics)
    for first in range(1, count + 1, STEPS_A_FLUSH):
        steps = np.arange(first, min(first + STEPS_A_FLUSH, count + 1))
        for run, run_id in enumerate(ids):
            table = values(run, steps, metrics)
            nans = np.isnan(table).tolist()
            stored = np.nan_to_num(table, nan=0.0).tolist()  # as MLflow does: nan is 0 and a flag, inf the largest float
            for step, row, nan in zip(steps.tolist(), stored, nans, strict=True):
                stamp = started + round(1000 * SECONDS_A_STEP * step)
                for i in range(metrics):
                    yield keys[i], row[i], stamp, run_id, step, nan[i]


def fill(path: Path, ids: list[str], count: int, metrics: int, started: int) -> None:
    """Insert the points, and what MLflow keeps beside them: the latest of each metric, and the runs' end."""
    with closing(sqlite3.connect(path)) as store:
        store.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-2000000")
        again = [store.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0] for name in INDEXES]
        for name in INDEXES:  # cheaper to build once the rows are there
            store.execute(f"DROP INDEX {name}")
        store.executemany(
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, ?)",
            points(ids, count, metrics, started),
        )
        for statement in again:
            store.execute(statement)
        store.execute(
            "INSERT INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "SELECT key, value, timestamp, run_uuid, step, is_nan FROM metrics WHERE step = ?",
            (count,),
        )
        store.execute("UPDATE runs SET status = 'FINISHED', end_time = ?", (started + round(1000 * SECONDS_A_STEP * count),))
        store.commit()
        store.execute("PRAGMA journal_mode=WAL")


def keep_logging(client: MlflowClient, ids: list[str], metrics: int, rate: int) -> None:
    """Log ``rate`` points a second in all, in one batch a run and second, as zolightning does."""
    keys = names(metrics)
    steps_a_second = max(1, rate // (len(ids) * metrics))
    step = 1
    while True:
        began = time.monotonic()
        steps = np.arange(step, step + steps_a_second)
        for run, run_id in enumerate(ids):
            now = int(time.time() * 1000)
            table = values(run, steps, metrics)
            rows = [
                Metric(k, v, now, int(s)) for s, row in zip(steps, table, strict=True) for k, v in zip(keys, row, strict=True)
            ]
            for first in range(0, len(rows), 1000):  # MLflow's limit for one batch
                client.log_batch(run_id, rows[first : first + 1000], tags=[RunTag("zo.heartbeat", str(time.time()))])
        step += steps_a_second
        time.sleep(max(0.0, began + 1 - time.monotonic()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the SQLite file to make; it must not exist yet")
    parser.add_argument("--runs", type=int, default=50, help="finished runs (default 50)")
    parser.add_argument("--points", type=int, default=10_000, help="points of each metric of a finished run (default 10000)")
    parser.add_argument("--metrics", type=int, default=12, help="metrics of each run (default 12)")
    parser.add_argument("--sweep", action="store_true", help="vary learning rate and eps: few runs are seeds of each other")
    parser.add_argument("--live", type=int, default=0, help="more runs, that keep logging until interrupted (default 0)")
    parser.add_argument("--rate", type=int, default=1000, help="points a second that the live runs log in all (default 1000)")
    args = parser.parse_args()
    if args.path.exists():
        parser.error(f"{args.path} exists; give the path of a new file")

    began = time.monotonic()
    client = MlflowClient(f"sqlite:///{args.path.resolve()}")
    experiment = client.create_experiment("made up")
    started = int(time.time() * 1000) - round(1000 * SECONDS_A_STEP * args.points)
    ids = [describe(client, experiment, run, started + run, args.sweep) for run in range(args.runs)]
    fill(args.path, ids, args.points, args.metrics, started)
    rows = args.runs * args.points * args.metrics
    size = args.path.stat().st_size / GIB
    print(f"{args.path}: {args.runs} runs, {rows:,} points, {size:.2f} GiB in {time.monotonic() - began:.0f} s", flush=True)

    if args.live:
        live = [describe(client, experiment, args.runs + i, int(time.time() * 1000)) for i in range(args.live)]
        for run_id in live:
            client.set_tag(run_id, "zo.host", socket.gethostname())
            client.set_tag(run_id, "zo.pid", os.getpid())
        print(f"logging {args.rate} points a second to {args.live} runs; interrupt to stop", flush=True)
        try:
            keep_logging(client, live, args.metrics, args.rate)
        except KeyboardInterrupt:
            for run_id in live:
                client.set_terminated(run_id)


if __name__ == "__main__":
    main()
