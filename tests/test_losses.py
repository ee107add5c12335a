"""The mean that a training step returns, split into the losses it is the mean of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning.probing.loss_splitter import LossSplitter
from zolightning.probing.objective import loss_of
from zolightning.space.leaf import Scratch
from zolightning.space.probe import Probe
from zolightning.space.together import Vectors
from zolightning.types import Shared

B, T, C = 4, 3, 5


def splitting(splitter: LossSplitter) -> Probe:
    """A probe of no weights, whose loss functions the splitter takes."""
    return Probe({}, Shared(), Scratch(0), Vectors([]), set(), watch=splitter)


def classes(*shape: int) -> Tensor:
    return torch.randint(0, C, shape)


@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        (F.cross_entropy, torch.randn(B, C), classes(B)),
        (F.cross_entropy, torch.randn(B, C, T), classes(B, T)),
        (F.cross_entropy, torch.randn(B * T, C), classes(B * T)),
        (F.cross_entropy, torch.randn(B, C), torch.rand(B, C)),
        (F.nll_loss, torch.randn(B, C), classes(B)),
        (F.mse_loss, torch.randn(B, T, C), torch.randn(B, T, C)),
        (F.l1_loss, torch.randn(B, T), torch.randn(B, T)),
        (F.huber_loss, torch.randn(B, T), torch.randn(B, T)),
        (F.smooth_l1_loss, torch.randn(B, T), torch.randn(B, T)),
        (F.binary_cross_entropy_with_logits, torch.randn(B, T), torch.rand(B, T)),
        (F.binary_cross_entropy, torch.rand(B, T), torch.rand(B, T)),
    ],
    ids=lambda v: v.__name__ if callable(v) else "x".join(map(str, v.shape)),
)
def test_each_example_alone_gives_its_loss(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    with splitting(splitter := LossSplitter(B)):
        mean = function(x, y)
    losses = splitter.losses(mean)
    assert losses is not None
    torch.testing.assert_close(mean, function(x, y))
    alone = torch.stack([function(a, b) for a, b in zip(x.chunk(B), y.chunk(B), strict=True)])
    torch.testing.assert_close(losses.float(), alone)


@pytest.mark.parametrize("shape", [(B, C), (B * T, C)], ids=["classes", "tokens"])
def test_ignored_targets_do_not_count(shape: tuple[int, int]) -> None:
    x, y = torch.randn(shape), classes(shape[0])
    y[1] = -100
    with splitting(splitter := LossSplitter(B)):
        mean = nn.CrossEntropyLoss(label_smoothing=0.1)(x, y)
    losses = splitter.losses(mean)
    assert losses is not None
    torch.testing.assert_close(losses.mean().float(), F.cross_entropy(x, y, label_smoothing=0.1))


def twice(x: Tensor, y: Tensor) -> Tensor:
    return 2 * F.cross_entropy(x, y)


def with_penalty(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y) + x.square().mean()


def two_losses(x: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy(x, y)
    F.cross_entropy(-x, y)
    return first


def weighted(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, weight=torch.rand(C))


def summed(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction="sum")


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    return -x.log_softmax(-1).gather(1, y[:, None]).mean()


@pytest.mark.parametrize("step", [twice, with_penalty, two_losses, weighted, summed, by_hand])
def test_anything_but_the_mean_itself_is_left_alone(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = torch.randn(B, C), classes(B)
    torch.manual_seed(3)
    with splitting(splitter := LossSplitter(B)):
        loss = step(x, y)
    torch.manual_seed(3)
    torch.testing.assert_close(loss, step(x, y))
    assert splitter.losses(loss) is None


def test_a_batch_of_another_size_is_left_alone() -> None:
    with splitting(splitter := LossSplitter(3)):
        loss = F.cross_entropy(torch.randn(B, C), classes(B))
    assert splitter.losses(loss) is None


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"loss": v, "extra": 1}])
def test_the_loss_may_be_in_a_dict(wrap: Callable[[Tensor], Any]) -> None:
    with splitting(splitter := LossSplitter(B)):
        out = wrap(F.mse_loss(torch.randn(B, 2), torch.randn(B, 2)))
    losses = splitter.losses(loss_of(out))
    assert losses is not None
    assert losses.shape == (B,)


def test_a_hugging_face_language_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model, ids = LlamaForCausalLM(config), torch.randint(0, 32, (B, 6))
    with torch.no_grad(), splitting(splitter := LossSplitter(B)):
        loss = model(input_ids=ids, labels=ids).loss
    losses = splitter.losses(loss)
    assert losses is not None
    with torch.no_grad():
        alone = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
    torch.testing.assert_close(losses.float(), torch.stack(alone))
