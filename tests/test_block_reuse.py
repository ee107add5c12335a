"""Leaving out the blocks before the first perturbed one changes no bit of an estimate, and is left off where it could."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, Task, assert_same, estimated, fit, tiny_causal_lm, token_batches, weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zolightning.methods.estimators import SPSA, PerExampleSPSA
from zolightning.noise import Rademacher
from zolightning.probing.block_reuse import BlockReuse, block_reuse
from zolightning.probing.inspection import inspect_step
from zolightning.probing.isolation import Isolation
from zolightning.space import Rank1, View, build_view
from zolightning.types import Estimate, Key

IDS = token_batches(1)[0]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any], Tensor]


class Block(nn.Module):
    """Takes and gives what a test wants, through ``act``."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), act

    def forward(self, x: Tensor, extra: Any = None) -> Any:
        if isinstance(x, tuple):
            return self.act(self.linear(x[0])), {"kept": x[1]["kept"] + 1, "mask": extra}
        return self.act(self.linear(x))


class Net(nn.Module):
    def __init__(self, acts: dict[int, Callable[[Tensor], Tensor]] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block((acts or {}).get(i, torch.tanh)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


def language_model(kind: str) -> tuple[nn.Module, Forward]:
    model = tiny_causal_lm(kind)

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    return model, forward


class Structured(Net):
    """Tuples and dicts between the blocks, a mask by name."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = (self.embed(x), {"kept": 0, "mask": None})
        for block in self.blocks:
            state = block(state, extra=x > 0)
        return state[0].square().sum() * state[1]["kept"]


class Twice(Net):
    """Enters the stack a second time, as a siamese loss does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(-x)


class Residuals(Net):
    """Uses what every block gave."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.embed(x)]
        for block in self.blocks:
            outs.append(block(outs[-1]))
        return sum(outs[1:], outs[0]).square().sum()


class Cached(Net):
    """Hands its blocks an object that they could write into."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, extra=object())
        return x.square().sum()


def spsa(forward: Forward, view: View, batch: Any, reuse: BlockReuse | None, queries: int = 2) -> tuple[Estimate, int]:
    """The estimate, and the operations of its matrix products."""
    torch.manual_seed(4)
    with FlopCounterMode(display=False) as flops:
        return estimated(SPSA(1e-2, queries), view, forward, batch, Key(3, 0), reuse=reuse), flops.get_total_flops()


def view_of(model: nn.Module, select: str) -> View:
    return build_view(model, model.parameters(), Rademacher(), select_spec=select)


CASES: dict[str, Callable[[], tuple[nn.Module, Forward, Any, str]]] = {
    "llama": lambda: (*language_model("llama"), IDS, "last:1"),
    "gpt2": lambda: (*language_model("gpt2"), IDS, "last:1"),
    "plain": lambda: (net := Net(), net, X, "blocks:2-2"),
    "tuples": lambda: (net := Structured(), net, X, "last:2"),
    "dropout behind": lambda: (net := Net({2: lambda x: F.dropout(x, 0.5)}), net, X, "last:2"),
    "writes in place": lambda: (net := Net({2: lambda x: x.relu_(), 3: lambda x: x.tanh_()}), net, X, "last:2"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_that_of_full_forwards(case: str) -> None:
    model, forward, batch, select = CASES[case]()
    view, before = view_of(model, select), weights(model)
    blocks = block_reuse(view)
    full, flops = spsa(forward, view, batch, None)
    for step in range(2):
        reused, fewer = spsa(forward, view, batch, blocks)
        assert reused == full
        assert blocks.proved
        if step:  # the first one compares
            assert fewer < flops
    assert blocks.notice().startswith("blocks 0 to ")
    assert not blocks.notice()
    assert_same(weights(model), before)


UNFIT: dict[str, Callable[[], tuple[nn.Module, Any, bool | None]]] = {
    "dropout": lambda: (Net({1: lambda x: F.dropout(x, 0.5)}), X, None),
    "a second pass": lambda: (Twice(), X, None),
    "an object": lambda: (Cached(), X, None),
    "all activations": lambda: (Residuals(), X, False),
}


@pytest.mark.parametrize("case", UNFIT)
def test_where_it_could_change_something_all_blocks_run(case: str) -> None:
    model, batch, proved = UNFIT[case]()
    view = view_of(model, "last:2")
    blocks = block_reuse(view)
    assert len(blocks) == 2
    full, flops = spsa(model, view, batch, None)
    spsa(model, view, batch, blocks)
    again, same = spsa(model, view, batch, blocks)
    assert again == full
    assert same == flops
    assert blocks.proved is proved
    if proved is False:
        assert "another" in blocks.notice()


def test_other_inputs_run_all_blocks() -> None:
    net = Net()
    view, draws = view_of(net, "last:1"), iter(range(100))
    blocks = block_reuse(view)
    changing = lambda x: net(x + next(draws))  # noqa: E731
    spsa(changing, view, X, blocks)
    assert blocks.proved is None


def test_what_rules_it_out_from_the_start() -> None:
    net = Net()
    assert len(block_reuse(view_of(net, "last:1"))) == 3
    assert not block_reuse(view_of(net, "all"))
    assert not block_reuse(view_of(net, "first:1"))
    assert not block_reuse(view_of(net, r"re:embed|blocks\.3"))  # what enters the first block is perturbed
    hook = net.blocks[0].linear.register_forward_hook(lambda *_: None)
    assert not block_reuse(view_of(net, "last:1"))
    hook.remove()


def test_an_exception_leaves_the_blocks_as_they_were() -> None:
    net = Net()
    view, calls, before = view_of(net, "last:1"), [], weights(net)

    def forward(x: Tensor) -> Tensor:
        calls.append(net(x))
        if len(calls) == 3:
            raise RuntimeError("in the third forward")
        return calls[-1]

    with pytest.raises(RuntimeError, match="third forward"):
        spsa(forward, view, X, block_reuse(view))
    assert all("forward" not in block.__dict__ for block in net.blocks)
    assert_same(weights(net), before)


@pytest.mark.parametrize(("select", "rows", "calls"), [("last:2", 8, [16]), ("last:2", 40, [40, 40]), ("re:weight", 40, [80])])
def test_a_large_batch_is_not_doubled_where_blocks_can_be_left_out(select: str, rows: int, calls: list[int]) -> None:
    net, x, seen = Net(), torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)), []

    def forward(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        out = net.embed(batch)
        for block in net.blocks:
            out = block(out)
        return out.square().sum(-1)

    view = build_view(net, net.parameters(), Rademacher(), select_spec=select, structure=Rank1(vectors=False))
    with torch.no_grad():
        examples = inspect_step(forward, x, view, Isolation(net, torch.device("cpu")), True)
    seen.clear()
    blocks = block_reuse(view)
    blocks.proved = True  # else a forward more compares
    found = estimated(PerExampleSPSA(1e-2), view, forward, x, Key(3, 0), examples, blocks or None)
    assert seen == calls
    wanted = estimated(PerExampleSPSA(1e-2), view, forward, x, Key(3, 0), examples._replace(repeats=False))
    pairs = zip(found.terms, wanted.terms, strict=True)
    assert all(a.key == b.key and a.coefficient == pytest.approx(b.coefficient, abs=1e-3) for a, b in pairs)


def test_training_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Against a model that draws a random number in its first block, which rules reuse out and changes nothing else."""

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch).double()

    plain = Task(Net(), loss)
    drawing = copy.deepcopy(plain)
    drawing.net.blocks[0].act = lambda x: (torch.rand(()), torch.tanh(x))[1]  # type: ignore[union-attr]
    with caplog.at_level("INFO"):
        for task in (plain, drawing):
            fit(task, [X] * 3, PLAIN.override(select="last:2", num_queries=2))
    assert_same(weights(plain), weights(drawing))
    assert caplog.text.count("run only in the first probe of a step") == 1
