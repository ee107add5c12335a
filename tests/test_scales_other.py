"""Scales of torchao, HQQ, packed (GPTQ, AWQ, AQLM) and our own layers: the same promises as for bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Task, assert_same, batches, fit, weights
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import ZOConfig, ZOStrategy
from zolightning.adapt.fakequant import export_quantized, fake_quantize
from zolightning.noise import Gaussian, Rademacher
from zolightning.space import build_view, expose_scales
from zolightning.space.scales import FLOOR, ScaledLayer
from zolightning.types import Key

CONFIG = ZOConfig(
    estimator="spsa", eps=1e-2, select="scales", structure="dense", scales="relative", lr=2e-2, num_queries=2, seed=7
)


def plain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))


def torchao(name: str) -> nn.Module:
    pytest.importorskip("torchao", reason="pip install torchao")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    configs: dict[str, Any] = {
        "int8": Int8WeightOnlyConfig(),
        "int8 groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int8 activations": Int8DynamicActivationInt8WeightConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "float8": Float8WeightOnlyConfig(),
    }
    module = plain()
    quantize_(module, configs[name])
    return module


def hqq(bits: int) -> nn.Module:
    pytest.importorskip("hqq", reason="DISABLE_CUDA=1 pip install hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    module = plain()
    for i in (0, 2):
        config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        module[i] = HQQLinear(module[i], config, compute_dtype=torch.float32, device="cpu")
    return module


class _Kernel(torch.autograd.Function):
    """Compiled code that no function mode can see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        assert scales.dtype == torch.float16
        weight = codes[..., 0].numpy().T.astype("float32") * scales.numpy().astype("float32").reshape(-1, 1)
        return torch.from_numpy(x.numpy() @ weight.T)


class QuantizedLinear(nn.Module):
    """Has the interface of aqlm's layer of this name, which needs a package that CI does not install."""

    __module__ = "aqlm.inference"

    def __init__(self, linear: nn.Linear, buffer: bool) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 7
        codes = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.codes = nn.Parameter(codes[..., None], requires_grad=False)
        self.codebook_size = 256
        self.gemv_op: type | None = None
        if buffer:
            self.register_buffer("scales", scale.half())
        else:
            self.scales = nn.Parameter(scale.half(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gemv_op is None:  # as aqlm does on CPU, for good
            self.codes.data, self.gemv_op = self.codes.data.transpose(0, 1).contiguous(), _Kernel
        with torch.no_grad():
            return _Kernel.apply(x, self.codes, self.scales)  # type: ignore[no-any-return, no-untyped-call]


def packed(buffer: bool) -> nn.Module:
    module = plain()
    for i in (0, 2):
        module[i] = QuantizedLinear(module[i], buffer)  # type: ignore[arg-type]
    return module


MAKE: dict[str, Callable[[], nn.Module]] = {
    **{f"torchao {name}": lambda name=name: torchao(name) for name in  # type: ignore[misc]
       ("int8", "int8 groups", "int8 activations", "int4", "float8")},
    **{f"hqq {bits} bits": lambda bits=bits: hqq(bits) for bits in (2, 3, 4, 8)},  # type: ignore[misc]
    "packed, buffer": lambda: packed(True),
    "packed, parameter": lambda: packed(False),
    "our own, 3 bits": lambda: export_quantized(fake_quantize(plain(), 3, group_size=16)),
}  # fmt: skip
every = pytest.mark.parametrize("name", MAKE)
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@every
@torch.no_grad()
def test_exposing_changes_no_output(name: str) -> None:
    module, stock = MAKE[name](), MAKE[name]()
    expected = module(X)
    assert expose_scales(module) == ["0.scales", "2.scales"] == expose_scales(module)
    assert torch.equal(module(X), expected)
    assert {key for key in module.state_dict() if "numpy" not in key} == set(stock.state_dict())
    assert all(p.dtype == torch.float32 for n, p in module.named_parameters() if n.endswith("scales"))


@every
@torch.no_grad()
def test_a_probe_is_a_copy_with_other_scales(name: str) -> None:
    module = MAKE[name]()
    expose_scales(module)
    before, expected, twin = weights(module), module(X), copy.deepcopy(module)
    view = build_view(module, module.parameters(), Gaussian(), select_spec="scales", scales="relative")
    for leaf in view.leaves:
        twin.get_parameter(leaf.name).copy_(leaf.perturbed([(Key(1, 2), 0.2)]))  # type: ignore[list-item]
    with view.along(Key(1, 2), 0.2):
        probed = module(X)
    assert torch.equal(probed, twin(X))
    assert not torch.equal(probed, expected)
    with pytest.raises((RuntimeError, ValueError)), view.along(Key(1, 2), 0.2):
        module(X[:, :5])
    assert_same({n: p for n, p in weights(module).items() if n.endswith("scales")},
                {n: p for n, p in before.items() if n.endswith("scales")})  # fmt: skip
    assert torch.equal(module(X), expected)


def saved(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict; HQQ keeps its biases on the graph."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@every
def test_learns_and_state_dicts_hold_the_scales(name: str) -> None:
    module, losses = MAKE[name](), []
    task = Task(module, optimizer=lambda p: SGD(p, lr=1e-2))
    strategy = ZOStrategy(CONFIG)
    task.on_train_batch_end = lambda *_: losses.append(strategy.last_record.loss)  # type: ignore[assignment, union-attr]
    fit(task, batches(1, inputs=64, outputs=64) * 30, strategy)
    assert sum(losses[-5:]) / 5 < 0.98 * losses[0]
    assert all((p >= FLOOR).all() for n, p in module.named_parameters() if n.endswith("scales"))
    with torch.no_grad():
        expected = module(X)
        stock, other = MAKE[name](), MAKE[name]()
        expose_scales(other)
        other.load_state_dict(saved(module))
        torch.testing.assert_close(other(X), expected, rtol=1e-3, atol=1e-4)  # stored in the library's dtype
        other.load_state_dict(saved(module))  # also after a forward
        torch.testing.assert_close(other(X), expected, rtol=1e-3, atol=1e-4)
        stock.load_state_dict(saved(module))
        torch.testing.assert_close(stock(X), expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(layer, ScaledLayer) for layer in stock.modules())


@every
def test_noise_of_the_wrong_unit(name: str) -> None:
    """Steps between codes and largest magnitudes do not take the same absolute noise."""
    bnb = pytest.importorskip("bitsandbytes")
    both = nn.Sequential(MAKE[name](), bnb.nn.Linear4bit(64, 64)).to("cpu")
    expose_scales(both)
    with pytest.raises(ValueError, match=r"different units: .*bitsandbytes 4-bit"):
        build_view(both, both.parameters(), Rademacher(), select_spec="scales", scales="absolute")


def test_a_torchao_tensor_without_scales() -> None:
    """Two tensors of codes, as a 2:4 sparse weight has."""
    pytest.importorskip("torchao")
    from torchao.utils import TorchAOBaseTensor

    class Odd(TorchAOBaseTensor):
        tensor_data_names = ("codes",)
        tensor_attribute_names = ()

        def __new__(cls, codes: Tensor) -> Odd:
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

        def __init__(self, codes: Tensor) -> None:
            super().__init__()
            self.codes = codes

        def __tensor_flatten__(self) -> Any:
            return ["codes"], {}

    Odd.__module__ = "torchao.odd"
    module = plain()
    module[0].weight = nn.Parameter(Odd(torch.zeros(64, 64, dtype=torch.int8)), requires_grad=False)
    with pytest.raises(ValueError, match=r"'0' is a torch\.nn\.modules\.linear\.Linear with torchao\.odd\..*Odd; scales can"):
        expose_scales(module)
