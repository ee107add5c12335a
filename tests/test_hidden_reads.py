"""Reads that no function mode sees are found and perturbed as all others; gradients inside the step work at a probe's point."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, Task, batches, fit, mlp, mse
from reference import directions, projected_gradient
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from zolightning.engine.session import Session
from zolightning.methods.recipes import recipe
from zolightning.noise import Rademacher
from zolightning.probing.isolation import Isolation
from zolightning.probing.rehearsal import rehearse
from zolightning.space import build_view
from zolightning.types import Key

CPU = torch.device("cpu")


@torch.jit.script
def scripted_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t() + bias)


@torch.jit.script
def scripted_bias(x: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x + bias)


def outside(call: Callable[[], Tensor]) -> Tensor:
    """In a thread that a library starts."""
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(call())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


class Reader(nn.Module):
    """Two layers, the first of which is read in the way of its kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.first, self.last = kind, nn.Linear(4, 8), nn.Linear(8, 3)
        self.unread = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, f"do_{self.kind}")(x))

    # behind the mode's back

    def do_scripted(self, x: Tensor) -> Tensor:
        return scripted_linear(x, self.first.weight, self.first.bias)

    def do_scripted_bias(self, x: Tensor) -> Tensor:
        return scripted_bias(F.linear(x, self.first.weight), self.first.bias)

    def do_read_twice(self, x: Tensor) -> Tensor:  # once where the mode sees it
        return scripted_linear(x, self.first.weight, self.first.bias) + self.first(x)

    def do_thread(self, x: Tensor) -> Tensor:
        return outside(lambda: torch.tanh(self.first(x)))

    def do_pool(self, x: Tensor) -> Tensor:
        def half(part: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.tanh(self.first(part))

        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(half, x.chunk(2))))

    def do_transform(self, x: Tensor) -> Tensor:
        weights = dict(self.first.named_parameters())
        _, out = torch.func.vjp(lambda w: torch.func.functional_call(self.first, w, (x,)), weights)[::-1]
        return torch.tanh(out)

    # seen by the mode

    def do_layer(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def do_functional_call(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.func.functional_call(self.first, dict(self.first.named_parameters()), (x,)))

    def do_detached_call(self, x: Tensor) -> Tensor:
        weights = {name: p.detach() for name, p in self.first.named_parameters()}
        return torch.tanh(torch.func.functional_call(self.first, weights, (x,)))

    def do_checkpoint(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=False)  # type: ignore[no-any-return]

    def do_reentrant(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=True)  # type: ignore[no-any-return]

    def do_operator(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.ops.aten.addmm.default(self.first.bias, x, torch.ops.aten.t(self.first.weight)))

    def do_data(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.weight.data.t() + self.first.bias.detach())

    def do_maps(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.vmap(lambda row: row @ self.first.weight.t() + self.first.bias)(x))


BEHIND = {
    "scripted": ["first.weight", "first.bias"],
    "scripted_bias": ["first.bias"],
    "read_twice": ["first.weight", "first.bias"],
    "thread": ["first.weight", "first.bias"],
    "pool": ["first.weight", "first.bias"],
}
SEEN = ["layer", "functional_call", "detached_call", "checkpoint", "reentrant", "operator", "data", "maps"]


def found(net: nn.Module, forward: Callable[[Any], Any], select: Any = "all") -> list[str]:
    view = build_view(net, net.parameters(), Rademacher(), select_spec=select)
    with torch.no_grad():
        return [leaf.name for leaf in rehearse(forward, batches(1)[0], view, Isolation(net, CPU))]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [*BEHIND, *SEEN, "transform"])
def test_found_and_estimated_as_by_the_textbook(kind: str) -> None:
    """Each projected gradient is that of the dense estimator on perturbed copies."""
    net, forwards = Reader(kind), []
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def forward(batch: Any) -> Tensor:
        forwards.append(1)
        return mse(net, batch)

    behind = found(net, forward)
    assert kind == "transform" or behind == BEHIND.get(kind, [])
    assert len(forwards) == 1 or behind
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())

    session = Session(net, SGD(net.parameters(), lr=1e-3), PLAIN)
    for step, item in enumerate(batches(2)):
        zs = directions(net, Key(7, step), Rademacher())
        g = projected_gradient(net, lambda twin, item=item: mse(twin, item), zs, 1e-3)
        session.estimate(lambda batch: mse(net, batch), item)
        record = session.update()
        assert record.raw[0] == pytest.approx(g, rel=1e-3, abs=1e-4)
        assert [session.view().leaves[i].name for i in record.unread] == ["unread.weight", "unread.bias"]
    assert all(torch.equal(p, before[name]) == name.startswith("unread") for name, p in net.named_parameters())


@pytest.mark.parametrize("kind", ["scripted_bias", "thread", "layer"])
def test_default_recipe(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A direction for each example does not reach them; all that is trained gets its update."""
    caplog.set_level("INFO")
    module = Task(Reader(kind))
    before = copy.deepcopy(module.net)
    fit(module, batches(3), recipe("default").override(seed=1, select="all"))
    assert ("perturbed in copies" in caplog.text) == (kind != "layer")
    moved = [
        name for (name, p), q in zip(before.named_parameters(), module.net.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert moved == ["first.weight", "first.bias", "last.weight", "last.bias"]


def test_exact_restore() -> None:
    net = Reader("scripted")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    addresses = [p.data_ptr() for p in net.parameters()]
    session = Session(net, SGD(net.parameters(), lr=0.0), PLAIN)
    for item in batches(3):
        session.estimate(lambda batch: mse(net, batch), item)
        session.update()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert [p.data_ptr() for p in net.parameters()] == addresses


def test_a_forward_gradient_names_what_it_does_not_reach() -> None:
    net = Reader("scripted")
    session = Session(net, SGD(net.parameters(), lr=1e-3), PLAIN.override(estimator="forward_gradient"))
    with pytest.raises(ValueError, match=r"first\.weight"):
        session.estimate(lambda batch: mse(net, batch), batches(1)[0])


def test_many_leaves_behind_are_found_in_few_forwards() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    forwards: list[int] = []

    def forward(batch: Any) -> Tensor:
        forwards.append(1)
        return outside(lambda: net[:50](batch[0])).sum() + net[50:](batch[0]).sum()

    behind = found(net, forward)
    assert {f"{i}.{kind}" for i in range(50) for kind in ("weight", "bias")} <= set(behind)
    assert len(forwards) < 80


def test_no_conclusion_from_a_loss_that_is_not_finite() -> None:
    net = mlp()
    assert found(net, lambda batch: net(batch[0]).sum() * float("nan")) == []


def test_errors_of_the_step_are_its_own() -> None:
    def broken(batch: Any) -> Any:
        raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens"):
        found(mlp(), broken)


def test_a_table_that_renormalises_its_rows_is_left_as_it_is() -> None:
    table = nn.Embedding(5, 3, max_norm=0.1)
    before = table.weight.detach().clone()
    assert found(table, lambda batch: table(torch.tensor([0, 1])).sum()) == []
    assert torch.equal(table.weight, before)


# ---- gradients inside the step -----------------------------------------------------------------------------------------


class Inner(nn.Module):
    """Steps of gradient descent inside the loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.net, self.table = kind, mlp(), nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.table(torch.arange(len(x)) % 4))  # type: ignore[no-any-return]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        weights = dict(self.named_parameters())
        with torch.enable_grad():
            inner = F.mse_loss(self(x), y)
            if self.kind == "backward":
                inner.backward(inputs=list(weights.values()))
                grads = [p.grad.clone() for p in weights.values()]
                for p in weights.values():
                    p.grad = None
            else:
                grads = torch.autograd.grad(inner, list(weights.values()), create_graph=self.kind == "second order")
            moved = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), grads, strict=True)}
            if self.kind == "penalty":
                return F.mse_loss(self(x), y) + sum(g.square().sum() for g in grads)
            return F.mse_loss(torch.func.functional_call(self, moved, (x,)), y)


@pytest.mark.parametrize("name", ["spsa", "default"])
@pytest.mark.parametrize("kind", ["first order", "second order", "backward", "penalty"])
def test_gradients_inside_the_step(kind: str, name: str) -> None:
    net = Inner(kind)
    config = (PLAIN if name == "spsa" else recipe("default")).override(select="all", eps=1e-3, seed=7)
    session = Session(net, SGD(net.parameters(), lr=1e-3), config)
    item = batches(1, size=4)[0]
    zs = directions(net, Key(7, 0), Rademacher())
    with torch.no_grad():
        g = projected_gradient(net, lambda twin: twin.loss(item), zs, 1e-3)
    session.estimate(net.loss, item)
    record = session.update()
    assert record.raw[0] == pytest.approx(g, rel=1e-2, abs=1e-3)
    assert not record.unread


def test_gradients_without_a_graph_name_the_cure() -> None:
    net = mlp()

    def loss(batch: Any) -> Tensor:
        return sum(g.sum() for g in torch.autograd.grad(mse(net, batch), list(net.parameters())))  # type: ignore[return-value]

    with pytest.raises(RuntimeError, match="enable_grad"):
        fit(Task(net, lambda _, batch: loss(batch)), batches(1), PLAIN)
