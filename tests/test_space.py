"""Selections, views and the checks made when a view is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import mlp, tiny_causal_lm, weights
from torch import Tensor, nn

from zolightning import noise
from zolightning.noise import Gaussian, Rademacher, stochastic_round_, working_dtype
from zolightning.space import DenseLeaf, LowRank, Place, Rank1, Rank1Leaf, Structure, View, blocks, build_view, select
from zolightning.types import Key, Term


def stack(count: int) -> nn.Module:
    """An embedding, a stack of blocks, and a head."""
    block = [nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(count)]
    return nn.ModuleDict({"embed": nn.Embedding(5, 4), "blocks": nn.ModuleList(block), "head": nn.Linear(4, 2)})


def chosen(root: nn.Module, spec: Any) -> list[str]:
    return list(select(root, spec, dict(root.named_parameters())))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("first:2", [0, 1]),
        ("last:1", [8]),
        ("last:9", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("blocks:3-4", [3, 4]),
        ("blocks:0-0", [0]),
        ("middle", [3, 4, 5]),
    ],
)
def test_blocks(spec: str, expected: list[int]) -> None:
    assert chosen(stack(9), spec) == [f"blocks.{i}.0.weight" for i in expected]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_middle_of_a_small_module_is_everything(count: int) -> None:
    root = stack(count)
    assert chosen(root, "middle") == chosen(root, "all") == [n for n, _ in root.named_parameters()]


def test_middle_of_six() -> None:
    assert chosen(stack(6), "middle") == ["blocks.2.0.weight", "blocks.3.0.weight"]


def test_pattern_and_predicate() -> None:
    root = stack(2)
    assert chosen(root, "re:embed|bias$") == ["embed.weight", "head.bias"]
    assert chosen(root, lambda name, parameter: parameter.dim() == 1) == ["head.bias"]


def test_stack_of_a_transformer() -> None:
    assert blocks(tiny_causal_lm("llama")) == ("model.layers", 2)
    assert blocks(tiny_causal_lm("gpt2")) == ("transformer.h", 2)
    assert blocks(mlp()) == ("", 0)


@pytest.mark.parametrize("spec", ["frist:2", "middle:2", "blocks:1", "", "last:-1", "ALL"])
def test_unknown_spec(spec: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown; allowed: 'all', 'middle'"):
        chosen(stack(9), spec)


@pytest.mark.parametrize("spec", ["first:10", "last:10", "blocks:8-9", "blocks:4-3", "first:0"])
def test_out_of_range(spec: str) -> None:
    with pytest.raises(ValueError, match=r"out of range: 'blocks' has blocks 0 to 8"):
        chosen(stack(9), spec)


def test_other_bad_selections() -> None:
    with pytest.raises(ValueError, match="needs a stack of equal blocks"):
        chosen(mlp(), "first:1")
    with pytest.raises(ValueError, match=r"names no trainable parameter; there are 4: 0\.weight"):
        chosen(mlp(), "re:nothing")
    with pytest.raises(ValueError, match="not a regular expression"):
        chosen(mlp(), "re:(")


def test_leaves_are_numbered_in_the_module_not_in_the_selection() -> None:
    net = mlp()
    view = build_view(net, reversed(list(net.parameters())), Rademacher(), select_spec="re:2")
    assert [(leaf.name, leaf.index) for leaf in view.leaves] == [("2.weight", 2), ("2.bias", 3)]
    assert view.numel == 27
    assert repr(view) == "View(2 leaves, 27 weights)"


def test_frozen_parameters_are_left_out() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    assert [leaf.name for leaf in build_view(net, net.parameters(), Rademacher()).leaves] == ["2.weight", "2.bias"]


def test_rank1_takes_matrices_of_linear_layers_and_vectors() -> None:
    model = tiny_causal_lm("llama")
    both = build_view(model, model.parameters(), Rademacher(), structure="rank1")
    assert {leaf.name for leaf in both.leaves} == {n for n, p in model.named_parameters() if "embed" not in n}
    view = build_view(model, model.parameters(), Rademacher(), structure=Rank1(vectors=False))
    assert all(isinstance(leaf, Rank1Leaf) for leaf in view.leaves)
    assert {leaf.name.split(".")[-2] for leaf in view.leaves} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"takes none of the 5 parameters that `select='re:norm'` holds"):
        build_view(model, model.parameters(), Rademacher(), select_spec="re:norm", structure=Rank1(vectors=False))


def test_rank1_of_the_optimizer_is_the_probe_s() -> None:
    """z is u vᵀ, and a slice of it starting inside a row is that slice."""
    net = mlp()
    (leaf, _) = build_view(net, net.parameters(), Rademacher(), structure=Rank1(vectors=False)).leaves
    terms = [Term(Key(1, 2, q), c) for q, c in enumerate((0.5, -2.0, 1.0))]
    whole = leaf.gradient(terms)
    assert torch.linalg.matrix_rank(leaf.gradient(terms[:1])) == 1
    torch.testing.assert_close(whole, sum(leaf.gradient([t]) for t in terms))
    torch.testing.assert_close(leaf.noise(terms, 5, 9), whole.flatten()[5:14])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [Rank1(), LowRank(2, 3)], ids=str)
def test_an_update_by_outer_products_is_the_dense_one(
    kind: Structure, dtype: torch.dtype, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether the weight is contiguous or not, and cut into whatever pieces."""
    torch.manual_seed(0)
    start = torch.randn(37, 29).to(dtype)
    terms = [Term(Key(1, 2, q), c) for q, c in enumerate((0.5, -2.0, 1.0))]

    def updated(weight: Tensor) -> Tensor:
        leaf = kind.leaf(Place("w", 3, nn.Parameter(weight), Gaussian()), True, {})
        assert leaf is not None
        leaf.sgd_(terms, 0.3, decay, Key(1, 2))
        return leaf.parameter.detach().clone()

    leaf = kind.leaf(Place("w", 3, nn.Parameter(start.clone()), Gaussian()), True, {})
    assert leaf is not None
    wide, gradient = start.to(working_dtype(dtype)), leaf.gradient(terms)
    expected = start.clone()
    if dtype == torch.bfloat16:
        stochastic_round_(expected, wide - (gradient + decay * wide if decay else gradient) * 0.3, Key(1, 2), 3, 0)
    else:
        expected = wide.add(gradient.add(wide, alpha=decay) if decay else gradient, alpha=-0.3)
    assert torch.equal(updated(start.clone()), expected)
    monkeypatch.setattr(noise.reference, "CHUNK", 50)
    assert torch.equal(updated(start.clone()), expected)
    if dtype != torch.bfloat16:  # whose strided twin may round products and sums in one
        assert torch.equal(updated(start.t().contiguous().t()), expected)


def test_rank1_needs_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"needs a matrix, got 'x' of shape \(3,\)"):
        Rank1Leaf("x", 0, nn.Parameter(torch.zeros(3)), Rademacher())


def test_nothing_to_train() -> None:
    net = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_view(net, net.parameters(), Rademacher())
    with pytest.raises(ValueError, match="nothing to train"):
        View(net, [])


def test_parameter_of_another_module() -> None:
    with pytest.raises(ValueError, match=r"of shape \(8, 4\) that is not one of the LightningModule's"):
        build_view(mlp(), mlp().parameters(), Rademacher())


def test_two_parameters_on_one_storage() -> None:
    net = mlp(4, 4, 4)
    net[2].weight = nn.Parameter(net[0].weight.data)
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are two Parameters on the same memory"):
        build_view(net, net.parameters(), Rademacher())


def test_empty_parameters_share_no_memory() -> None:
    net = nn.ParameterList([torch.empty(0), torch.empty(0), torch.ones(2)])
    assert len(build_view(net, net.parameters(), Rademacher()).leaves) == 3


def test_replaced_parameter() -> None:
    net = mlp()
    view = build_view(net, net.parameters(), Rademacher())
    view.check()
    net[0].weight = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(RuntimeError, match=r"'0\.weight' was replaced or re-parameterised"):
        view.check()


def test_reparameterised_weight() -> None:
    net = mlp()
    view = build_view(net, net.parameters(), Rademacher())
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(RuntimeError, match=r"'0\.weight' was replaced or re-parameterised"):
        view.check()


def test_leaf_says_what_it_is() -> None:
    net = mlp().bfloat16()
    (leaf, *_) = build_view(net, net.parameters(), Rademacher()).leaves
    assert repr(leaf) == "DenseLeaf('0.weight', (8, 4), torch.bfloat16)"
    assert isinstance(leaf, DenseLeaf)
    assert leaf.perturbed([Term(Key(0, 0), 0.0)]).dtype == torch.bfloat16
    assert torch.equal(leaf.perturbed([]), weights(net)["0.weight"])
