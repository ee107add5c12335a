"""Backprop on some parameters beside probes on the others: equal to its textbook twin, whole checkpoints, an honest ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Task, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning import ZOStrategy
from zolightning.engine.session import Session
from zolightning.ledger import LedgerError, read, replay
from zolightning.methods.backprop import Backprop
from zolightning.methods.config import ZOConfig
from zolightning.strategy._lightning import MisconfigurationException
from zolightning.strategy.ledger_io import LedgerCheckpointIO
from zolightning.strategy.requirements import check_backprop

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


CONFIG = ZOConfig(
    estimator="one_sided", select="all", structure="dense", normalize=False, seed=1, num_queries=2, lr=1e-2, optimizer="sgd"
)
LAST = [f"blocks.{i}.linear.{kind}" for i in (2, 3) for kind in ("weight", "bias")]


@pytest.mark.parametrize("rate", [None, 3e-3])
def test_a_step_is_that_of_both_parents(rate: float | None) -> None:
    """The last blocks as Adam steps them on the gradient at θ, all others as the probes' own step does."""
    net, first, zeroth = Net(), Net(), Net()
    session = Session(net, torch.optim.Adam(net.parameters(), lr=0.1), CONFIG.override(backprop=Backprop("last:2", rate)))
    twin = Session(zeroth, torch.optim.Adam(zeroth.parameters(), lr=0.1), CONFIG)
    adam = torch.optim.Adam([p for n, p in first.named_parameters() if n in LAST], lr=rate or 0.1)
    for _ in range(3):
        other = dict(net.named_parameters())
        for model in (first, zeroth):  # both go on from where the hybrid is
            for name, p in model.named_parameters():
                p.data.copy_(other[name].data)
        adam.zero_grad()
        loss_of(first, (X, Y)).backward()  # type: ignore[no-untyped-call]
        adam.step()
        for each, model in ((session, net), (twin, zeroth)):
            estimate = each.estimate(lambda batch, model=model: loss_of(model, batch), (X, Y))
            assert estimate is not None
            assert not estimate.output.requires_grad
            each.update()
        expected = dict(first.named_parameters())
        for name, p in net.named_parameters():
            assert p.requires_grad
            assert p.grad is None
            if name in LAST:
                torch.testing.assert_close(p, expected[name], rtol=0, atol=0)


def test_probes_move_only_the_others() -> None:
    """With a frozen last part the probes' step is that of a module whose last part cannot be trained."""
    net, frozen = Net(), Net()
    for name, p in frozen.named_parameters():
        p.requires_grad_(name not in LAST)
    hybrid = CONFIG.override(backprop=Backprop("last:2", 1e-3))
    for model, config in ((net, hybrid), (frozen, CONFIG)):
        session = Session(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
        session.estimate(lambda batch, model=model: loss_of(model, batch), (X, Y))
        session.update()
    twin = dict(frozen.named_parameters())
    for name, p in net.named_parameters():
        assert torch.equal(p, twin[name]) is (name not in LAST)


def module() -> Task:
    return Task(Net(), loss_of, torch.optim.Adam)


def fit(folder: Path, steps: int, ckpt: str | None = None, **settings: Any) -> tuple[Task, ZOStrategy]:
    task = module()
    strategy = ZOStrategy(CONFIG, backprop="last:2", **settings)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(strategy, max_steps=steps, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(task, DataLoader(TensorDataset(X, Y), batch_size=4), ckpt_path=ckpt)
    return task, strategy


def test_checkpoints_are_whole_and_the_ledger_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="whole ones"):
        whole, strategy = fit(tmp_path, 6, ledger=tmp_path / "ledger.zo", checkpoint_io=LedgerCheckpointIO())
    resumed, _ = fit(tmp_path / "again", 6, str(tmp_path / "step=4.ckpt"), ledger=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert strategy.last_record is not None
    assert len(strategy.last_record.backprop) == 4
    with pytest.raises(LedgerError, match="backprop trains"):
        replay(read(tmp_path / "ledger.zo"), dict(module().named_parameters()))


def test_accumulated_gradients_are_means() -> None:
    net, twin = Net(), Net()
    session = Session(
        net, torch.optim.SGD(net.parameters(), lr=0.1), CONFIG.override(backprop=Backprop("last:2", 0.1), lr=1e-10)
    )
    for half in (slice(0, 4), slice(4, 8)):
        session.estimate(lambda batch: loss_of(net, batch), (X[half], Y[half]))
    session.update()
    loss_of(twin, (X, Y)).backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p, q - 0.1 * q.grad if name in LAST else q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recipe", ["default", "mezo", "deepzero"])
def test_recipes_take_it(recipe: str) -> None:
    """Also the one whose probes share a batch, and the one whose learning rate is found."""
    task = module()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    quiet_trainer(ZOStrategy(recipe, backprop="last:2", ledger=False), max_steps=2).fit(
        task, DataLoader(TensorDataset(X, Y), batch_size=4)
    )
    for name, p in task.named_parameters():
        if name.removeprefix("net.") in LAST:
            assert float((p - before[name]).abs().max()) > 1e-4


def test_what_is_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="together with conservative"):
        Session(net, optimizer, CONFIG.override(backprop="last:2", conservative=True))
    with pytest.raises(ValueError, match="together with cuda_graphs"):
        Session(net, optimizer, CONFIG.override(backprop="last:2", cuda_graphs=True))
    with pytest.raises(ValueError, match="together with anchor"):
        Session(net, optimizer, CONFIG.override(backprop="last:2", anchor=0.1))
    with pytest.raises(ValueError, match="together with several optimizers"):
        Session(net, [optimizer, optimizer], CONFIG.override(backprop="last:2"))
    with pytest.raises(ValueError, match="out of range"):
        Session(net, optimizer, CONFIG.override(backprop="last:9"))
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        Backprop("last:2", 0.0)
    session = Session(net, optimizer, CONFIG.override(backprop="last:2"))
    with pytest.raises(ValueError, match="needs a loss with a gradient"):
        session.estimate(lambda batch: float(loss_of(net, batch)), (X, Y))
    with pytest.raises(MisconfigurationException, match="with offloaded weights"):
        fit(Path("unused"), 1, offload="cpu", ledger=False)
    hybrid = CONFIG.override(backprop="last:2")
    with pytest.raises(MisconfigurationException, match="on several ranks"):
        check_backprop(hybrid, several=True, offloads=False, precision="32-true")
    with pytest.raises(MisconfigurationException, match="in float16"):
        check_backprop(hybrid, several=False, offloads=False, precision="16-mixed")
