"""Training steps whose loss, weights or examples are not what they seem: the right result, or a refusal before any change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, Task, assert_same, batches, fit, mlp, per_example_mse, quiet_trainer, weights
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.ledger import read, replay
from zolightning.methods.recipes import recipe

RECIPES = {
    "spsa": PLAIN,
    "default": recipe("default").override(select="all", lr=1e-2, seed=7),
    "fzoo": recipe("fzoo").override(lr=1e-2, seed=7),
}

# ---- a loss is known by its value, not by its object


def penalty(net: nn.Module) -> Tensor:
    return torch.stack([p.square().mean() for p in net.parameters()]).sum()


def added(net: nn.Module, loss: Tensor) -> Tensor:
    loss += penalty(net)
    return loss


def negated(net: nn.Module, loss: Tensor) -> Tensor:
    loss *= -1
    return loss


def through_data(net: nn.Module, loss: Tensor) -> Tensor:
    loss.data.add_(penalty(net).detach())
    return loss


def through_a_view(net: nn.Module, loss: Tensor) -> Tensor:
    loss.view(1).add_(penalty(net))
    return loss


CHANGED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {
    "+=": (added, lambda net, loss: loss + penalty(net)),
    "*= -1": (negated, lambda net, loss: -loss),
    ".data": (through_data, lambda net, loss: loss + penalty(net)),
    "a view": (through_a_view, lambda net, loss: loss + penalty(net)),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("change", CHANGED)
def test_a_loss_changed_in_place_is_the_loss(change: str, name: str) -> None:
    ended = []
    for make in CHANGED[change]:
        task = Task(mlp(), lambda net, b, make=make: make(net, F.mse_loss(net(b[0]), b[1])))
        fit(task, batches(4), RECIPES[name])
        ended.append(weights(task))
    assert_same(*ended)


def test_the_router_s_loss_of_a_mixture_of_experts_counts() -> None:
    """transformers adds it to the mean in place."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    ids = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(0))
    config = Qwen3MoeConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=100.0,
    )  # fmt: skip
    torch.manual_seed(0)
    task = Task(Qwen3MoeForCausalLM(config), lambda net, b: net(input_ids=b, labels=b).loss)
    with torch.no_grad():
        expected = float(task.net(input_ids=ids, labels=ids).loss)
    assert expected > 50
    record = fit(task, [ids], RECIPES["default"].override(lr=0.0)).strategy.last_record  # type: ignore[attr-defined]
    assert record.loss == pytest.approx(expected, rel=0.05)


# ---- weights that no probe reads


class Towers(Task):
    """Reads its second net only in steps that a test wants."""

    def __init__(self, reads: Callable[[int], bool], make: Any = SGD) -> None:
        nets = nn.ModuleDict({"image": mlp(), "text": mlp()})
        super().__init__(nets, optimizer=lambda p: make(p, lr=1e-2, weight_decay=0.1))
        self.reads = reads

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net["image"](batch[0])  # type: ignore[index]
        if self.reads(batch_idx):
            out = out + self.net["text"](batch[0])  # type: ignore[index]
        return F.mse_loss(out, batch[1])


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("name", RECIPES)
def test_weights_that_no_probe_reads_stay(name: str, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = Towers(lambda step: False, make)
    before = weights(task)
    with caplog.at_level("INFO"):
        fit(task, batches(5), RECIPES[name].override(optimizer="module", lr=None))
    after = weights(task)
    assert_same({k: v for k, v in after.items() if "text" in k}, {k: v for k, v in before.items() if "text" in k})
    assert all(not torch.equal(after[k], before[k]) for k in after if "image" in k)
    assert caplog.text.count("weights that the loss does not read get no update") == 1
    assert "net.text.0.weight" in caplog.text


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("name", RECIPES)
def test_they_are_updated_in_the_steps_that_read_them(name: str, make: Any, tmp_path: Path) -> None:
    """What a step left alone is left alone by the replay, too."""
    task, path = Towers(lambda step: step % 2 == 1, make), tmp_path / "run.zo"
    base = {n: nn.Parameter(p.detach().clone()) for n, p in task.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    config = RECIPES[name].override(optimizer="module", lr=None)
    task.on_train_batch_end = lambda *_: seen.append(weights(task))  # type: ignore[method-assign]
    quiet_trainer(strategy=ZOStrategy(config, ledger=path), max_epochs=1).fit(
        task,
        DataLoader(batches(6), batch_size=None, collate_fn=lambda item: item),  # type: ignore[arg-type]
    )
    text = [{k: v for k, v in state.items() if "text" in k} for state in [weights_of(base), *seen]]
    for step, (before, after) in enumerate(pairwise(text)):
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert moved == (list(before) if step % 2 else [])
    assert replay(read(path), base).step == 6
    assert_same(weights_of(base), weights(task))


def weights_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_a_window_reads_what_its_micro_batches_read() -> None:
    task = Towers(lambda step: step % 2 == 1)
    before = weights(task)
    fit(task, batches(2), PLAIN, accumulate_grad_batches=2)
    assert all(not torch.equal(before[k], v) for k, v in weights(task).items())


# ---- examples


@pytest.mark.parametrize("divide", [lambda x: x.shape[0], lambda x: float(x.shape[0]) ** 0.5])
def test_losses_that_depend_on_the_batch_s_size_are_not_doubled(divide: Callable[[Tensor], float]) -> None:
    """Divided by a count of the whole batch, they would be smaller in a batch of twice the size."""
    gs = []
    for one_batch in (True, False):
        task = PerExampleTask(mlp(), lambda net, b: per_example_mse(net, b) / divide(b[0]))
        record = fit(task, batches(1), RECIPES["default"].override(one_batch=one_batch, lr=0.0)).strategy.last_record  # type: ignore[attr-defined]
        gs.append(record.raw)
    assert gs[0] == pytest.approx(gs[1], rel=1e-9)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [Task, PerExampleTask])
def test_a_wrong_number_of_losses_is_refused(make: type[Task], name: str) -> None:
    task = make(mlp(), lambda net, b: per_example_mse(net, b)[:3])
    before = weights(task)
    with pytest.raises(ValueError, match="returned 3 losses for a batch of 5 examples; return one loss for each example"):
        fit(task, batches(1), RECIPES[name])
    assert_same(weights(task), before)
