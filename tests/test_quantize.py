"""Quantising models, and folders with trained scales that plain transformers and bitsandbytes read back."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Task, assert_same, batches, fit, lm_loss, loader, quiet_trainer, tiny_causal_lm, token_batches, weights
from torch import nn

from zolightning import ZOConfig, ZOStrategy
from zolightning.adapt.peft import lora
from zolightning.adapt.quantize import quantize
from zolightning.space import expose_scales

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50'")
pytest.importorskip("accelerate", reason="pip install 'accelerate>=1.0'")

QZO = ZOConfig(
    estimator="spsa", eps=1e-2, select="scales", structure="dense", scales="relative", normalize=False, lr=1e-1, seed=7
)
IDS = token_batches(1)[0]
AGAIN = {"save_original_format": False}
"""For models that transformers 5 read from codes: it cannot undo its own conversion of them, and need not."""

KINDS: list[Any] = [("nf4", {}), ("fp4", {}), ("nf4", {"double": True}), ("int8", {})]


def train(model: nn.Module) -> None:
    fit(Task(model, lm_loss), token_batches(6), QZO)


def config(kind: str, double: bool = False, threshold: float = 0.0) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)


def from_pretrained(folder: Path, **settings: Any) -> nn.Module:
    """Plain transformers; in training mode, where bitsandbytes computes from the scales as they are stored."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings).train()  # type: ignore[no-any-return]


def round_trip(model: Any, folder: Path, **saving: Any) -> None:
    """Save, read back without zolightning, and compare the outputs; then once more with the scales exposed."""
    expected = model(IDS).logits
    model.save_pretrained(folder, **saving)
    read = from_pretrained(folder)
    layers = [layer for layer in read.modules() if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    assert {type(layer) for layer in layers} <= {bnb.nn.Linear4bit, bnb.nn.Linear8bitLt}
    assert len(layers) == len([n for n, _ in model.named_parameters() if n.endswith("scales")])
    assert torch.equal(read(IDS).logits, expected)
    expose_scales(read)
    assert_same(weights(read), weights(model))
    train(read)


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_quantize_train_save_and_read_back(arch: str, kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model = quantize(tiny_causal_lm(arch, 64), kind, **settings)
    before = model(IDS).logits
    train(model)
    assert not torch.equal(model(IDS).logits, before)
    round_trip(model, tmp_path)


@pytest.mark.parametrize(("kind", "settings"), [*KINDS, ("int8", {"threshold": 6.0})], ids=str)
def test_a_model_that_transformers_quantised(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_causal_lm("llama", 64).save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    model = from_pretrained(tmp_path / "plain", quantization_config=config(kind, **settings))
    train(model)
    round_trip(model, tmp_path / "trained")


def llama(**settings: Any) -> nn.Module:
    """With a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **settings)).train()


every_kind = pytest.mark.parametrize("kind", ["nf4", "int8"])


@every_kind
def test_a_head_that_is_quantised_too(kind: Any, tmp_path: Path) -> None:
    """Transformers leaves heads alone unless the config says what to leave alone, if only nothing."""
    model: Any = quantize(llama(), kind, skip=())
    assert model.config.quantization_config.llm_int8_skip_modules == []
    expose_scales(model)
    round_trip(model, tmp_path)


@every_kind
@pytest.mark.parametrize(("arch", "skip"), [("gpt2", "c_attn"), ("gpt2", "h.0.mlp.c_proj"), ("llama", "layers.1")])
def test_what_was_skipped_is_not_quantised_when_it_is_read(arch: str, skip: str, kind: Any, tmp_path: Path) -> None:
    model: Any = quantize(tiny_causal_lm(arch, 64), kind, skip=("lm_head", skip))
    left = model.config.quantization_config.llm_int8_skip_modules
    assert left[0] == "lm_head"
    assert len(left) > 1
    assert all(skip in name for name in left[1:])
    expose_scales(model)
    round_trip(model, tmp_path)


@every_kind
def test_a_model_inside_another_module(kind: Any, tmp_path: Path) -> None:
    """Its config has the names that it knows its layers by."""
    task = Task(tiny_causal_lm("llama", 64), lm_loss)
    quantize(task, kind, skip=("lm_head", "layers.0.mlp"))
    expose_scales(task)
    round_trip(task.net, tmp_path / "whole")
    model: Any = llama()
    quantize(model.model, kind)
    expose_scales(model)
    round_trip(model, tmp_path / "body")


@every_kind
def test_layers_that_transformers_keeps_in_float32(kind: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 64, "d_ff": 64, "d_kv": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    torch.manual_seed(3)
    model: Any = quantize(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).train(), kind)
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear
    expected = model(input_ids=IDS, labels=IDS).logits
    model.save_pretrained(tmp_path)
    read = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).train()
    assert torch.equal(read(input_ids=IDS, labels=IDS).logits, expected)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"kind": "nf4"},
            {"kind": "int8"},
            "load_in_4bit=True, load_in_8bit=False, and .*load_in_4bit=False, load_in_8bit=True",
        ),
        ({"kind": "int8"}, {"kind": "nf4"}, "asked for .*load_in_4bit=True"),
        ({"kind": "nf4"}, {"kind": "fp4"}, "bnb_4bit_quant_type=nf4, and `quantize` was asked for bnb_4bit_quant_type=fp4;"),
        ({"kind": "nf4"}, {"kind": "nf4", "compute_dtype": torch.bfloat16}, "bnb_4bit_compute_dtype=float32, and"),
    ],
    ids=str,
)
def test_one_model_one_quantisation(first: Any, then: Any, message: str, tmp_path: Path) -> None:
    model: Any = quantize(tiny_causal_lm("llama", 64), skip=("lm_head", "mlp"), **first)
    with pytest.raises(ValueError, match=message):
        quantize(model, **then)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    expose_scales(model)
    round_trip(model, tmp_path / "some")
    read: Any = from_pretrained(tmp_path / "some")
    quantize(read, **first)
    expose_scales(read)
    round_trip(read, tmp_path / "all", **AGAIN)


@every_kind
def test_training_goes_on_from_a_saved_model(kind: Any, tmp_path: Path) -> None:
    model: Any = quantize(tiny_causal_lm("llama", 64), kind)
    train(model)
    model.save_pretrained(tmp_path / "first")
    read = from_pretrained(tmp_path / "first")
    train(read)
    round_trip(read, tmp_path / "second", **AGAIN)


def test_quantised_model_is_near_the_plain_one() -> None:
    plain: Any = tiny_causal_lm("llama", 64)
    expected = plain(IDS).logits
    distances = {}
    for kind in ("nf4", "fp4", "int8"):
        model: Any = quantize(tiny_causal_lm("llama", 64), kind)  # type: ignore[arg-type]
        distances[kind] = ((model(IDS).logits - expected).norm() / expected.norm()).item()
    assert distances["int8"] < 0.02 < distances["nf4"] < distances["fp4"] < 0.5


def test_what_is_replaced() -> None:
    model: Any = tiny_causal_lm("llama", 64)
    head, norm = model.lm_head, model.model.norm
    assert quantize(model, skip=("lm_head", "self_attn", "layers.1.mlp.up_proj")) is model
    assert model.lm_head is head
    assert model.model.norm is norm
    found = [name for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert found == [
        *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "down")),
    ]
    assert quantize(model, skip=()) is model  # the rest, but for the head, which is tied
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, bnb.nn.Linear4bit)
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())


def test_a_single_layer_keeps_its_bias_and_mode() -> None:
    linear = nn.Linear(64, 3).eval()
    layer: Any = quantize(linear, "nf4", compute_dtype=torch.bfloat16)
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.bias is linear.bias
    assert (layer.training, layer.compute_dtype) == (False, torch.bfloat16)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("strategy", ["auto", "zo"])
def test_lora_on_a_quantised_base(strategy: str, kind: Any) -> None:
    """By backprop, which is QLoRA, and by ZO: PEFT puts its own layers on, the adapters move and the base stays."""
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = quantize(tiny_causal_lm("llama", 64), kind)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"), model)
    assert type(model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    before = weights(model)
    task = Task(model, lm_loss, lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=1.0))
    chosen = "auto" if strategy == "auto" else ZOStrategy("spsa", select="re:lora_", normalize=False, eps=1e-2)
    fit(task, token_batches(3), chosen)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
def test_gradients_come_through_after_an_evaluation(kind: Any, settings: dict[str, Any]) -> None:
    def layer() -> Any:
        torch.manual_seed(3)
        return quantize(nn.Linear(64, 32), kind, backprop=True, **settings)

    x = torch.randn(2, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer()(x).sum(), x)
    evaluated = layer().eval()
    evaluated(x.detach())
    (gradient,) = torch.autograd.grad(evaluated.train()(x).sum(), x)
    assert torch.equal(gradient, expected)
    weight = evaluated(torch.eye(64)).detach() - evaluated.bias  # one row an input
    torch.testing.assert_close(gradient, weight.sum(1).expand(2, 64), rtol=0.02, atol=0.02)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_why_backprop_has_to_be_said() -> None:
    layer: Any = quantize(nn.Linear(64, 32, bias=False))
    x = torch.randn(2, 64, requires_grad=True)
    layer.eval()(x.detach())
    layer.train()(x).sum().backward()
    assert x.grad is None  # else the argument can go


@pytest.mark.parametrize("outputs", [3, 32, 40])
def test_evaluates_any_number_of_outputs(outputs: int) -> None:
    layer = quantize(nn.Linear(64, outputs))
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_lightning_s_precision_plugin(mode: Any) -> None:
    """Lightning allows it on CUDA only, which this goes around: the layers are quantised when the strategy moves them."""
    from lightning.pytorch.plugins.precision.bitsandbytes import BitsandbytesPrecision

    torch.manual_seed(3)
    task = Task(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)))
    trainer = quiet_trainer(ZOStrategy(QZO))
    trainer.strategy.precision_plugin = BitsandbytesPrecision(mode, dtype=torch.bfloat16)  # type: ignore[assignment]
    trainer.fit(task, loader([(x.bfloat16(), y) for x, y in batches(3, inputs=64)]))
    assert [n for n, p in task.named_parameters() if n.endswith("scales")] == ["net.0.scales", "net.2.scales"]
    assert trainer.strategy.last_record.projected_grad > 0  # type: ignore[attr-defined]
    copy = {name: value.clone() for name, value in task.state_dict().items()}
    expected = weights(task)
    task.get_parameter("net.0.scales").data.mul_(2)
    task.load_state_dict(copy)
    assert_same(weights(task), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "nf3"}, r"kind='nf3'\)` is unknown; allowed: 'nf4', 'fp4', 'int8'"),
        ({"kind": "int8", "double": True}, "'int8' has neither"),
        ({"kind": "int8", "compute_dtype": torch.bfloat16}, "'int8' has neither"),
        ({"skip": ("0", "l")}, r"quantize\(skip=...\)` has 'l', which is no submodule's name"),
        ({"skip": ("0", "1")}, r"found no linear layer with a weight of its own outside skip=\('0', '1'\)"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)), **settings)


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match="'0' is on meta; load or move the module first"):
        quantize(nn.Sequential(nn.Linear(64, 64, device="meta")))
    ragged = nn.Sequential(nn.Linear(96, 64))
    with pytest.raises(ValueError, match=r"'0' has 96 inputs, no multiple of 64.*or use 'int8'"):
        quantize(ragged)
    assert type(ragged[0]) is nn.Linear
    quantize(ragged, "int8")
    with pytest.raises(ValueError, match="found no linear layer"):
        quantize(ragged, "int8")
    with pytest.raises(ValueError, match=r"outside skip=\('body',\)"):
        quantize(nn.ModuleDict({"body": nn.Linear(64, 64)}), skip="body")
    layer = bnb.nn.Linear4bit(96, 64).to("cpu")
    with pytest.raises(ValueError, match="96 inputs, no multiple of 64"):
        expose_scales(nn.Sequential(layer))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_encoder_layers_evaluate(kind: Any) -> None:
    torch.manual_seed(3)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True), 2)
    quantize(module, kind)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(module.eval()(x), module.train()(x), rtol=0.02, atol=0.02)


def test_adapters_are_there_already() -> None:
    """Their own linear layers would become codes, which do not train."""
    model = lora(tiny_causal_lm("llama", 64))
    with pytest.raises(ValueError, match=r"adapters are on the module already \('model.*lora_A.*call `quantize` first"):
        quantize(model, "int8")
    assert not any(isinstance(layer, bnb.nn.Linear8bitLt) for layer in model.modules())


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"quantising needs the package bitsandbytes.*`pip install \"zolightning\"`"):
        quantize(nn.Sequential(nn.Linear(64, 64)))
