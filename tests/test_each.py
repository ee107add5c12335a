"""Every example of a batch reads vectors and matrices of its own, as if it ran alone on a model with those weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_causal_lm
from torch import Tensor, nn

from zolightning.noise import Gaussian, Rademacher
from zolightning.space import Rank1, View, build_view
from zolightning.types import Key, PerExample, PerExampleError, Term

KEY, QUERIES = Key(11, 3), torch.tensor([4, 5, 6, 4])
OFFSETS = torch.tensor([0.1, -0.2, 0.3, -0.1])


class Reads(nn.Module):
    """Reads one vector of 6 beside activations (4, 3, 6), in the given way."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.vector, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self._how = how

    def forward(self, x: Tensor) -> Tensor:
        return self._how(self.layer(x).tanh(), self.vector)


WAYS = {
    "times": lambda x, v: x * v,
    "times, the vector first": lambda x, v: v * x,
    "plus": lambda x, v: x + v,
    "plus so many": lambda x, v: torch.add(x, v, alpha=0.5),
    "minus": lambda x, v: x - v,
    "from": lambda x, v: v - x,
    "method": lambda x, v: x.mul(v),
    "by name": lambda x, v: torch.mul(x, other=v),
    "bias": lambda x, v: F.linear(x, torch.eye(6) * 2, v),
    "layer norm": lambda x, v: F.layer_norm(x, (6,), v, torch.ones(6)),
    "layer norm's bias": lambda x, v: F.layer_norm(x, (6,), torch.full((6,), 2.0), bias=v, eps=1e-3),
    "both": lambda x, v: F.layer_norm(x, (6,), v, v),
    "rms norm": lambda x, v: F.rms_norm(x, (6,), v, 1e-3),
    "flattened tokens": lambda x, v: (x.flatten(0, 1) * v).view_as(x),
    "two dimensions": lambda x, v: x.sum(1) + v,
}


def alone(module: nn.Module, view: View, x: Tensor) -> Tensor:
    """The textbook: each example by itself, on a copy of the module with its weights perturbed by its noise."""
    outs = []
    for n, (query, offset) in enumerate(zip(QUERIES.tolist(), OFFSETS.tolist(), strict=True)):
        twin = copy.deepcopy(module)
        for leaf in view.leaves:
            z = leaf.noise([Term(KEY._replace(query=query), 1.0)], 0, leaf.parameter.numel()).view(leaf.parameter.shape)
            twin.get_parameter(leaf.name).data.add_(z.to(leaf.parameter.dtype), alpha=offset)
        outs.append(twin(x[n : n + 1]))
    return torch.cat(outs)


@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=str)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_each_example_reads_a_vector_of_its_own(way: str, distribution: Rademacher | Gaussian) -> None:
    torch.manual_seed(0)
    module, x = Reads(WAYS[way]), torch.randn(4, 3, 6)
    view = build_view(module, module.parameters(), distribution, structure="rank1")
    assert len(view.leaves) == 3, "the vector, the layer's matrix and its bias"
    assert view.per_example
    before = [p.clone() for p in module.parameters()]
    with view.at(PerExample(KEY, QUERIES, OFFSETS)):
        together = module(x)
    torch.testing.assert_close(together, alone(module, view, x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize(("kind", "select"), [("llama", "re:layers"), ("gpt2", "re:ln_")])
@torch.no_grad()
def test_norms_of_a_language_model_take_part(kind: str, select: str) -> None:
    module = Logits(tiny_causal_lm(kind).eval())
    ids = torch.randint(0, 32, (4, 5), generator=torch.Generator().manual_seed(1))
    view = build_view(module, module.parameters(), Rademacher(), select_spec=select, structure="rank1")
    assert any(leaf.parameter.dim() == 1 for leaf in view.leaves)
    with view.at(PerExample(KEY, QUERIES, OFFSETS)):
        together = module(ids)
    torch.testing.assert_close(together, alone(module, view, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, v: x * v.double().float(),
        lambda x, v: x + (1.0 + v),
        lambda x, v: F.conv1d(x.transpose(1, 2), torch.ones(6, 6, 1), v),
        lambda x, v: x.sum() * v,
        lambda x, v: x[:3] * v,
    ],
    ids=["cast", "alone", "convolution", "a scalar", "fewer examples"],
)
@torch.no_grad()
def test_a_vector_read_otherwise_is_refused_by_name(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    module = Reads(how)
    view = build_view(module, module.parameters(), Rademacher(), structure="rank1")
    with pytest.raises(PerExampleError, match="'vector' is read in another way"), view.at(PerExample(KEY, QUERIES, OFFSETS)):
        module(torch.randn(4, 3, 6))


def test_matrices_alone() -> None:
    module = Reads(WAYS["plus"])
    view = build_view(module, module.parameters(), Rademacher(), structure=Rank1(vectors=False))
    assert [leaf.name for leaf in view.leaves] == ["layer.weight"]
