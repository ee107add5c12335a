"""ZeroQAT's rounding against plain loops, training through it, and the exported layers bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import PLAIN, Task, assert_same, batches, fit, lm_loss, mlp, mse, tiny_causal_lm, token_batches, weights
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zolightning import ZOStrategy
from zolightning.adapt.fakequant import (
    FakeQuantLinear,
    QuantizedLinear,
    dequantize,
    export_quantized,
    fake_quantize,
    pack,
    quantize_to_grid,
    unpack,
)
from zolightning.adapt.peft import lora
from zolightning.methods.recipes import ZEROQAT
from zolightning.noise import Rademacher
from zolightning.records.memory import tensor_bytes
from zolightning.space import Rank1, expose_scales

ONE = torch.ones(1)
numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


def rounded(values: list[float], bits: int, lower: float = 1.0, upper: float = 1.0) -> list[float]:
    """One group by the textbook, in doubles."""
    low, high = min(min(values) * lower, 0.0), max(max(values) * upper, 0.0)
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        return [0.0] * len(values)
    zero = round(-low / scale)
    return [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in values]


@given(numbers, st.integers(2, 8), st.floats(0.3, 1.2), st.floats(0.3, 1.2))
def test_grid(values: list[float], bits: int, lower: float, upper: float) -> None:
    """Half-way cases may round either way, so compare the distance to the value and not the points."""
    x = torch.tensor(values, dtype=torch.float32)
    grid = quantize_to_grid(x, bits, ONE * lower, ONE * upper)
    assert ((grid.codes >= 0) & (grid.codes < 2**bits) & (grid.codes == grid.codes.round())).all()
    step = grid.scales.item()
    for value, ours, textbook in zip(values, grid.values().tolist(), rounded(values, bits, lower, upper), strict=True):
        assert abs(abs(value - ours) - abs(value - textbook)) < 1e-3 * step + 1e-5
    if lower >= 1 and upper >= 1:  # nothing is clipped, but by the rounding of the zero
        assert ((grid.values() - x).abs() <= step * 1.001).all()


def test_zero_stays_zero_and_points_stay_where_they_are() -> None:
    x = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, -0.3, 0.15, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 6.0, 7.0]])
    grid = quantize_to_grid(x, 2, ONE, ONE)
    torch.testing.assert_close(grid.values()[[0, 2]], x[[0, 2]])
    assert (grid.values()[:, 0] == 0).all()


@given(st.integers(2, 8), st.integers(1, 30), st.integers(0, 1000))
def test_packing(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits)[:count], codes)
    assert len(packed) == -(-count // {2: 4, 3: 2, 4: 2}.get(bits, 1))


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3, bias=False))
    return fake_quantize(plain, **{"group_size": 4, **options})  # type: ignore[return-value]


def shaken(module: nn.Module) -> nn.Module:
    """With clipping and smoothing as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.named_parameters():
        if name.rsplit(".", 1)[-1] in ("lower", "upper", "smooth"):
            value.data.mul_(1 - 0.4 * torch.rand(value.shape, generator=generator))
    return module


X = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = [{"bits": 2}, {"bits": 3, "group_size": None}, {"bits": 4, "input_bits": 8}, {"bits": 8, "input_bits": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_layer_by_the_textbook(options: dict[str, Any]) -> None:
    """Group by group and token by token, in Python floats."""
    layer: Any = shaken(net(**options))[0]  # type: ignore[index]
    quantizer = layer.quantizer
    smooth, size = quantizer.smooth.tolist(), options.get("group_size", 4) or 8
    weight = []
    for row, lower, upper in zip(layer.weight.tolist(), quantizer.lower, quantizer.upper, strict=True):
        groups = [[w * s for w, s in zip(row, smooth, strict=True)][i : i + size] for i in range(0, 8, size)]
        factors = zip(groups, lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
        weight.append([v for group, low, high in factors for v in rounded(group, options["bits"], low, high)])
    x = X.view(-1, 8) / quantizer.smooth
    if "input_bits" in options:
        clip = layer.input_quantizer.lower.item(), layer.input_quantizer.upper.item()
        x = torch.tensor([rounded(token, options["input_bits"], *clip) for token in x.tolist()])
    expected = x.double() @ torch.tensor(weight).double().T + layer.bias
    torch.testing.assert_close(layer(X).view(-1, 16).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_follows_the_textbook(options: dict[str, Any]) -> None:
    """The ordinary strategy: weights, clipping and smoothing, as on any module."""
    ours, twin = net(**options), net(**options)
    items = batches(6, inputs=8)
    fit(Task(ours, optimizer=lambda p: SGD(p, lr=1e-2)), items, ZOStrategy(PLAIN, eps=1e-2))
    reference.train(twin, items, mse, SGD(twin.parameters(), lr=1e-2), Rademacher(), seed=7, eps=1e-2)
    assert_same(weights(ours), weights(twin), 1e-6)
    moved = {n for n, v in weights(ours).items() if not torch.equal(v, dict(net(**options).named_parameters())[n])}
    assert {
        "0.weight",
        "0.quantizer.upper",
        "0.quantizer.smooth",
    } <= moved
    assert ("0.input_quantizer.lower" in moved) == ("input_bits" in options)


def test_recipe_learns_at_3_bits() -> None:
    torch.manual_seed(5)
    teacher, student = mlp(8, 16), mlp(8, 16)
    items = [(x, teacher(x).detach()) for x, _ in batches(1, size=64, inputs=8)]
    losses: list[float] = []
    task = Task(fake_quantize(student, 3, group_size=4), optimizer=lambda p: SGD(p, lr=5e-3))
    student[2].weight.data.add_(torch.randn(3, 16) * 0.3)
    strategy = ZOStrategy("zeroqat", num_queries=4, seed=0)
    task.on_train_batch_end = lambda *_: losses.append(strategy.last_record.loss)  # type: ignore[assignment, union-attr]
    fit(task, items * 60, strategy)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export_gives_the_same_bits(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    fake = shaken(net(**options).to(dtype))
    real = export_quantized(copy.deepcopy(fake))
    x = X.to(dtype)
    assert torch.equal(real(x), fake(x))
    assert [type(layer) is QuantizedLinear for layer in real] == [True, False, False, True]  # type: ignore[attr-defined]
    assert all(not p.requires_grad for layer in (real[0], real[3]) for p in layer.parameters())  # type: ignore[index]
    torch.save(real.state_dict(), tmp_path / "x.pt")
    read = export_quantized(net(**options).to(dtype))
    read.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert torch.equal(read(x), fake(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("export", [False, True])
def test_conversions_leave_scales_and_factors(export: bool, dtype: torch.dtype) -> None:
    module = shaken(net(bits=3, input_bits=8))
    if export:
        export_quantized(module)
    before, x = copy.deepcopy(module), X.to(dtype)
    converted = copy.deepcopy(module).to(dtype)
    assert converted(x).dtype == dtype
    torch.testing.assert_close(converted(x).float(), before(X), rtol=0.1, atol=0.2)
    state, old = converted.state_dict(), before.state_dict()
    converted_too = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
    assert_same({n: v for n, v in state.items() if n not in converted_too}, {n: old[n] for n in old if n not in converted_too})
    assert state["0.bias"].dtype == state["1.weight"].dtype == dtype
    assert copy.deepcopy(converted)(x).dtype == dtype
    if export:
        hidden = torch.randn(2, 16)
        assert torch.equal(converted.float()[3](hidden), before[3](hidden))  # type: ignore[index]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", ["zeroqat", "qzo"])
def test_precision_plugins(recipe: str, precision: Any) -> None:
    """Of a module that was rounded in float32; the trained scales and factors stay float32."""
    model = fake_quantize(tiny_causal_lm("llama", 64), 4, train="last:1")
    if recipe == "qzo":
        export_quantized(model)
    task = Task(model, lm_loss, lambda p: SGD(p, lr=1e-2))
    fit(task, token_batches(2), ZOStrategy(recipe, seed=0), precision=precision)
    exact = {n: p for n, p in task.state_dict().items() if n.rsplit(".", 1)[-1] in ("lower", "smooth", "scales")}
    assert len(exact) > 14
    assert all(p.dtype == torch.float32 for p in exact.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["fake", "exported", "trained scales"])
@torch.no_grad()
def test_ordinary_layers_of_the_rounded_weights(how: str, dtype: torch.dtype) -> None:
    """The same bits until the smoothing is trained."""
    for change, rounding in ((lambda m: m, 0.0), (shaken, 1e-5 if dtype == torch.float32 else 2e-2)):
        module, x = change(net(bits=3)).to(dtype), X.to(dtype)
        if how != "fake":
            export_quantized(module)
        if how == "trained scales":
            for name in expose_scales(module):
                module.get_parameter(name).mul_(1.3)
        expected = module(x)
        plain = dequantize(module)
        assert [type(layer) for layer in plain] == [nn.Linear, nn.LayerNorm, nn.Tanh, nn.Linear]  # type: ignore[attr-defined]
        assert {value.dtype for value in plain.parameters()} == {dtype}
        assert (plain(x) - expected).norm() <= rounding * expected.norm()
        weight = plain[0].weight.float()  # type: ignore[index]
        assert all(len(group.unique()) <= 8 for group in weight.view(-1, 4)) or change is shaken


def test_save_pretrained_writes_ordinary_layers_or_refuses(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = fake_quantize(tiny_causal_lm("llama", 64), 4, train="last:1")
    ids = token_batches(1)[0]
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"cannot write fake-quantised layers.*dequantize\(model\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot write fake-quantised layers"):
        export_quantized(copy.deepcopy(model)).save_pretrained(tmp_path)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
    dequantize(model).save_pretrained(tmp_path)  # type: ignore[operator]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_weights_that_are_not_rounded_at_8_bits_are_near() -> None:
    plain = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    expected = plain(x)
    errors = [(fake_quantize(copy.deepcopy(plain), bits)(x) - expected).norm() / expected.norm() for bits in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert errors[-1] > 0.2


@pytest.mark.parametrize("rows", [1, 700, 1024])
@torch.no_grad()
def test_rounding_by_blocks_of_rows(rows: int) -> None:
    """The same bits as all at once, and float32 copies of a few rows at a time."""
    layer: Any = shaken(fake_quantize(nn.Sequential(nn.Linear(512, rows)).bfloat16(), 3))[0]  # type: ignore[index]
    expected = layer.quantizer.grid(layer.weight).values().flatten(1).bfloat16()
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float32)
            return out

    with Sizes():
        assert torch.equal(layer.quantizer(layer.weight), expected)
    assert max(sizes) <= 1 << 18


def test_light_variant() -> None:
    """Most of the model is codes from the start; the blocks that train are as in the full variant."""
    full, light = (fake_quantize(tiny_causal_lm("llama", 64), 4, train=train) for train in ("all", "last:1"))
    ids = token_batches(1)[0]
    assert torch.equal(full(ids).logits, light(ids).logits)
    kinds = {name: type(layer) is QuantizedLinear for name, layer in light.named_modules() if name.endswith("_proj")}
    assert all(is_real == name.startswith("model.layers.0.") for name, is_real in kinds.items())
    size = {m: tensor_bytes([*m.parameters(), *m.buffers()]) for m in (full, light)}
    block = sum(p.numel() for n, p in tiny_causal_lm("llama", 64).named_parameters() if "layers.0" in n and "proj" in n)
    assert size[light] < size[full] - 4 * block + 1.1 * block  # float32 → half a byte, its scales, and smoothing
    before = {name: value.clone() for name, value in light.named_buffers()}
    task = Task(light, lm_loss, lambda p: SGD(p, lr=1e-3))
    start = weights(task)
    fit(task, token_batches(3), ZOStrategy("zeroqat", structure=Rank1(vectors=False), seed=0))
    assert_same(dict(light.named_buffers()), before)
    moved = {name for name, value in weights(task).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "layers.1." in name and "proj.weight" in name}


def test_what_is_treated() -> None:
    model: Any = fake_quantize(tiny_causal_lm("llama", 64), skip=("lm_head", "mlp"))
    assert isinstance(model.model.layers[0].self_attn.q_proj, FakeQuantLinear)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"fake_quantize\(bits=...\)` must be a whole number from 2 to 8, got 1"),
        ({"bits": 9}, "got 9"),
        ({"bits": 3.5}, "got 3.5"),
        ({"bits": "4"}, "got '4'"),
        ({"input_bits": 16}, r"input_bits=...\)` must be a whole number from 2 to 8, got 16"),
        ({"group_size": 3}, r"group_size=3\)` must be a whole number that divides the 8 inputs of '0'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 4.0}, r"group_size=4\.0"),
        ({"skip": "1.0"}, r"fake_quantize\(skip=...\)` has '1\.0', which is no submodule's name"),
        ({"skip": ("0", "3")}, "found no linear layer"),
        ({"train": "middel"}, "is unknown; allowed"),
        ({"train": "re:nothing"}, "names no trainable parameter"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(**options)


@pytest.mark.parametrize("export", [False, True])
@torch.no_grad()
def test_encoder_layers_evaluate_the_rounded_weights(export: bool) -> None:
    """PyTorch's one kernel for the whole layer, in eval mode, takes the weights as they are."""
    torch.manual_seed(3)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True), 2)
    module, x, mask = fake_quantize(plain, 2), torch.randn(2, 5, 64), torch.arange(5).expand(2, 5) > torch.tensor([[2], [4]])
    if export:
        export_quantized(module)
    for options in ({}, {"src_key_padding_mask": mask}):
        expected = module.train()(x, **options)
        found = module.eval()(x, **options)
        torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)


def test_nothing_to_export() -> None:
    with pytest.raises(ValueError, match="no fake-quantised layer to export"):
        export_quantized(mlp())
    with pytest.raises(ValueError, match="found no linear layer inside the module"):
        fake_quantize(nn.Linear(4, 4))


def test_nothing_to_dequantise() -> None:
    with pytest.raises(ValueError, match="no layer to dequantise"):
        dequantize(mlp())
    module = net(input_bits=8)
    with pytest.raises(ValueError, match="'0' rounds its inputs to 8 bits"):
        dequantize(module)
    assert isinstance(module[0], FakeQuantLinear)


def test_modules_that_cannot_be_treated() -> None:
    with pytest.raises(ValueError, match="'0' is on the meta device, without values"):
        fake_quantize(nn.Sequential(nn.Linear(64, 4, device="meta")))
    with pytest.raises(ValueError, match=r"adapters are on the module already.*call `fake_quantize` first"):
        fake_quantize(lora(tiny_causal_lm("llama", 64)))


@pytest.mark.parametrize("recipe", ["zeroqat", ZEROQAT], ids=["name", "value"])
def test_the_recipe_wants_layers_that_round(recipe: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"has none; call zolightning\.adapt\.fakequant\.fake_quantize"):
        fit(Task(mlp()), batches(1), ZOStrategy(recipe, lr=1e-3))
