"""Codes of 4-bit layers stream from a disk, where they are only read, while their scales are trained as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from helpers import PLAIN, Language, Task
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOStrategy, quantize
from zolightning.offload import OffloadError, StoredParameter, from_pretrained, stored

pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' 'accelerate>=1.0'")

WIDTH = 512


def task(kind: str, double: bool) -> Task:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    return Task(quantize(net, kind, double=double))  # type: ignore[arg-type]


def fitted(module: pl.LightningModule, strategy: ZOStrategy, data: Any) -> tuple[list[float], dict[str, Tensor]]:
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    fit = pl.Trainer(
        strategy=strategy,
        max_epochs=2,
        logger=False,
        callbacks=[Losses()],
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir="run",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit.fit(module, DataLoader(data, batch_size=2))
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("recipe", ["qzo", PLAIN])
def test_codes_are_read_only_and_give_the_bits_of_memory(recipe: Any, kind: str, double: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)) for _ in range(6)]
    module = task(kind, double)
    losses, weights = fitted(task(kind, double), ZOStrategy(recipe), pairs)
    found, streamed = fitted(module, ZOStrategy(recipe, offload="disk"), pairs)
    assert found == losses
    assert weights.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in weights.items())
    codes = [p for p in module.parameters() if isinstance(p, StoredParameter)]
    assert len(codes) == 2
    assert all(p.dtype == torch.uint8 for p in codes)
    assert not list(Path("run").rglob("weights-*.bin"))  # no code was written
    assert losses[0] != losses[-1]


def saved(**quantised: Any) -> Path:
    """A model whose layers transformers quantised and saved; codes of two of them are few enough to stay in memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=320, num_hidden_layers=1)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained("plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "plain", quantization_config=transformers.BitsAndBytesConfig(**quantised), device_map="cpu"
    )
    model.save_pretrained("saved")
    return Path("saved")


@pytest.mark.parametrize(("recipe", "double"), [("qzo", False), ("qzo", True), (PLAIN, True)])
def test_files_that_were_saved_quantised_give_the_bits_of_memory(recipe: Any, double: bool) -> None:
    folder = saved(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    before = (folder / "model.safetensors").read_bytes()
    data = torch.arange(24).view(3, 8) * 7
    resident = Language(transformers.AutoModelForCausalLM.from_pretrained(folder))
    streamed = Language(from_pretrained(transformers.AutoModelForCausalLM, folder))
    assert sum(p.dtype == torch.uint8 for p in stored(streamed.parameters())) == 5
    losses, weights = fitted(resident, ZOStrategy(recipe), data)
    found, again = fitted(streamed, ZOStrategy(recipe, offload="disk"), data)
    assert found == losses
    assert losses[0] != losses[-1]
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert (folder / "model.safetensors").read_bytes() == before


def test_files_of_other_codes_are_refused_by_name() -> None:
    with pytest.raises(OffloadError, match="8-bit"):
        from_pretrained(transformers.AutoModelForCausalLM, saved(load_in_8bit=True))
