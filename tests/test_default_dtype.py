"""Lightning's precision plugins change PyTorch's default dtype around the forward: no bit of ours depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import PLAIN, PerExampleTask, batches, per_example_mse, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.noise import DISTRIBUTIONS, backends, kernels, sample, selftest, set_backend
from zolightning.space import build_view
from zolightning.types import Key, Term

TERMS = [Term(Key(3, 4, 5), 0.3), Term(Key(3, 4, 6), -1.7)]
CPU = torch.device("cpu")


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=["native", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    try:
        set_backend(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    set_backend("auto")


def _noise(noise: Any) -> Tensor:
    return sample(noise, Key(1, 2, 3), 7, torch.tensor([0, 130]), 300, torch.tensor([5, 6]))


def _perturb_rows(noise: Any) -> Tensor:
    out = torch.empty(2, 9, dtype=torch.float32)
    kernels.perturb_rows(out, torch.ones(2, 9, dtype=torch.float32), noise, TERMS, 7, torch.tensor([4, 1]))
    return out


def _changed(kernel: Callable[..., None], *rest: Any) -> Callable[[Any], Tensor]:
    def work(noise: Any) -> Tensor:
        weights = torch.arange(300, dtype=torch.float32).to(torch.bfloat16) / 64
        kernel(weights, *(noise if r is DISTRIBUTIONS else r for r in rest))
        return weights

    return work


KERNELS: dict[str, Callable[[Any], Tensor]] = {
    "sample": _noise,
    "noise_sum": lambda noise: kernels.noise_sum(noise, TERMS, 7, 5, 300, CPU),
    "perturb_rows": _perturb_rows,
    "sgd_": _changed(kernels.sgd_, DISTRIBUTIONS, TERMS, 7, 5, 0.1, 0.2, Key(1, 2)),
    "stochastic_round_": _changed(kernels.stochastic_round_, torch.linspace(-1, 1, 300, dtype=torch.float32), Key(1, 2), 7, 0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel: str, noise: str, dtype: torch.dtype) -> None:
    work = KERNELS[kernel]
    with default(torch.float32):
        expected = work(DISTRIBUTIONS[noise]())
    with default(dtype):
        found = work(DISTRIBUTIONS[noise]())
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_outer_sum() -> None:
    a, b = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-2, 1, 21).view(3, 7)
    expected = kernels.outer_sum(a, b)
    with default(torch.bfloat16):
        assert torch.equal(kernels.outer_sum(a, b), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_library_can_be_loaded_in_the_middle_of_a_step(dtype: torch.dtype) -> None:
    library = backends.native_backend()
    if library is None:
        pytest.skip("no native kernels")
    with default(dtype):
        assert selftest.verify(library) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("structure", ["dense", "rank1"])
def test_probes(structure: Any, dtype: torch.dtype) -> None:
    """What a forward sees is the leaf's own noise, which the update will use."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40, bias=False)).to(dtype)
    view = build_view(net, net.parameters(), DISTRIBUTIONS["gaussian"](), structure=structure)
    identity, key = torch.eye(6, dtype=dtype), Key(1, 2, 3)
    with default(dtype), torch.no_grad(), view.along(key, 0.5):
        seen = net(identity).T
    z = view.leaves[0].noise([Term(key, 0.5)], 0, 240).view(40, 6)
    expected = (net[0].weight.detach().to(z.dtype) + z).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps if structure == "rank1" else 0.0  # two products in the weight's own dtype
    torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_directions_of_each_example_point_the_right_way(precision: str) -> None:
    """A quadratic of the weights: the estimate's mean over many directions is the gradient, up to its known spread."""
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    strategy = ZOStrategy(PLAIN, estimator="per_example", structure="rank1", eps=0.1, num_queries=64, lr=0.0)
    x, y = batches(1, size=64)[0]
    module = PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), per_example_mse)
    torch.nn.init.zeros_(module.net[0].weight)  # type: ignore[index, arg-type]
    batch = (x.to(dtype), y.to(dtype))
    quiet_trainer(strategy, precision=precision).fit(module, DataLoader([batch], batch_size=None))
    record = strategy.last_record
    assert record is not None and len(record.terms) == 64 * 64
    leaf = strategy.view(module.optimizers().optimizer).leaves[0]  # type: ignore[union-attr]
    estimate = leaf.gradient(record.terms)
    exact = -2.0 / 3.0 * (y.T @ x) / 64
    cosine = torch.nn.functional.cosine_similarity(estimate.float().flatten(), exact.flatten(), dim=0)
    assert cosine > 0.85
