"""Models of transformers, made from small configurations and saved, give from their files what they give from memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from helpers import PLAIN, Language
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.offload import OffloadError, export, from_pretrained, stored

SMALL = {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 512, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": {**LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {**LLAMA_LIKE, "head_dim": 64},
    "gemma2": {**LLAMA_LIKE, "head_dim": 64},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "opt": {**SMALL, "ffn_dim": 512, "word_embed_proj_dim": 256, "max_position_embeddings": 64},
    "gpt2": {"vocab_size": 320, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "starcoder2": LLAMA_LIKE,
    "bloom": {"vocab_size": 320, "hidden_size": 256, "n_layer": 2, "n_head": 4},
    "falcon": {**SMALL, "alibi": False},
    "olmo2": LLAMA_LIKE,
}


def saved(kind: str, **options: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("model", **options)
    return Path("model")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def fitted(model: nn.Module, folder: str) -> dict[str, Tensor]:
    task = Language(model)
    data = DataLoader(torch.arange(24).view(3, 8) * 7, batch_size=1)  # type: ignore[arg-type]
    pl.Trainer(
        strategy=ZOStrategy(PLAIN),
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, data)
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_from_files_gives_the_bits_of_memory(kind: str) -> None:
    folder = saved(kind, max_shard_size="1MB")
    before = hashes(folder)
    resident = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    streamed = from_pretrained(transformers.AutoModelForCausalLM, folder, dtype=torch.bfloat16)
    assert len(stored(streamed.parameters())) == sum(p.numel() > 1 << 16 for p in resident.parameters())
    assert [n for n, _ in streamed.named_parameters()] == [n for n, _ in resident.named_parameters()]
    ids = torch.arange(12).view(2, 6) * 9
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, resident(ids).logits)
    expected, found = fitted(resident, "memory"), fitted(streamed, "files")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert hashes(folder) == before


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_trained_weights_are_exported_one_at_a_time(kind: str) -> None:
    folder = saved(kind)
    model = from_pretrained(transformers.AutoModelForCausalLM, folder, dtype=torch.bfloat16)
    trained = fitted(model, "files")
    export(model, "exported", shard_bytes=1 << 20)
    assert len(list(Path("exported").glob("*.safetensors"))) > 1
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained("exported", dtype=torch.bfloat16),
        from_pretrained(transformers.AutoModelForCausalLM, "exported"),
    ):
        assert all(torch.equal(p.detach(), trained[f"model.{name}"]) for name, p in again.named_parameters())
    with pytest.raises(OffloadError, match="empty folder"):
        export(model, folder)


def test_a_new_head_begins_as_the_class_says_and_is_told() -> None:
    folder = saved("qwen3")
    with pytest.warns(UserWarning, match="score"):
        model = from_pretrained(transformers.AutoModelForSequenceClassification, folder, num_labels=2)
    head = model.score.weight
    assert 0.01 < head.std() < 0.03
    assert len(stored(model.parameters())) == 7


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file"),
        (lambda folder: shutil.copy(folder / "config.json", folder / "model.safetensors"), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").open("r+b").truncate(500_000), "is damaged"),
        (lambda folder: edit(folder, intermediate_size=384), "another model's weights"),
        (lambda folder: edit(folder, model_type="opt", ffn_dim=512), "another form"),
    ],
)
def test_files_that_do_not_fit_are_refused(harm: Callable[[Path], Any], error: str) -> None:
    folder = saved("llama")
    harm(folder)
    with pytest.raises(OffloadError, match=error):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


def test_a_file_that_is_cut_while_the_model_is_used_is_noticed() -> None:
    folder = saved("llama")
    model = from_pretrained(transformers.AutoModelForCausalLM, folder)
    (folder / "model.safetensors").open("r+b").truncate(100_000)
    with pytest.raises(OffloadError, match="cut short"), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64))


def test_a_lost_shard_is_named() -> None:
    folder = saved("llama", max_shard_size="1MB")
    lost = next(folder.glob("model-00002*"))
    lost.unlink()
    with pytest.raises(OffloadError, match=lost.name):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
