"""Small modules, batches and trainers that the tests of the core share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from zolightning import ZOConfig, ZOMixin, ZOStrategy
from zolightning.methods.estimators import Estimator
from zolightning.probing.inspection import Examples
from zolightning.probing.isolation import Isolation
from zolightning.probing.reuse import Reuses
from zolightning.probing.runner import Runner
from zolightning.space import View
from zolightning.types import Estimate, Key

PLAIN = ZOConfig(estimator="spsa", eps=1e-3, select="all", structure="dense", normalize=False, seed=7)
"""Textbook two-point SPSA: what tests/reference.py does."""

exact_epochs = pytest.mark.skipif(
    Version(version("lightning")) < Version("2.5.3"),
    reason="when it resumes, Lightning before 2.5.3 starts the finished epoch's data loader once more, which draws a seed",
)

Loss = Callable[[nn.Module, Any], Any]


def load_example(name: str) -> Any:
    """The module of examples/<name>.py, which may import the others, as it does as a script."""
    folder = Path(__file__).parents[1] / "examples"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def mse(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(net(x).double(), y.double())


class Language(pl.LightningModule):
    """A Hugging Face language model on batches of token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss.double()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-3)


class Task(pl.LightningModule):
    """A net, a loss, and whatever optimizer and scheduler a test wants."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss = mse,
        optimizer: Callable[[list[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
    ) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.make_optimizer = optimizer or (lambda parameters: SGD(parameters, lr=1e-2))
        self.make_scheduler, self.interval = scheduler, interval

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.parameters()))
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": self.interval}]


class PerExampleTask(ZOMixin, Task):
    """The same with a loss per example."""

    def zo_objective(self, batch: Any) -> Any:
        return self.loss(self.net, batch)


def per_example_mse(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (net(x).double() - y.double()).square().mean(-1)


def dropped(net: nn.Module, batch: Any) -> Tensor:
    """Draws from PyTorch's generator, which a resumed run has to continue."""
    x, y = batch
    return F.mse_loss(net(F.dropout(x, 0.3)).double(), y.double())


def mlp(inputs: int = 4, hidden: int = 8, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def batches(count: int = 20, size: int = 5, inputs: int = 4, outputs: int = 3, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, inputs, generator=generator), torch.randn(size, outputs, generator=generator)) for _ in range(count)
    ]


def loader(items: Sequence[Any], shuffle: bool = False) -> DataLoader[Any]:
    """Each item is a batch, passed on as it is."""
    return DataLoader(items, batch_size=None, shuffle=shuffle, collate_fn=lambda item: item)  # type: ignore[arg-type]


class Resumable:
    """Lightning starts a plain DataLoader again from its first batch; one with a state goes on where it was."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.at = items, 0

    def __len__(self) -> int:  # without it Lightning reads one batch ahead of the state that it saves
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        torch.rand(())  # as a DataLoader draws its workers' seed
        self.at %= len(self)
        for item in self.items[self.at :]:
            self.at += 1
            yield item

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def quiet_trainer(strategy: Any = None, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, **quiet, **({} if strategy is None else {"strategy": strategy}), **settings}
    )


def fit(module: pl.LightningModule, items: Iterable[Any], strategy: Any = PLAIN, **settings: Any) -> pl.Trainer:
    """Train one epoch on the items; a ZOConfig makes a ZOStrategy. Returns the trainer."""
    trainer = quiet_trainer(ZOStrategy(strategy) if isinstance(strategy, ZOConfig) else strategy, **settings)
    trainer.fit(module, loader(list(items)))
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float | None = None) -> None:
    """Bit for bit, or within an absolute tolerance."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance is None:
            assert torch.equal(value, right[name]), f"{name} differs by {(value - right[name]).abs().max()}"
        else:
            torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance)


def tiny_causal_lm(kind: str, width: int = 16) -> nn.Module:
    """Llama or GPT-2 with a tied head, two layers of the width, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if kind == "llama":
        llama = LlamaConfig(
            vocab_size=32, hidden_size=width, intermediate_size=24 if width == 16 else width, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        return LlamaForCausalLM(llama).train()
    gpt2 = GPT2Config(vocab_size=32, n_embd=width, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.0
    return GPT2LMHeadModel(gpt2).train()


def token_batches(count: int = 20, size: int = 2, length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 32, (size, length), generator=generator) for _ in range(count)]


def lm_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """One for each example."""
    logits = model(input_ids=ids).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].double()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


@torch.no_grad()
def estimated(
    estimator: Estimator,
    view: View,
    loss: Callable[[Any], Any],
    batch: Any,
    key: Key,
    examples: Examples = Examples(losses=False, repeats=False),  # noqa: B008
    reuse: Reuses | None = None,
) -> Estimate:
    """The estimate of one micro-batch, its points run through the view."""
    runner = Runner(view, Isolation(view.root, torch.device("cpu")), examples, reuse)
    return estimator.tell(key, runner.run(loss, batch, partial(estimator.ask, key)).answers)
