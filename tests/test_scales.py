"""Scales of quantised layers: trained as the textbook says, linked whatever happens to the module, codes untouched."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PLAIN,
    Task,
    assert_same,
    batches,
    fit,
    lm_loss,
    loader,
    mlp,
    mse,
    quiet_trainer,
    tiny_causal_lm,
    token_batches,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from zolightning import LedgerCheckpointIO, ZOConfig, ZOStrategy
from zolightning.adapt.interventions import intervene
from zolightning.adapt.peft import ia3, prefix, prompt
from zolightning.adapt.quantize import quantize
from zolightning.engine.updates import apply_update
from zolightning.ledger import base_path, fingerprint, load_base, read, replay
from zolightning.noise import Distribution, Gaussian, Rademacher, sample
from zolightning.space import ScaleLeaf, build_view, expose_scales
from zolightning.space.scales import FLOOR
from zolightning.types import Key, Term

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50'")

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "nf4, double": {"kind": "nf4", "double": True},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
CONFIG = ZOConfig(estimator="spsa", eps=1e-3, select="scales", structure="dense", scales="absolute", normalize=False, seed=7)


def net(kind: str = "nf4", **settings: Any) -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Linear(64, 3))
    return quantize(plain, **KINDS[kind], **settings)  # type: ignore[return-value]


def data(count: int = 8) -> list[Any]:
    return batches(count, inputs=64)


def codes(module: nn.Module) -> str:
    """A hash of everything that is not a float."""
    digest = hashlib.sha256()
    for value in module.parameters():
        if not value.is_floating_point():
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def scales(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights(module).items() if name.endswith("scales")}


def dequantized(layer: Any, scale: Tensor) -> Tensor:
    """The layer's weight in dense tensors: codes times scales."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.float() * scale / 127
    state = layer.weight.quant_state
    packed = layer.weight.flatten()
    indices = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()
    return (state.code[indices].view(-1, state.blocksize) * scale.view(-1, 1)).view(state.shape)


def dense_loss(module: nn.Module, batch: Any, values: dict[str, Tensor]) -> float:
    """The module's loss with its quantised layers computed from dense weights of the given scales."""
    x, y = batch
    for name, layer in module.named_children():
        scale = values.get(f"{name}.scales")
        x = layer(x) if scale is None else F.linear(x, dequantized(layer, scale), layer.bias)  # type: ignore[arg-type]
    return F.mse_loss(x.double(), y.double()).item()


@torch.no_grad()
def textbook(
    module: nn.Module, items: list[Any], dist: Distribution, relative: bool, eps: float, lr: float, clip: float
) -> dict[str, Tensor]:
    """QZO in dense tensors: Δ ← max(Δ − lr·clip(g)·z, floor), or with Δ·z in the place of z."""
    module = copy.deepcopy(module)
    index = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    values = scales(module)
    for step, batch in enumerate(items):
        start = torch.zeros(1, dtype=torch.int64)
        z = {n: sample(dist, Key(7, step), index[n], start, v.numel())[0].view(v.shape) for n, v in values.items()}
        z = {n: z[n] * v if relative else z[n] for n, v in values.items()}
        plus, minus = (dense_loss(module, batch, {n: v + o * z[n] for n, v in values.items()}) for o in (eps, -eps))
        g = min(max((plus - minus) / (2 * eps), -clip), clip)
        values = {n: (v - lr * g * z[n]).clamp(min=FLOOR) for n, v in values.items()}
    return values


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
@pytest.mark.parametrize("form", ["absolute", "relative"])
@every_kind
def test_training_follows_the_textbook(kind: str, form: str, noise: Distribution) -> None:
    """Eight steps, some of them clipped. The last bits of the two forwards may differ."""
    module = net(kind)
    expose_scales(module)
    before = scales(module)
    settings = {"eps": 1e-2, "lr": 1e-2, "clip": 0.1 if form == "relative" else 1.0}
    expected = textbook(module, data(), noise, form == "relative", **settings)
    clipped = 0

    def count(*_: Any) -> None:
        nonlocal clipped
        clipped += strategy.last_record.clipped  # type: ignore[union-attr]

    strategy = ZOStrategy(CONFIG, scales=form, noise=noise, **settings)  # type: ignore[arg-type]
    task = Task(module)
    task.on_train_batch_end = count  # type: ignore[assignment]
    fit(task, data(), strategy)
    assert 0 < clipped < 8
    for name, value in expected.items():
        way = (value - before[name]).norm()
        assert (scales(module)[name] - value).norm() < 1e-3 * way, name


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=2e-2), lambda p: AdamW(p, lr=1e-2)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("form", ["absolute", "relative"])
@every_kind
def test_learns_and_leaves_the_codes(kind: str, form: Any, optimizer: Any) -> None:
    task = Task(net(kind), optimizer=optimizer)
    before, losses = codes(task), []
    strategy = ZOStrategy(CONFIG, scales=form, eps=1e-2, num_queries=2, normalize=True)
    task.on_train_batch_end = lambda *_: losses.append(strategy.last_record.loss)  # type: ignore[assignment, union-attr]
    fit(task, data(1) * 40, strategy)
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]
    assert codes(task) == before
    assert all((value >= FLOOR).all() for value in scales(task).values())
    assert all(value.dtype == torch.float32 for value in scales(task).values())


@pytest.mark.parametrize("form", ["absolute", "relative"])
@every_kind
def test_nothing_moves_at_lr_0(kind: str, form: Any) -> None:
    module = net(kind)
    module[4].weight.data[:] = 0  # codes of zeros
    expose_scales(module)
    before = weights(module)
    fit(Task(module, optimizer=lambda p: SGD(p, lr=0.0)), data(20), ZOStrategy(CONFIG, scales=form, eps=0.5))
    assert_same(weights(module), before)


@pytest.mark.parametrize("failing", [1, 2, 3])
@every_kind
def test_an_exception_inside_a_probe_leaves_everything(kind: str, failing: int) -> None:
    """Raised between layers and inside one; the library reads the stored scales again."""
    module, calls = net(kind), 0
    expose_scales(module)
    before, x = weights(module), data(1)[0][0]
    expected = module(x)

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("stop")

    hook = module[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        fit(Task(module, optimizer=lambda p: SGD(p, lr=0.0)), data(3), CONFIG)
    hook.remove()
    view = build_view(module, module.parameters(), Rademacher(), select_spec="scales", scales="absolute")
    with pytest.raises(RuntimeError, match="shape"), view.along(Key(0, 0), 0.1):
        module(x[:, :5])
    assert_same(weights(module), before)
    assert torch.equal(module(x), expected)


@every_kind
def test_a_probe_reads_perturbed_scales_and_writes_nothing(kind: str) -> None:
    module, x = net(kind), data(1)[0][0]
    expose_scales(module)
    before, expected = weights(module), module(x)
    twin = copy.deepcopy(module)
    view = build_view(module, module.parameters(), Gaussian(), select_spec="scales", scales="absolute")
    for leaf in view.leaves:
        twin.get_parameter(leaf.name).data.copy_(leaf.perturbed([Term(Key(1, 2), 0.05)]))
    with view.along(Key(1, 2), 0.05):
        probed = module(x)
    assert torch.equal(probed, twin(x))
    assert not torch.equal(probed, expected)
    assert_same(weights(module), before)
    assert torch.equal(module(x), expected)


def test_scales_stay_positive_and_are_counted() -> None:
    module = net()
    expose_scales(module)
    view = build_view(module, module.parameters(), Rademacher(), select_spec="scales", scales="absolute")
    optimizer = SGD(module.parameters(), lr=1.0)
    terms = [Term(Key(0, 0), 1.0)]
    down = sum(int((leaf.noise(terms, 0, leaf.parameter.numel()) > 0).sum()) for leaf in view.leaves)
    stats = apply_update(optimizer, view.leaves, terms, Key(0, 0))  # every scale is below 1, so half of them end at the floor
    assert (stats.negative, stats.saturated) == (down, down)
    assert stats.rms is None
    values = torch.cat([value.flatten() for value in scales(module).values()])
    assert int((values == FLOOR).sum()) == down
    assert int((values > 1).sum()) == len(values) - down
    stats = apply_update(optimizer, view.leaves, [], Key(0, 1), measure=True)
    assert (stats.negative, stats.saturated, stats.rms) == (0, down, 0.0)
    plain = mlp()
    assert apply_update(
        SGD(plain.parameters()), build_view(plain, plain.parameters(), Rademacher()).leaves, terms, Key(0, 0)
    ) == (
        None,
        None,
        None,
        None,
    )


def test_monitor_logs_the_counts(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from zolightning import ZOMonitor, mlflow_logger

    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = mlflow_logger("run", store=store)
    strategy = ZOStrategy(CONFIG, normalize=True, lr=0.2, clip=0.5)
    fit(Task(net()), data(4), strategy, logger=logger, callbacks=[ZOMonitor(min_seconds=0)])
    metrics = MlflowClient(store).get_run(logger.run_id).data.metrics  # type: ignore[arg-type]
    assert metrics["zo/saturated_scales"] >= metrics["zo/negative_scales"] > 0
    assert metrics["zo/clip_rate"] in (0.0, 1.0)


def test_relative_noise_is_in_units_of_the_scale() -> None:
    module = net()
    names = expose_scales(module)
    view = build_view(module, module.parameters(), Rademacher(), select_spec="scales", scales="relative")
    for leaf in view.leaves:
        ratio = leaf.perturbed([Term(Key(0, 0), 1e-2)]) / leaf.parameter.detach()
        torch.testing.assert_close((ratio - 1).abs(), torch.full_like(ratio, 1e-2), rtol=1e-3, atol=0)
    assert [leaf.name for leaf in view.leaves] == names == ["0.scales", "3.scales", "4.scales"]


@every_kind
def test_exposing_changes_no_output_and_may_be_repeated(kind: str) -> None:
    module, x = net(kind), data(1)[0][0]
    expected, before = module(x), codes(module)
    names = expose_scales(module)
    assert expose_scales(module) == names == ["0.scales", "3.scales", "4.scales"]
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)
    assert codes(module) == before
    assert isinstance(module[0], (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half().float(),
        lambda m: m.bfloat16().float(),
        lambda m: m.double().float(),
        lambda m: m.to("cpu", torch.float16).float(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m).to("cpu"),
        lambda m: m.eval().train(),
        lambda m: m.requires_grad_(False).cpu(),
    ],
    ids=["half", "bfloat16", "double", "to", "deepcopy", "pickle", "deepcopy and move", "eval", "cpu"],
)
@every_kind
def test_conversions_keep_the_scales_and_the_link(kind: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    module = net(kind)
    expose_scales(module)
    before, x = scales(module), data(1)[0][0]
    converted = convert(module)
    assert_same(scales(converted), before)
    first = converted(x)
    converted.get_parameter("0.scales").data.mul_(3)
    assert not torch.equal(converted(x), first)
    if converted is not module:
        assert_same(scales(module), before)
    layer: Any = converted.get_submodule("0")
    seen = layer.state.SCB if isinstance(layer, bnb.nn.Linear8bitLt) else layer.weight.quant_state.absmax
    assert seen.data_ptr() == layer.scales.data_ptr()


@every_kind
def test_evaluation_does_not_repack(kind: str) -> None:
    """On CPUs with AVX512-BF16 a forward of a plain 4-bit layer in eval mode replaces its codes and rounds its scales."""
    module, x = net(kind), data(1)[0][0]
    expose_scales(module)
    before, expected = weights(module), module(x)
    module.eval()
    module(x)
    assert_same(weights(module), before)
    assert torch.equal(module.train()(x), expected)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_that_was_repacked_is_unpacked(double: bool) -> None:
    module = quantize(nn.Sequential(nn.Linear(128, 64)), double=double)
    x = torch.randn(4, 128)
    expected, before = module(x), codes(module)
    module.eval()
    module(x)
    assert codes(module) != before
    module.train()
    expose_scales(module)
    assert codes(module) == before
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-2)  # the scales went through bfloat16


@every_kind
def test_state_dict_is_the_library_s_and_loads_strictly(kind: str) -> None:
    plain, module = net(kind), net(kind)
    expose_scales(module)
    expected = set(plain.state_dict())
    if kind == "nf4, double":
        expected = {key for key in expected if "nested" not in key}
    assert set(module.state_dict()) == expected
    for value in module.parameters():
        if value.is_floating_point():
            value.data.mul_(1.5)
    other = net(kind)
    expose_scales(other)
    other.load_state_dict(module.state_dict())
    assert_same(weights(other), weights(module))
    assert torch.equal(other(data(1)[0][0]), module(data(1)[0][0]))
    other.load_state_dict(plain.state_dict())  # also with the scales quantised
    torch.testing.assert_close(other(data(1)[0][0]), plain(data(1)[0][0]), rtol=1e-6, atol=1e-6)


def test_state_dict_of_another_quantisation() -> None:
    module, wrong = net("nf4"), net("fp4")
    expose_scales(module)
    with pytest.raises(RuntimeError, match=r"0 \(bitsandbytes 4-bit\): the checkpoint has quant_type fp4, the module nf4"):
        module.load_state_dict(wrong.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.scales"):
        module.load_state_dict({k: v for k, v in net().state_dict().items() if "absmax" not in k and "quant" not in k})
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({**net().state_dict(), "0.weight": torch.zeros(32, 64)})


class Validated(Task):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse(self.net, batch))


@every_kind
def test_a_run_with_validation_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def strategy() -> ZOStrategy:
        return ZOStrategy(CONFIG, eps=1e-2)

    whole, resumed = Validated(net(kind)), Validated(net(kind))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = quiet_trainer(strategy(), max_epochs=2, enable_checkpointing=True, callbacks=[saver], val_check_interval=2)
    trainer.fit(whole, loader(data(4)), loader(data(2)))
    quiet_trainer(strategy(), max_epochs=2).fit(resumed, loader(data(4)), loader(data(2)), ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(weights(resumed), weights(whole))
    fresh = Validated(net(kind))
    found = quiet_trainer(strategy()).validate(fresh, loader(data(2)), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    assert found[0]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
def test_precision_plugins(precision: str) -> None:
    """The scales stay float32; the first layer computes in bfloat16 whatever comes in."""
    task, dtype = Task(net(compute_dtype=torch.bfloat16)), torch.float16 if precision == "16-true" else torch.bfloat16
    items = data(3) if precision == "bf16-mixed" else [(x.to(dtype), y) for x, y in data(3)]
    expose_scales(task)
    before = scales(task)
    fit(task, items, CONFIG, precision=precision)
    assert all(not torch.equal(value, before[name]) for name, value in scales(task).items())
    assert all(value.dtype == torch.float32 for value in scales(task).values())


def test_unquantised_leaves_beside_the_scales() -> None:
    task = Task(net(compute_dtype=torch.bfloat16))
    before = weights(task)
    trainer = fit(task, data(3), ZOStrategy(CONFIG, select="all"))
    view = trainer.strategy.view(trainer.optimizers[0])  # type: ignore[attr-defined]
    assert [isinstance(leaf, ScaleLeaf) for leaf in view.leaves] == [leaf.name.endswith("scales") for leaf in view.leaves]
    changed = {name for name, value in weights(task).items() if name in before and not torch.equal(value, before[name])}
    assert changed == {"net.0.bias", "net.1.weight", "net.1.bias", "net.4.bias"}
    (search,) = trainer.strategy.session._subspaces.values()  # type: ignore[attr-defined]
    assert "4 dense leaves and 3 absolute scale leaves" in search.describe(trainer.strategy.estimator, 1)  # type: ignore[attr-defined]


def test_scales_of_some_blocks() -> None:
    model = quantize(tiny_causal_lm("llama", 64))
    names = expose_scales(model)
    chosen = {}
    for spec in ("scales", "scales:last:1", "scales:re:mlp", "last:1"):
        view = build_view(model, model.parameters(), Rademacher(), select_spec=spec, scales="relative")
        chosen[spec] = [leaf.name for leaf in view.leaves]
    assert chosen["scales"] == names
    assert chosen["scales:last:1"] == [name for name in names if "layers.1." in name]
    assert chosen["scales:re:mlp"] == [name for name in names if "mlp" in name]
    assert set(chosen["last:1"]) > set(chosen["scales:last:1"])
    with pytest.raises(ValueError, match=r"`select='last:9'` is out of range"):
        build_view(model, model.parameters(), Rademacher(), select_spec="scales:last:9", scales="relative")


def test_other_recipes_leave_the_scales() -> None:
    task = Task(net())
    expose_scales(task)
    before = scales(task)
    fit(task, data(2), PLAIN)
    assert_same(scales(task), before)


@pytest.mark.parametrize("training", [True, False])
def test_8_bit_with_a_threshold(training: bool) -> None:
    """Columns of the input with outliers are multiplied in 16 bits (in eval mode on CPU), from the trained scales too."""
    module: Any = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0), nn.Linear(64, 3))
    module = module.to("cpu").train(training)
    expose_scales(module)
    x, y = torch.randn(8, 64), torch.randn(8, 3)
    x[:, 5] *= 30
    bias = module[0].bias
    product = module[0](x) - bias
    dense = x @ dequantized(module[0], module[0].scales.detach()).T
    assert (product - dense).norm() < 0.02 * dense.norm()  # without the threshold it would be the outlier's error
    module[0].scales.data.mul_(2)
    torch.testing.assert_close(module[0](x) - bias, 2 * product, rtol=1e-3, atol=1e-2)
    before, losses = codes(module), []
    strategy = ZOStrategy(CONFIG, scales="relative", eps=2e-2, num_queries=4, normalize=True)
    task = Task(module, optimizer=lambda p: SGD(p, lr=2e-2))
    task.on_train_batch_end = lambda *_: losses.append(strategy.last_record.loss)  # type: ignore[assignment, union-attr]
    fit(task, [(x, y)] * 30, strategy)
    assert task.net.training == training
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]
    assert codes(module) == before


# ---- bad input -----------------------------------------------------------------------------------------------------------


def test_no_quantised_layer() -> None:
    with pytest.raises(ValueError, match=r"no quantised layer.*zolightning\.quantize"):
        fit(Task(mlp()), batches(1), CONFIG)


def test_scales_selected_but_frozen() -> None:
    with pytest.raises(ValueError, match=r"`select='scales'` needs `scales='relative'`"):
        ZOConfig(select="scales")
    with pytest.raises(ValueError, match=r"`scales='relativ'` is unknown.*did you mean 'relative'"):
        ZOConfig(scales="relativ")  # type: ignore[arg-type]


class Packed(nn.Module):
    """A quantised layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Packed, "test_scales.Packed"),
        (lambda: bnb.nn.Embedding8bit(4, 4).to("cpu"), "Embedding8bit"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4), r"quantized\.dynamic"),
        (lambda: nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)]), "ParameterList"),
    ],
    ids=["buffer", "embedding", "torch.ao", "parameter"],
)
def test_unknown_kinds_are_refused_by_name(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=rf"quantised layers are of a kind that is not known: 'b' is a .*{name}"):
        expose_scales(nn.ModuleDict({"a": net(), "b": make()}))


def test_mixed_kinds() -> None:
    both = nn.Sequential(quantize(nn.Linear(64, 64)), quantize(nn.Linear(64, 3), "int8"))
    with pytest.raises(ValueError, match=r"different units: bitsandbytes 4-bit, bitsandbytes 8-bit; use scales='relative'"):
        fit(Task(both), data(1), CONFIG)
    fit(Task(both), data(1), ZOStrategy(CONFIG, scales="relative"))
    fit(Task(both), data(1), ZOStrategy(CONFIG, select=r"re:0\.scales"))


def test_layers_that_are_not_ready() -> None:
    with pytest.raises(ValueError, match=r"'0' \(bitsandbytes 4-bit\) cannot be trained: it is not quantised yet"):
        expose_scales(nn.Sequential(bnb.nn.Linear4bit(64, 4)))
    with pytest.raises(ValueError, match=r"8-bit\) cannot be trained: it is not quantised yet"):
        expose_scales(nn.Sequential(bnb.nn.Linear8bitLt(64, 4, has_fp16_weights=False)))
    with pytest.raises(ValueError, match="meta device, without values"):
        expose_scales(nn.Sequential(bnb.nn.Linear4bit(64, 4, device="meta")))


def test_8_bit_settings() -> None:
    with pytest.raises(ValueError, match="has_fp16_weights=True"):
        expose_scales(nn.Sequential(bnb.nn.Linear8bitLt(64, 4)))


def test_damaged_scales_and_replaced_forward() -> None:
    module: Any = net()
    module[3].weight.quant_state.absmax[0] = -1.0
    with pytest.raises(ValueError, match=r"'3'.*negative or not finite"):
        expose_scales(module)
    module = net()
    module[0].forward = module[0].forward
    with pytest.raises(ValueError, match="its forward was replaced, as offloading by accelerate does"):
        expose_scales(module)


def test_wrong_device() -> None:
    module: Any = net()
    module[0].weight.quant_state.absmax = module[0].weight.quant_state.absmax.to("meta")
    with pytest.raises(ValueError, match=r"'0'.*they are on meta, its codes on cpu"):
        expose_scales(module)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["scales", "dense"])
def test_gradients_on_codes(config: ZOConfig) -> None:
    """With codes stored as bfloat16, as for FSDP, PyTorch would allow it."""
    module = nn.Sequential(bnb.nn.Linear4bit(64, 3, quant_storage=torch.bfloat16)).to("cpu")
    module[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'net\.0\.weight' holds the codes of a quantised layer \(Linear4bit\w*\)"):
        fit(Task(module), data(1), config)


def test_nothing_to_train() -> None:
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*ZOStrategy\('qzo'\)"):
        fit(Task(frozen), data(1), PLAIN)
    for name in expose_scales(frozen):
        frozen.get_parameter(name).requires_grad_(False)
    frozen.get_parameter("1.weight").requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"`select='scales'` names no trainable parameter: the scales have requires_grad=False"
    ):
        fit(Task(frozen), data(1), CONFIG)


@pytest.mark.parametrize("first", ["adapters", "scales"])
def test_lora_on_top(first: str) -> None:
    """Adapters train like any weights; scales and adapters together only when both are asked for."""
    from peft import LoraConfig, inject_adapter_in_model

    module: Any = nn.Sequential(net(), nn.Identity())
    if first == "scales":
        expose_scales(module)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0.0"], init_lora_weights="gaussian"), module)
    task, before = Task(module, optimizer=lambda p: SGD(p, lr=1.0)), codes(module)
    with pytest.raises(ValueError, match=r"would leave the adapters untrained .*lora_A.*select='all'"):
        fit(task, data(1), CONFIG)
    trainer = fit(task, data(2), ZOStrategy(PLAIN, select="re:lora_"))
    assert len(trainer.strategy.view(trainer.optimizers[0]).leaves) == 2  # type: ignore[attr-defined]
    for name in expose_scales(module):
        module.get_parameter(name).requires_grad_(True)  # PEFT freezes everything else
    start = weights(task)
    fit(task, data(2), ZOStrategy(CONFIG, select="re:lora_|scales"))
    moved = {name for name, value in weights(task).items() if not torch.equal(value, start[name])}
    assert len([name for name in moved if "lora_" in name]) == 2
    assert len([name for name in moved if name.endswith("scales")]) == 3
    assert codes(module) == before


def reft(model: nn.Module) -> None:
    intervene(model, 1, {"input_ids": token_batches(1)[0]})


def prompt_by_peft(model: nn.Module) -> nn.Module:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("adapt", "name"),
    [(ia3, "ia3_l"), (prefix, "virtual_tokens"), (prompt, "virtual_tokens"), (reft, "vectors"), (prompt_by_peft, "embedding")],
)
def test_adapters_of_other_kinds(adapt: Callable[[nn.Module], nn.Module | None], name: str) -> None:
    model = quantize(tiny_causal_lm("llama", 64))
    model = adapt(model) or model
    task = Task(model, lm_loss)
    with pytest.raises(ValueError, match=rf"would leave the adapters untrained that are on the model \('net\..*{name}"):
        fit(task, token_batches(1), ZOStrategy("qzo"))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    for scales in expose_scales(model):
        model.get_parameter(scales).requires_grad_(True)
    view = build_view(task, task.parameters(), Rademacher(), select_spec="scales", scales="relative")
    assert len(view.leaves) == 14


@pytest.mark.parametrize("noise", ["absolute", "relative"])
@every_kind
def test_a_ledger_gives_the_scales_of_any_step_and_rests_checkpoints(kind: str, noise: Any, tmp_path: Path) -> None:
    def train(folder: Path, *, checkpoint: Path | None = None) -> Task:
        strategy = ZOStrategy(CONFIG, scales=noise, ledger=folder / "ledger.zo")
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        settings: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [saver], "plugins": [LedgerCheckpointIO()]}
        task = Task(net(kind))
        quiet_trainer(strategy, max_epochs=2, **settings).fit(task, loader(data(4)), ckpt_path=checkpoint)
        return task

    whole = train(tmp_path / "a")
    ledger = read(tmp_path / "a" / "ledger.zo")
    rebuilt = load_base(base_path(ledger.path.parent, ledger.header.base))
    assert replay(ledger, rebuilt).step == 8
    assert fingerprint(rebuilt.items()) == fingerprint(whole.named_parameters())
    resumed = train(tmp_path / "b", checkpoint=tmp_path / "a" / "step=4.ckpt")
    assert fingerprint(resumed.named_parameters()) == fingerprint(whole.named_parameters())
