"""CUDA graphs where there is no GPU: what is asked for early, and what they are made of. tests/test_gpu.py records them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Task,
    assert_same,
    batches,
    fit,
    lm_losses,
    mlp,
    tiny_causal_lm,
    token_batches,
    weights,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.functional import linear

from zolightning.noise import CapturedKey, Rademacher
from zolightning.noise.captured_key import captured_words, keep, key_words
from zolightning.probing.batches import map_leaves
from zolightning.space import build_view
from zolightning.types import Key, Shared, Term


def test_on_a_cpu_forwards_run_as_they_are_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asked, plain = (PerExampleTask(tiny_causal_lm("llama"), lm_losses) for _ in range(2))
    fit(asked, token_batches(3), PLAIN.override(cuda_graphs=True))
    fit(plain, token_batches(3), PLAIN)
    assert_same(weights(asked), weights(plain))
    assert "no CUDA graphs: the module is on cpu" in caplog.text


def test_modules_without_an_objective_are_refused() -> None:
    module = Task(mlp())
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"`cuda_graphs=True` records `zo_objective`, which Task does not have"):
        fit(module, batches(1), PLAIN.override(cuda_graphs=True))
    assert_same(weights(module), before)


def test_a_probe_inside_another_does_the_work_alone() -> None:
    net, x = mlp(), torch.ones(1, 4)
    view = build_view(net, net.parameters(), Rademacher(), select_spec="all", structure="dense")
    outer, inner = (Shared([Term(Key(0, step), 0.1)]) for step in (1, 2))
    with torch.no_grad():
        with view.probe(inner):
            alone = net(x)
        with view.probe(outer):
            before = net(x)
            with view.probe(inner):
                assert view.point is inner
                assert torch.equal(net(x), alone)
            assert view.point is outer
            assert torch.equal(net(x), before)
        assert view.point is None
        assert not torch.equal(before, alone)
        assert torch.equal(net[0](x), linear(x, net[0].weight, net[0].bias))


def test_a_held_key_is_read_from_memory_while_launches_are_recorded() -> None:
    first, later, other = Key(1, 2, 3), Key(1, 9, 3), Key(5, 6)
    held = CapturedKey(first, torch.device("cpu"))
    with held.recording():
        assert captured_words(key_words(first)) is held.words
        assert captured_words(key_words(other)) is None
        table = keep(torch.ones(1))
    assert held.kept[0] is table
    assert captured_words(key_words(first)) is None
    held.set(later)
    assert tuple(held.words.tolist()) == key_words(later)


class Pair(NamedTuple):
    ids: Any
    label: Any


def test_leaves_of_a_batch_are_mapped_within_their_containers() -> None:
    batch = {"a": [1, (2, 3)], "b": Pair(4, "x")}
    assert map_leaves(batch, lambda v: v * 2) == {"a": [2, (4, 6)], "b": Pair(8, "xx")}
