"""Both probes of a direction that the examples share: in one batch where it is small, and only where that gives the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Resumable,
    Task,
    assert_same,
    batches,
    fit,
    lm_loss,
    lm_losses,
    loader,
    mlp,
    per_example_mse,
    quiet_trainer,
    tiny_causal_lm,
    token_batches,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from zolightning import ZOConfig, ZOStrategy


def sized(loss: Callable[[nn.Module, Any], Any], sizes: list[int]) -> Callable[[nn.Module, Any], Any]:
    """The loss, which notes how many examples it is given."""

    def noted(net: nn.Module, batch: Any) -> Any:
        sizes.append(len(batch[0] if isinstance(batch, tuple) else batch))
        return loss(net, batch)

    return noted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", [lm_losses, lm_loss], ids=["losses", "mean"])
@pytest.mark.parametrize("config", [PLAIN, PLAIN.override(noise="gaussian", num_queries=2)], ids=["one", "two"])
def test_trains_as_in_two_forwards(kind: str, loss: Any, config: Any) -> None:
    sizes: list[int] = []
    together = PerExampleTask(tiny_causal_lm(kind), sized(loss, sizes))
    strategy = fit(together, token_batches(3), config).strategy
    assert sizes == [2, 2, 2, 4] + [4] * (3 * config.num_queries)  # a rehearsal and three looks before the first step
    apart = PerExampleTask(tiny_causal_lm(kind), loss)
    fit(apart, token_batches(3), config.override(one_batch=False))
    assert_same(weights(together), weights(apart), tolerance=1e-5)
    assert strategy.last_record.forwards == 2 * config.num_queries  # type: ignore[attr-defined]


def test_said_when_training_starts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(PerExampleTask(mlp(), per_example_mse), batches(1))
    assert "a direction for the batch, both probes in one batch" in caplog.text


def test_large_batches_take_two_forwards() -> None:
    sizes: list[int] = []
    fit(PerExampleTask(mlp(), sized(per_example_mse, sizes)), batches(2, size=2) + batches(2, size=65) + batches(1, size=3))
    assert sizes == [2, 2, 2, 4, 4, 4, 65, 65, 65, 65, 6]
    sizes.clear()
    fit(PerExampleTask(mlp(), sized(per_example_mse, sizes)), batches(1, size=65) + batches(2, size=2))
    assert sizes == [65, 65, 65, 2, 2, 2, 2]  # the first batch decides


def test_large_batches_with_a_direction_for_each_example_take_two_forwards() -> None:
    """The same directions: only the rounding may differ."""
    sizes: list[int] = []
    module = PerExampleTask(mlp(), sized(per_example_mse, sizes))
    apart, items = copy.deepcopy(module), batches(2) + batches(1, size=1025)
    fit(module, items, ZOConfig(select="all", eps=1e-2, lr=1e-2))
    assert sizes == [5, 5, 5, 10, 10, 10, 1025, 1025]
    fit(apart, items, ZOConfig(select="all", eps=1e-2, lr=1e-2, one_batch=False))
    assert_same(weights(module), weights(apart), tolerance=1e-5)


class Reads(nn.Module):
    """A weight that is read where no examples can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Turned(nn.Linear):
    """Its input holds the examples along dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None].expand(4, -1, -1).contiguous()).mean(0)


def penalised(net: nn.Module, batch: Any) -> Tensor:
    """Not the mean over the examples."""
    return per_example_mse(net, batch).mean() + 1.0


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (Reads, per_example_mse),
        (lambda: Turned(4, 3), per_example_mse),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), per_example_mse),
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), per_example_mse),
        (mlp, penalised),
    ],
    ids=["odd read", "turned", "batch norm", "dropout", "penalty"],
)
def test_only_where_it_gives_the_same(net: Callable[[], nn.Module], loss: Any) -> None:
    torch.manual_seed(0)
    sizes: list[int] = []
    module = PerExampleTask(net(), sized(loss, sizes))
    fit(module, batches(2))
    assert sizes[-4:] == [5, 5, 5, 5]


def test_tried_again_when_something_is_unfrozen() -> None:
    class Thawed(PerExampleTask):
        """The odd weight stands still until step 2."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].weight.requires_grad_(batch_idx >= 2)  # type: ignore[index, union-attr]

    sizes: list[int] = []
    fit(Thawed(nn.Sequential(Reads(), nn.Linear(3, 3)), sized(per_example_mse, sizes)), batches(4))
    assert sizes == [5, 5, 5, 10, 10, 10] + [5, 5, 5, 10] + [5] * 4


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (Task, {}),
        (PerExampleTask, {"estimator": "one_sided"}),
        (PerExampleTask, {"estimator": "population", "num_queries": 2}),
        (PerExampleTask, {"one_batch": False}),
    ],
)
def test_only_for_two_sided_probes_of_a_mixin(make: type[Task], changes: dict[str, Any]) -> None:
    sizes: list[int] = []
    fit(make(mlp(), sized(per_example_mse, sizes)), batches(1), PLAIN.override(**changes))
    assert set(sizes) == {5}


@pytest.mark.parametrize("config", [PLAIN, ZOConfig(select="all", eps=1e-2)], ids=["spsa", "default"])
def test_code_that_takes_no_doubled_batch(config: ZOConfig) -> None:
    """The look at one fails, and no step tries it again."""

    class Fixed(nn.Linear):
        """Holds something for each example of the batches that it knows."""

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("offset", torch.arange(15.0).reshape(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.offset

    sizes: list[int] = []
    torch.manual_seed(0)
    module = PerExampleTask(Fixed(), sized(per_example_mse, sizes))
    twin = copy.deepcopy(module)
    fit(module, batches(3), config)
    looks = 4  # of which the last is at a doubled batch
    assert sizes == [5] * (looks - 1) + [10] + [5] * 2 * 3
    fit(twin, batches(3), config.override(one_batch=False))
    assert_same(weights(module), weights(twin))


def test_two_forwards_on_request_when_resuming(tmp_path: Path) -> None:
    """Whatever the checkpoint's run did."""
    sizes: list[int] = []
    module = PerExampleTask(mlp(), sized(per_example_mse, sizes))
    fit(module, batches(2), PLAIN).save_checkpoint(tmp_path / "x.ckpt")
    assert sizes[-2:] == [10, 10]
    sizes.clear()
    trainer = quiet_trainer(ZOStrategy(PLAIN, one_batch=False), max_epochs=2)
    trainer.fit(module, loader(batches(2)), ckpt_path=tmp_path / "x.ckpt")
    assert sizes == [5] * 5


def test_a_resumed_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """Also when its first batch would decide otherwise."""

    def run(checkpoint: Any = None) -> tuple[PerExampleTask, list[int]]:
        torch.manual_seed(4)
        sizes: list[int] = []
        saver = ModelCheckpoint(tmp_path / str(checkpoint is None), filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = quiet_trainer(ZOStrategy(PLAIN), callbacks=[saver], enable_checkpointing=True)
        module = PerExampleTask(mlp(), sized(per_example_mse, sizes))
        data = batches(2, size=3) + batches(1, size=70) + batches(2, size=3)
        trainer.fit(module, Resumable(data), ckpt_path=checkpoint)
        return module, sizes

    whole, _ = run()
    (path,) = (tmp_path / "True").glob("step=2.ckpt")
    again, sizes = run(path)
    assert sizes == [70, 70, 70, 6, 6]
    assert_same(weights(again), weights(whole))
