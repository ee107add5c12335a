"""Drift and perplexity: those of the textbook, under any strategy, over a resumed fit."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Task, batches, loader, mlp, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zolightning import Forgetting, ZOStrategy
from zolightning.data import general_text, text_perplexity
from zolightning.engine.anchor import StartingWeights


def fit(
    folder: Path, callback: Forgetting, strategy: Any = "auto", dtype: Any = torch.float32, steps: int = 4, **more: Any
) -> Task:
    torch.manual_seed(3)
    module = Task(mlp().to(dtype), optimizer=partial(torch.optim.SGD, lr=1e-2))
    saved = ModelCheckpoint(folder, filename="saved", save_last=True)
    logger = CSVLogger(folder, version="")
    data = loader([tuple(t.to(dtype) for t in batch) for batch in batches(4)])
    trainer = quiet_trainer(
        strategy=strategy, callbacks=[callback, saved], logger=logger, enable_checkpointing=True, max_steps=steps, max_epochs=-1
    )
    trainer.fit(module, data, **more)
    return module


def logged(folder: Path, key: str = "forgetting/drift") -> dict[int, float]:
    head, *rows = [line.split(",") for line in (folder / "lightning_logs" / "metrics.csv").read_text().splitlines()]
    return {int(row[head.index("step")]): float(row[head.index(key)]) for row in rows if row[head.index(key)]}


def drift(module: nn.Module, dtype: Any = torch.float32) -> float:
    """The textbook's, with both models in memory."""
    torch.manual_seed(3)
    before, after = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (mlp().to(dtype), module))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["backprop", "zo"])
def test_drift_is_the_textbooks(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = fit(tmp_path, Forgetting(), ZOStrategy("spsa", lr=1e-2) if strategy == "zo" else "auto", dtype)
    found = logged(tmp_path)
    assert found[0] == 0
    assert found[4] == pytest.approx(drift(module, dtype), rel=1e-9)
    assert found[4] > 1e-4


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_fit_counts_from_its_first_weights(kept: bool, tmp_path: Path) -> None:
    fit(tmp_path / "a", Forgetting(), ZOStrategy("spsa", lr=1e-2))
    (first,) = (tmp_path / "a").rglob("first-weights-*.bin")
    again = partial(
        fit, tmp_path / "b", Forgetting(), ZOStrategy("spsa", lr=1e-2), steps=8, ckpt_path=str(tmp_path / "a" / "last.ckpt")
    )
    if kept:
        module = again()
        assert logged(tmp_path / "b")[8] == pytest.approx(drift(module), rel=1e-9)
        return
    first.unlink()
    with pytest.warns(UserWarning, match="counts from now"):
        again()
    assert logged(tmp_path / "b")[4] == 0


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="leave one of them out"):
        fit(tmp_path, Forgetting(), ZOStrategy("spsa", lr=1e-2, offload="cpu"))


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def test_perplexity_is_that_of_transformers_and_is_logged(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    model.train()
    texts = ["to be", "or not to be", "x"]
    nats, tokens = 0.0, 0
    for text in texts[:2]:
        ids = torch.tensor([Letters()(text)["input_ids"]])
        nats += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.numel() - 1)
        tokens += ids.numel() - 1
    assert text_perplexity(model, Letters(), texts) == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="at least two tokens"):
        text_perplexity(model, Letters(), ["x"])

    measure: Any = partial(text_perplexity, model, Letters(), texts)
    fit(tmp_path, Forgetting(measure), ZOStrategy("spsa", lr=1e-2))
    assert logged(tmp_path, "forgetting/perplexity") == {0: pytest.approx(measure()), 4: pytest.approx(measure())}


def test_the_general_text_is_prose() -> None:
    texts = general_text()
    assert len(texts) > 20
    assert all(len(text.split()) >= 20 and text[0].isalpha() for text in texts)
    assert sum(len(text.split()) for text in texts) > 1000


def test_a_tensor_that_began_at_zero_has_no_relative_drift(tmp_path: Path) -> None:
    weight: Tensor = torch.zeros(3)
    (tmp_path / "file.bin").touch()
    assert math.isnan(StartingWeights(tmp_path / "file.bin", [weight]).drift())
    with pytest.raises(ValueError, match="has 12 bytes, but the trained weights have 16"):
        StartingWeights(tmp_path / "file.bin", [torch.zeros(4)])
