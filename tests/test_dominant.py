"""The dominant block is the first after which activations have outliers, is found once, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, Resumable, Task, assert_same, batches, dropped, fit, mlp, quiet_trainer, tiny_causal_lm, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from zolightning import ZOStrategy
from zolightning.space import dominant_block

CONFIG = PLAIN.override(select="dominant")


class Spiky(nn.Module):
    """A residual block that may multiply one channel."""

    def __init__(self, spike: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("spike", torch.ones(16).index_fill(0, torch.tensor(3), spike))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return (x + 0.1 * self.linear(x)) * self.spike, None


class Stack(nn.Module):
    def __init__(self, *spikes: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.blocks, self.outer = nn.Linear(4, 16), nn.ModuleList(map(Spiky, spikes)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.outer(x)


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("spikes", "found"), [
    ((1, 1, 50, 1), 2),
    ((1, 20, 50, 1), 1),  # the first, not the largest
    ((30, 1, 1, 1), 0),
    ((1, 1, 1, 3), 3),  # nobody jumps: the largest step
])  # fmt: skip
def test_first_jump(spikes: tuple[float, ...], found: int) -> None:
    net = Stack(*spikes)
    assert dominant_block(net, lambda: net(X)) == f"blocks:{found}-{found}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_blocks_of_a_transformer() -> None:
    model = tiny_causal_lm("llama")
    assert dominant_block(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]))) in ("blocks:0-0", "blocks:1-1")


def test_what_cannot_be_calibrated() -> None:
    net = mlp()
    with pytest.raises(ValueError, match="'dominant'` needs a stack of equal blocks"):
        dominant_block(net, lambda: net(X))
    net = Stack(1, 1)
    with pytest.raises(ValueError, match=r"saw 0 of 3 activations of 'blocks' in the first batch"):
        dominant_block(net, lambda: net.outer(net.inner(X)))
    with pytest.raises(ZeroDivisionError):
        dominant_block(net, lambda: 1 / 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_training_is_that_of_the_block() -> None:
    """Calibration draws no number, logs nothing and changes no buffer."""
    ours, theirs = Stack(1, 50, 1), Stack(1, 50, 1)
    for net, select in ((ours, "dominant"), (theirs, "blocks:1-1")):
        torch.manual_seed(4)
        fit(Task(net, dropped), batches(4), CONFIG.override(select=select))
    assert_same(weights(ours), weights(theirs))
    assert not torch.equal(ours.blocks[1].linear.weight, Stack(1, 50, 1).blocks[1].linear.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(ours.blocks[2].linear.weight, Stack(1, 50, 1).blocks[2].linear.weight)  # type: ignore[union-attr, arg-type]


def test_a_resumed_run_keeps_its_block(tmp_path: Path) -> None:
    """Though the batch and the weights of now would say another."""

    def run(net: Stack, checkpoint: Any = None) -> Stack:
        torch.manual_seed(4)
        saver = ModelCheckpoint(tmp_path / str(checkpoint is None), filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = quiet_trainer(ZOStrategy(CONFIG), callbacks=[saver], enable_checkpointing=True)
        trainer.fit(Task(net, dropped), Resumable(batches(6)), ckpt_path=checkpoint)
        return net

    whole = run(Stack(1, 50, 1))
    (path,) = (tmp_path / "True").glob("step=3.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["zolightning"]["calibration"]["dominant"] == "blocks:1-1"
    for name in ("blocks.0.spike", "blocks.1.spike"):
        saved["state_dict"][f"net.{name}"][3] = 51 - saved["state_dict"][f"net.{name}"][3]
    torch.save(saved, tmp_path / "swapped.ckpt")
    assert_same(weights(run(Stack(1, 50, 1), path)), weights(whole))
    swapped = run(Stack(1, 50, 1), tmp_path / "swapped.ckpt")
    assert dominant_block(swapped, lambda: swapped(X)) == "blocks:0-0"
    start = saved["state_dict"]["net.blocks.0.linear.weight"]
    assert torch.equal(swapped.blocks[0].linear.weight, start)  # type: ignore[union-attr, arg-type]
