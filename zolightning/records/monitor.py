"""The metrics of a run: the same keys for ZO and for backprop, so that they stand in one chart."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..probing.batches import batch_examples
from ..strategy._lightning import Callback, pl, rank_zero_info
from ..strategy.strategy import ZOStrategy
from ..types import Batch, StepOutput, StepRecord
from .memory import MemoryMeter, device_memory, rss
from .mlflow_logger import MetricBuffer

_HEARTBEAT_SECONDS = 15.0
_LEDGER_SECONDS = 300.0
_SLOW_EVERY = 20  # steps between measurements that look at every tensor
_COUNTERS = ("forward_passes", "examples_seen", "tokens_seen", "skipped_steps", "train_seconds", "cpu_seconds")


class ZOMonitor(Callback):
    """Logs loss, ZO statistics, memory and speed of each optimizer step, buffered; shows the main ones in the progress bar.

    Works under any strategy. Metrics: ``train/loss``; ``zo/projected_grad``, ``zo/clip_rate``, ``zo/tie_rate``,
    ``zo/skipped_steps``, ``zo/update_rms`` and ``zo/lost_update_share`` (ZO only; the last two sampled);
    ``zo/negative_scales`` and ``zo/saturated_scales`` where scales of quantised layers are trained;
    ``zo/offload/read_bytes``, ``write_bytes``, ``wait_seconds`` and ``pool_bytes`` where weights are offloaded, and
    ``zo/ranks/bytes``, ``exchange_seconds`` and ``size`` of rank 0 where there are several, all since the fit began;
    ``memory/peak``, ``memory/rss``, ``memory/weights``, ``memory/gradients``, ``memory/optimizer_state``,
    ``memory/activations`` in bytes; ``speed/steps_per_second``, ``speed/train_seconds`` (validation not counted); the counters
    ``examples_seen``, ``tokens_seen`` and ``forward_passes``. Tags: ``zo.method``, ``zo.recipe``, ``zo.heartbeat``, ``zo.pid``,
    ``zo.host``, ``zo.ledger``, ``zo.max_steps``, ``zo.device_memory`` in bytes. The replay ledger is an artifact of the MLflow
    run, renewed every five minutes and at the end. A fit that is resumed from a checkpoint goes on with its counters; to go on
    in the same MLflow run give its id to :func:`~zolightning.mlflow_logger`.

    Args:
        method: the run's name in comparisons; None: the strategy's.
        every_n_steps: log every so many optimizer steps, >= 1.
        min_seconds: and at most this often, >= 0, so that fast steps are not slowed down: a row costs a few milliseconds.
    """

    def __init__(self, method: str | None = None, every_n_steps: int = 1, min_seconds: float = 0.1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`ZOMonitor(every_n_steps=...)` must be >= 1, got {every_n_steps}")
        if not min_seconds >= 0:
            raise ValueError(f"`ZOMonitor(min_seconds=...)` must be >= 0, got {min_seconds}")
        self.method, self.every_n_steps, self.min_seconds = method, every_n_steps, min_seconds
        self.forward_passes = self.examples_seen = self.tokens_seen = self.skipped_steps = 0
        self.train_seconds = self.cpu_seconds = 0.0  # the latter of this process, all threads
        self._buffer: MetricBuffer | None = None
        self.meter: MemoryMeter | None = None
        self._ledger: Path | None = None
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        runs = [] if self._buffer is None else self._buffer.run_ids
        return {"runs": runs, **{name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _go_on(self, runs: list[str]) -> None:
        """Take up the counters of the checkpoint that the fit is resumed from."""
        for name in _COUNTERS:
            setattr(self, name, self._saved[name])
        before = self._saved["runs"]
        if before and runs and not set(before) & set(runs):
            rank_zero_info(
                f"The checkpoint is of the MLflow run {before[0]}, and this fit logs into the new run {runs[0]}. To go on in "
                f"the same run, give the Trainer logger=mlflow_logger(run_id={before[0]!r})."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._buffer = MetricBuffer(trainer.loggers, Path(trainer.default_root_dir))
        if self._saved and trainer.ckpt_path is not None:  # else it was loaded for a test
            self._go_on(self._buffer.run_ids)
        self._saved = {}
        strategy = trainer.strategy
        tags = {"zo.pid": str(os.getpid()), "zo.host": socket.gethostname(), "zo.heartbeat": str(time.time())}
        tags["zo.method"] = self.method or ("zo" if isinstance(strategy, ZOStrategy) else "backprop")
        if isinstance(strategy, ZOStrategy):
            tags["zo.recipe"] = strategy.recipe_name
            self._buffer.params({f"zo/{k}": v for k, v in strategy.config.to_dict().items()})
        self._buffer.tag(tags)
        self._beat = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.meter = MemoryMeter(pl_module, trainer.strategy.root_device)
        self._last_step = trainer.global_step
        self._logged = -math.inf
        self._ledger = trainer.strategy.ledger_path if isinstance(trainer.strategy, ZOStrategy) else None
        self._uploaded = time.monotonic()
        tags = {"zo.device_memory": str(device_memory(trainer.strategy.root_device))}
        if math.isfinite(steps := trainer.estimated_stepping_batches):
            tags["zo.max_steps"] = str(int(steps))
        if self._ledger is not None:
            tags["zo.ledger"] = str(self._ledger.absolute())
        if self._buffer is not None:
            self._buffer.tag(tags)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        if isinstance(trainer.strategy, ZOStrategy):
            trainer.strategy.measure_update = trainer.global_step % _SLOW_EVERY == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        self.train_seconds += time.perf_counter() - self._started
        self.cpu_seconds += time.process_time() - self._cpu_started
        strategy = trainer.strategy
        batches = strategy.groups if isinstance(strategy, ZOStrategy) else trainer.world_size  # taken to be alike
        self.examples_seen += batches * (batch_examples(batch) or 0)
        self.tokens_seen += batches * count_tokens(batch)
        if not isinstance(strategy, ZOStrategy):
            self.forward_passes += batches
        if trainer.global_step == self._last_step:  # inside an accumulation window
            return
        self._last_step = trainer.global_step
        records = strategy.records if isinstance(strategy, ZOStrategy) else []
        record = records[-1] if records else None
        self.forward_passes += sum(r.forwards for r in records)
        skipped = sum(bool(r.skipped) for r in records)
        self.skipped_steps += skipped
        last = (
            trainer.should_stop
            or trainer.global_step == trainer.max_steps
            or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        )
        due = trainer.global_step % self.every_n_steps == 0 and time.monotonic() - self._logged >= self.min_seconds
        if due or last or skipped:
            self._logged = time.monotonic()
            self._log(trainer, pl_module, record, outputs)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, record: StepRecord | None, outputs: StepOutput) -> None:
        assert self._buffer is not None and self.meter is not None
        step = trainer.global_step
        loss = record.loss if record is not None else _loss(outputs)
        metrics = {
            "train/loss": loss,
            "forward_passes": self.forward_passes,
            "examples_seen": self.examples_seen,
            "tokens_seen": self.tokens_seen,
            "speed/train_seconds": self.train_seconds,
            "speed/steps_per_second": step / self.train_seconds if self.train_seconds else 0.0,
            "memory/peak": self.meter.peak(),
            "memory/rss": rss(),
        }
        bar = {"loss": loss, "steps/s": metrics["speed/steps_per_second"], "peak_GB": metrics["memory/peak"] / 1e9}
        if record is not None and record.ranked:  # there was no loss, which is not one that is NaN
            del metrics["train/loss"], bar["loss"]
        if record is not None:
            count = max(1, len(record.raw))
            metrics |= {
                "zo/projected_grad": record.projected_grad,
                "zo/clip_rate": record.clipped / count,
                "zo/tie_rate": record.ties / count,
                "zo/skipped_steps": self.skipped_steps,
            }
            bar["g"] = record.projected_grad
            stats = trainer.strategy.last_stats  # type: ignore[attr-defined]
            if stats is not None:
                seen = {
                    "zo/update_rms": stats.rms,
                    "zo/lost_update_share": stats.lost,
                    "zo/negative_scales": stats.negative,
                    "zo/saturated_scales": stats.saturated,
                }
                metrics |= {name: value for name, value in seen.items() if value is not None}
            metrics |= {f"zo/{name}": value for name, value in trainer.strategy.traffic().items()}  # type: ignore[attr-defined]
        if step % _SLOW_EVERY == 1:
            metrics |= {f"memory/{k}": v for k, v in self.meter.parts(trainer.strategy.optimizers).items()}
        self._buffer.add(metrics, step)
        module.log_dict({k: float(v) for k, v in bar.items()}, prog_bar=True, logger=False)
        if time.monotonic() - self._beat > _HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            self._buffer.tag({"zo.heartbeat": str(time.time())})
        if time.monotonic() - self._uploaded > _LEDGER_SECONDS:
            self._upload()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        if self._buffer is not None and self._ledger is not None and self._ledger.exists():
            self._buffer.artifact(self._ledger)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._buffer is not None:
            self._upload()
            self._buffer.flush(wait=True)


def count_tokens(batch: Batch) -> int:
    """Tokens in a batch of Hugging Face's form: those its attention mask keeps, or all of its input_ids."""
    get = getattr(batch, "get", None)
    mask = get("attention_mask") if get else None
    if isinstance(mask, Tensor):
        return int(mask.sum())
    ids = get("input_ids") if get else None
    return ids.numel() if isinstance(ids, Tensor) else 0


def _loss(outputs: StepOutput) -> float:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return float(loss) if loss is not None else math.nan
