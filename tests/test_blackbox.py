"""Black boxes as modules: their gradients, queries and failures; certificates; the README's engine."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import requests
import torch
import torch.nn.functional as F
from services import Service, serving
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zolightning.blackbox
from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.box import BlackBox, BudgetError, Served
from zolightning.blackbox.certify import certify
from zolightning.blackbox.engine import EngineError, EngineModel
from zolightning.objectives.transport import AnswerError, CommandTransport, HttpTransport


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3)).requires_grad_(False)


def gradients(box: BlackBox, model: nn.Module, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for function in (box, model):
        leaf = z.clone().requires_grad_()
        F.cross_entropy(function(leaf), labels).backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found[0], found[1]


@pytest.mark.parametrize(("estimator", "queries", "cosine"), [("groups", 12, 0.99), ("cge", None, 0.99), ("rge", 1800, 0.99)])
def test_gradients_are_autograds(estimator: Any, queries: int | None, cosine: float) -> None:
    model, z, labels = net(), torch.randn(8, 12), torch.arange(8) % 3
    box = BlackBox(model, queries, estimator, mu=1e-3)
    ours, exact = gradients(box, model, z, labels)
    assert F.cosine_similarity(ours.flatten(), exact.flatten(), 0) >= cosine
    assert 0.97 < ours.norm() / exact.norm() < 1.04  # no scale is lost
    assert box.queries == 8 * ((queries or 12) + 1)


@pytest.mark.parametrize("estimator", ["groups", "rge"])
def test_few_queries_are_right_on_average(estimator: Any) -> None:
    model, z, labels = net(), torch.randn(4, 12), torch.arange(4) % 3
    box = BlackBox(model, 3, estimator, mu=1e-3)
    pairs = [gradients(box, model, z, labels) for _ in range(600)]
    mean, exact = torch.stack([a for a, _ in pairs]).mean(0), pairs[0][1]
    assert F.cosine_similarity(mean.flatten(), exact.flatten(), 0) > 0.98
    assert 0.9 < mean.norm() / exact.norm() < 1.1
    assert not torch.equal(pairs[0][0], pairs[1][0])


def test_estimates_repeat_and_go_on_after_a_restart() -> None:
    model, z, labels = net(), torch.randn(4, 12), torch.arange(4) % 3
    one, two = BlackBox(model, 3, batch_size=5), BlackBox(model, 3)
    first, second = (gradients(one, model, z, labels)[0] for _ in range(2))
    torch.testing.assert_close(gradients(two, model, z, labels)[0], first)
    resumed = BlackBox(model, 3)
    resumed.load_state_dict(two.state_dict())
    assert resumed.queries == two.queries
    torch.testing.assert_close(gradients(resumed, model, z, labels)[0], second)


def test_queries_are_counted_batched_remembered_and_limited() -> None:
    sizes: list[int] = []

    def predict(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows[:, :2] * 2

    box = BlackBox(predict, batch_size=4, cache_size=100, budget=12)
    rows = torch.arange(40.0).view(10, 4)
    assert torch.equal(box(rows), rows[:, :2] * 2)
    assert sizes == [4, 4, 2]
    assert torch.equal(box(rows.flip(0)), rows.flip(0)[:, :2] * 2)
    assert torch.equal(box(torch.cat((rows[:2], -rows[:1], -rows[:1]))), torch.cat((rows[:2], -rows[:1], -rows[:1]))[:, :2] * 2)
    assert sizes == [4, 4, 2, 1]
    assert box.queries == 11
    with pytest.raises(BudgetError, match="11 of 12 queries are used, and the next 2 would be too many"):
        box(rows[:2] + 100)
    assert box.queries == sum(sizes) == 11


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows[:-1, :2], r"scores \(4, k\), got \(3, 2\)"),
        (lambda rows: rows[:, 0], r"scores \(4, k\), got \(4,\)"),
        (lambda rows: rows[:, :2] / 0, "not finite"),
        (lambda rows: rows.sum(), r"got \(\)"),
        (lambda rows: rows.tolist(), "got .'list'"),
    ],
)
def test_wrong_answers_are_refused(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        BlackBox(answer)(torch.randn(4, 3))


def test_what_was_answered_before_a_failure_is_not_sent_again() -> None:
    sent: list[int] = []

    def fails_once(rows: Tensor) -> Tensor:
        sent.append(len(rows))
        if len(sent) == 2:
            raise AnswerError("down")
        return rows[:, :2]

    box, rows = BlackBox(fails_once, batch_size=3, cache_size=10), torch.randn(8, 4)
    with pytest.raises(AnswerError, match="down"):
        box(rows)
    assert torch.equal(box(rows), rows[:, :2])
    assert sent == [3, 3, 3, 2]
    assert box.queries == 8


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"queries": 0}, r"`BlackBox\(queries=...\)` must be >= 1, got 0"),
        ({"mu": 0.0}, r"`BlackBox\(mu=...\)` must be a finite number > 0"),
        ({"estimator": "spsa"}, "allowed: 'rge', 'groups', 'cge'"),
        ({"budget": -1}, "must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            BlackBox(net(), **settings)  # type: ignore[arg-type]
    box = BlackBox(net(), 5, "cge")
    with pytest.raises(ValueError, match="takes one query a coordinate, 12, got 5"):
        box(torch.randn(2, 12, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match="the batch holds no examples"):
        box(torch.zeros(0, 12))


class Front(ZOMixin, pl.LightningModule):
    """A trained layer before a model that only answers."""

    def __init__(self, box: BlackBox) -> None:
        super().__init__()
        self.front, self.box = nn.Linear(12, 12), box

    def zo_objective(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.box(self.front(x)), y, reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


@pytest.mark.parametrize("strategy", ["auto", "zo"])
def test_it_trains_what_stands_before_it(strategy: str) -> None:
    x = torch.randn(16, 12)
    batch = (x, x[:, :3].argmax(1))
    module = Front(BlackBox(net(), 4))
    before = module.zo_objective(batch).mean()
    asked = module.box.queries
    trainer = pl.Trainer(
        strategy=ZOStrategy("spsa", lr=0.02) if strategy == "zo" else "auto", max_steps=25, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * 25, None))
    assert module.zo_objective(batch).mean() < 0.9 * before
    if strategy == "auto":
        assert module.box.queries == asked + 16 + 25 * 16 * (1 + 4)


def doubled(asked: Any) -> Any:
    return {"answers": [[2 * v for v in row] for row in asked["items"]]}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(doubled) as found:
        yield found


@pytest.mark.integration
def test_a_server_is_asked_again_when_it_refuses_and_counts_as_we_do(service: Service) -> None:
    box = BlackBox(Served(HttpTransport(service.url, retries=1)))
    rows = torch.randn(5, 3)
    torch.testing.assert_close(box(rows), 2 * rows)
    assert service.items == box.queries == 5
    service.failures = 1
    torch.testing.assert_close(box(rows), 2 * rows)
    service.reply = lambda _: {"answers": [[1.0]] * 3}
    with pytest.raises(AnswerError, match="must answer with 5 answers"):
        box(rows)
    service.reply = lambda _: {"answers": [[1.0, 2.0, 3.0], [1.0]] + [[0.0] * 3] * 3}
    with pytest.raises(AnswerError, match="lists of one shape"):
        box(rows)
    assert box.queries == 10  # those that were not answered are not counted
    with pytest.raises(AnswerError, match="failed, 0 retries included"):
        BlackBox(Served(HttpTransport("http://127.0.0.1:9/", retries=0)))(rows)


FAULTS: dict[str, tuple[Callable[[Service], Any], str]] = {
    "refuses": (lambda service: vars(service).update(failures=1, status=403), "failed, 0 retries included: 403"),
    "breaks": (lambda service: vars(service).update(failures=1), "failed, 0 retries included: 503"),
    "is slow": (lambda service: vars(service).update(slow=1.5), "failed, 0 retries included.*timed out"),
    "says nothing": (lambda service: vars(service).update(raw=b""), "something that is not JSON"),
    "answers fewer": (lambda service: vars(service).update(reply=lambda _: [[1.0, 2.0]]), "must answer with 3 answers"),
    "answers wider": (lambda service: vars(service).update(reply=lambda _: [[1.0]] * 3), r"scores \(3, 2\), got \(3, 1\)"),
    "answers words": (lambda service: vars(service).update(reply=lambda _: ["a"] * 3), "expected numbers"),
    "answers NaN": (lambda service: vars(service).update(reply=lambda _: [[1.0, math.nan]] * 3), "not finite"),
}


@pytest.mark.integration
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_costs_no_query_twice(service: Service, fault: str) -> None:
    """Three rows are answered, then the server fails; when it is mended, they are not sent again."""
    broken, message = FAULTS[fault]
    transport, sent = HttpTransport(service.url, retries=0), list[int]()
    served = Served(transport)

    def predict(rows: Tensor) -> Tensor:
        sent.append(len(rows))
        if len(sent) == 2:
            broken(service)
            transport.timeout = 0.2 if service.slow else 60
        return served(rows)

    box, rows = BlackBox(predict, batch_size=3, cache_size=100), torch.randn(8, 2)
    with pytest.raises(AnswerError, match=message):
        box(rows)
    vars(service).update(failures=0, slow=0.0, raw=None, reply=doubled)
    transport.timeout = 60
    torch.testing.assert_close(box(rows), 2 * rows)
    assert sent == [3, 3, 3, 2]


@pytest.mark.integration
def test_a_program_is_asked_too() -> None:
    code = "import json, sys\nfor line in sys.stdin: print([2 * v for v in json.loads(line)], flush=True)"
    transport = CommandTransport([sys.executable, "-c", code])
    rows = torch.randn(5, 3)
    torch.testing.assert_close(BlackBox(Served(transport))(rows), 2 * rows)
    transport.close()


def product(asked: Any) -> Any:
    return {"outputs": (torch.tensor(asked["x"]) @ torch.tensor(asked["numbers"]["w"])).tolist()}


def served_model(service: Service) -> EngineModel:
    """The README's engine."""
    text = Path(zolightning.blackbox.__file__).with_name("README.md").read_text()
    names: dict[str, Any] = {}
    exec(re.search(r"<!-- engine -->\n```python\n(.*?)```", text, re.DOTALL)[1], names)  # type: ignore[index]
    return EngineModel(names["Server"](service.url, {"w": torch.zeros(12, 3)}))


class Task(ZOMixin, pl.LightningModule):
    """Classifies by what an engine answers."""

    def __init__(self, model: EngineModel) -> None:
        super().__init__()
        self.model = model

    def zo_objective(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch), batch["labels"], reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def fit(self, batch: Any, steps: int) -> None:
        trainer = pl.Trainer(
            strategy=ZOStrategy("spsa", seed=1), max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(self, DataLoader([batch] * steps, None))


@pytest.mark.integration
def test_the_engine_of_the_readme_trains(service: Service) -> None:
    service.reply = product
    model = served_model(service)
    x = torch.randn(16, 12)
    batch = {"x": x, "labels": x[:, :3].argmax(1)}
    Task(model).fit(batch, 20)
    assert F.cross_entropy(model(batch), batch["labels"]) < 1.0  # it began at log 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"failures": 1}, requests.HTTPError),
        ({"raw": b""}, requests.JSONDecodeError),
        ({"reply": lambda _: {"outputs": [[1.0, 2.0, 3.0]]}}, EngineError),
        ({"reply": lambda _: {"outputs": [[math.nan] * 3] * 16}}, None),
    ],
)
def test_an_engine_that_fails_in_a_probe_leaves_the_step_before(service: Service, fault: Any, error: Any) -> None:
    """No number stays where a probe has moved it, and NaN is no step."""
    x = torch.randn(16, 12)
    batch = {"x": x, "labels": x[:, :3].argmax(1)}
    service.reply = product
    whole, two, model = (served_model(service) for _ in range(3))
    Task(two).fit(batch, 2)
    service.asked = 0
    Task(whole).fit(batch, 3)
    before_last = service.asked - 1

    def reply(asked: Any) -> Any:
        if service.asked == before_last:  # the next question is the second probe of the third step
            vars(service).update(fault)
        return product(asked)

    vars(service).update(asked=0, reply=reply)
    with pytest.raises(error) if error else nullcontext():
        Task(model).fit(batch, 3)
    assert service.asked == before_last + 1
    assert torch.equal(model.numbers["w"], two.numbers["w"])
    assert not torch.equal(model.numbers["w"], whole.numbers["w"])


def test_certificates_of_a_linear_classifier_are_its_own_radii(tmp_path: Path) -> None:
    """Smoothed or not, its class changes at the distance of the plane; samples can prove a little less."""
    w, sigma = torch.tensor([3.0, -4.0]), 0.5

    def model(x: Tensor) -> Tensor:
        margin = x @ w / 5
        return torch.stack((-margin, margin), 1)

    x = torch.randn(40, 2)
    own = (x @ w / 5).abs()
    labels = (x @ w > 0).long()
    labels[0] = 1 - labels[0]
    found = certify(model, [(x, labels)], sigma, samples=2000)
    sure = found.classes >= 0
    assert (found.radii <= own).all()
    clear = (own > 0.1) & (own < 2.2 * sigma)
    assert sure[clear].all() and (found.radii[clear] > own[clear] - 0.15).all()
    assert torch.equal(found.classes[sure][1:], labels[sure][1:])
    exact = [float(((own >= r) & (torch.arange(40) > 0)).double().mean()) for r in (0.0, 0.25, 0.5)]
    assert all(a - 0.15 <= found.accuracy(r) <= a for a, r in zip(exact, (0.0, 0.25, 0.5), strict=True))
    found.picture(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_certify_refuses_what_it_cannot_certify() -> None:
    data = [(torch.randn(2, 2), torch.tensor([0, 1]))]
    for settings in ({"sigma": 0.0}, {"sigma": 0.5, "alpha": 1.0}, {"sigma": 0.5, "samples": 0}):
        with pytest.raises(ValueError, match="is out of range"):
            certify(lambda x: x, data, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no examples"):
        certify(lambda x: x, [], 0.5)
    with pytest.raises(ValueError, match="must give scores"):
        certify(lambda x: x[:, 0], data, 0.5)
