"""A run's records: the same keys for ZO and backprop, complete, exact, and in a real MLflow store."""

from __future__ import annotations

import platform
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task, batches, loader, mlp, quiet_trainer
from mlflow import MlflowClient
from torch import Tensor, nn

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.records.memory import MemoryMeter, tensor_bytes
from zolightning.records.monitor import count_tokens

STEPS, SIZE = 24, 5
COMMON = {
    "train/loss",
    "forward_passes",
    "examples_seen",
    "tokens_seen",
    "memory/peak",
    "memory/rss",
    "memory/weights",
    "memory/gradients",
    "memory/optimizer_state",
    "memory/activations",
    "speed/train_seconds",
    "speed/steps_per_second",
}
ONLY_ZO = {
    "zo/projected_grad",
    "zo/clip_rate",
    "zo/tie_rate",
    "zo/skipped_steps",
    "zo/update_rms",
    "zo/lost_update_share",
}


class Regression(pl.LightningModule):
    def __init__(self, optimizer: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = mlp(), optimizer
        seen: list[float] = []
        self.note, self.losses = seen.append, lambda: seen  # of all forwards: a list of the module's has one entry a step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.note(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def train(store: str, name: str, strategy: Any, optimizer: Any, **settings: Any) -> tuple[Any, Regression, ZOMonitor]:
    logger, monitor, module = mlflow_logger(name, store=store), ZOMonitor(min_seconds=0), Regression(optimizer)
    trainer = quiet_trainer(strategy=strategy, logger=logger, callbacks=[monitor], **settings)
    trainer.fit(module, loader(batches(STEPS, SIZE)))
    client = MlflowClient(store)
    return client.get_run(logger.run_id), module, monitor


def history(store: str, run: Any, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(store).get_metric_history(run.info.run_id, key)]


def test_zo_run(store: str) -> None:
    run, module, _ = train(store, "zo", ZOStrategy(PLAIN), torch.optim.SGD)
    assert set(run.data.metrics) >= COMMON | ONLY_ZO
    losses = dict(history(store, run, "train/loss"))
    assert list(losses) == list(range(1, STEPS + 1))
    _rehearsal, *seen = module.losses()
    pairs = zip(seen[0::2], seen[1::2], strict=True)
    torch.testing.assert_close(list(losses.values()), [(a + b) / 2 for a, b in pairs])
    assert dict(history(store, run, "forward_passes"))[STEPS] == 2 * STEPS
    assert dict(history(store, run, "examples_seen"))[STEPS] == SIZE * STEPS
    assert run.data.metrics["memory/gradients"] == 0
    assert run.data.metrics["memory/optimizer_state"] == 0
    assert run.data.metrics["memory/weights"] == sum(p.numel() * 4 for p in module.parameters())
    assert 0 < run.data.metrics["zo/update_rms"] < 1
    tags = run.data.tags
    assert (tags["zo.method"], tags["zo.recipe"]) == ("zo", "custom")
    assert {"zo.pid", "zo.host", "zo.heartbeat"} <= set(tags)
    assert run.data.params["zo/eps"] == "0.001"


def test_backprop_run_logs_the_same_keys(store: str) -> None:
    run, module, _ = train(store, "adam", "auto", torch.optim.AdamW)
    assert set(run.data.metrics) >= COMMON
    assert not ONLY_ZO & set(run.data.metrics)
    torch.testing.assert_close([v for _, v in history(store, run, "train/loss")], module.losses())
    weights = run.data.metrics["memory/weights"]
    assert run.data.metrics["memory/optimizer_state"] >= 2 * weights
    assert run.data.tags["zo.method"] == "backprop"


def test_an_offloaded_run_says_what_moving_weights_costs(store: str) -> None:
    logger, net = mlflow_logger("offloaded", store=store), nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    trainer = quiet_trainer(ZOStrategy(PLAIN, offload="cpu"), logger=logger, callbacks=[ZOMonitor(min_seconds=0)])
    trainer.fit(Task(net), loader([(torch.randn(2, 300), torch.randn(2, 300))] * STEPS))
    run = MlflowClient(store).get_run(logger.run_id)
    matrix = 300 * 300 * 4  # two of the four are in memory at once
    for key in ("zo/offload/read_bytes", "zo/offload/write_bytes"):
        values = dict(history(store, run, key))
        assert list(values) == list(range(1, STEPS + 1))
        assert matrix * STEPS <= values[STEPS] <= 12 * matrix * STEPS, key
        assert list(values.values()) == sorted(values.values())
    assert run.data.metrics["zo/offload/pool_bytes"] == 2 * matrix
    assert 0 <= run.data.metrics["zo/offload/wait_seconds"] < run.data.metrics["speed/train_seconds"]
    assert not any(key.startswith("zo/ranks/") for key in run.data.metrics)


def test_accumulation_counts_optimizer_steps(store: str) -> None:
    run, _, monitor = train(store, "window", ZOStrategy(PLAIN), torch.optim.SGD, accumulate_grad_batches=2)
    assert [s for s, _ in history(store, run, "train/loss")] == list(range(1, STEPS // 2 + 1))
    assert monitor.forward_passes == 2 * STEPS
    assert monitor.examples_seen == SIZE * STEPS


def test_several_optimizer_steps_in_a_batch(store: str) -> None:
    """Each is counted; one of them finds nothing but ties and is skipped."""

    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__(torch.optim.SGD)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            first, second = self.optimizers()  # type: ignore[misc]
            first.step(closure=lambda: super(Manual, self).training_step(batch, batch_idx))
            second.step(closure=lambda: super(Manual, self).training_step(batch, batch_idx).round(decimals=-3))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]

    logger, monitor, module = mlflow_logger("manual", store=store), ZOMonitor(min_seconds=0), Manual()
    trainer = quiet_trainer(strategy=ZOStrategy(PLAIN), logger=logger, callbacks=[monitor])
    trainer.fit(module, loader(batches(STEPS, SIZE)))
    assert monitor.forward_passes == 4 * STEPS
    assert len(module.losses()) == 2 + 4 * STEPS  # each optimizer has a rehearsal
    assert (monitor.skipped_steps, monitor.examples_seen) == (STEPS, SIZE * STEPS)


def test_tie_rate_of_an_accumulation_window(store: str) -> None:
    class Coarse(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx).round(decimals=-3)

    logger = mlflow_logger("ties", store=store)
    trainer = quiet_trainer(
        strategy=ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=0)], accumulate_grad_batches=2
    )
    trainer.fit(Coarse(torch.optim.SGD), loader(batches(STEPS, SIZE)))
    run = MlflowClient(store).get_run(logger.run_id)
    assert {v for _, v in history(store, run, "zo/tie_rate")} == {1.0}


def test_not_a_number_reaches_the_store_at_its_step(store: str) -> None:
    class Broken(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1.0)

    logger = mlflow_logger("nan", store=store)
    trainer = quiet_trainer(strategy=ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=0)])
    with pytest.warns(match="step 3 skipped"):
        trainer.fit(Broken(torch.optim.SGD), loader(batches(6, SIZE)))
    run = MlflowClient(store).get_run(logger.run_id)
    assert [s for s, v in history(store, run, "train/loss") if v != v] == [4]
    assert run.data.metrics["zo/skipped_steps"] == 1


@pytest.mark.parametrize("zeroth_order", [True, False])
def test_a_resumed_fit_goes_on_with_its_counters_and_says_which_run_it_was(
    zeroth_order: bool, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(epochs: int, checkpoint: Path | None = None, **settings: Any) -> tuple[pl.Trainer, ZOMonitor, Any]:
        logger = mlflow_logger("resumed", store=store, **settings)
        monitor = ZOMonitor(min_seconds=0)
        strategy = ZOStrategy(PLAIN) if zeroth_order else "auto"
        trainer = quiet_trainer(strategy, logger=logger, callbacks=[monitor], max_epochs=epochs, default_root_dir=tmp_path)
        trainer.fit(Regression(torch.optim.SGD), loader(batches(4, SIZE)), ckpt_path=checkpoint)  # type: ignore[arg-type]
        return trainer, monitor, logger

    trainer, half, first = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with caplog.at_level("INFO"):
        _, whole, _ = run(2, tmp_path / "half.ckpt")
    assert f"mlflow_logger(run_id='{first.run_id}')" in caplog.text
    assert (half.examples_seen, whole.examples_seen) == (4 * SIZE, 8 * SIZE)
    assert whole.forward_passes == 2 * half.forward_passes
    assert whole.train_seconds > half.train_seconds
    caplog.clear()
    with caplog.at_level("INFO"):
        run(2, tmp_path / "half.ckpt", run_id=first.run_id)
    assert "mlflow_logger(run_id=" not in caplog.text
    rows = history(store, MlflowClient(store).get_run(first.run_id), "examples_seen")
    assert [value for _, value in rows] == [step * SIZE for step in range(1, 9)]


def test_readers_do_not_block_the_store(store: str) -> None:
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        ZOMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        ZOMonitor(min_seconds=-1)


def test_fast_steps_are_not_all_logged_but_the_last_is(store: str) -> None:
    logger = mlflow_logger("fast", store=store)
    trainer = quiet_trainer(strategy=ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=3600)])
    trainer.fit(Regression(torch.optim.SGD), loader(batches(STEPS, SIZE)))
    run = MlflowClient(store).get_run(logger.run_id)
    assert [s for s, _ in history(store, run, "train/loss")] == [1, STEPS]
    assert run.data.metrics["forward_passes"] == 2 * STEPS


def test_memory_meter_sees_what_is_allocated() -> None:
    meter = MemoryMeter(mlp(), torch.device("cpu"))
    before = meter.peak()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert meter.peak() - before > 60 << 20
    assert tensor_bytes([block, block[:10], None]) == 64 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators say for themselves what they keep")
def test_memory_freed_before_is_no_library() -> None:
    """A quantised model's old weights: their memory is training's again."""
    size, count = 100_000, 1000  # small enough to come from the heap, which only shrinks from its end
    old = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    end = old[-1]
    del old
    meter = MemoryMeter(mlp(), torch.device("cpu"))
    new = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    assert meter.peak() > 0.8 * size * count
    del end, new


def test_tokens() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 5
    assert count_tokens({"input_ids": ids}) == 6
    assert count_tokens((ids, mask)) == 0
