"""A federation: clients that send coefficients, a server that has no model, and what it refuses."""

from __future__ import annotations

import ast
import copy
import math
import random
import sqlite3
import subprocess
import sys
import tomllib
import warnings
from contextlib import closing
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import EXACT, client, federation, go, marks
from helpers import PLAIN, PerExampleTask, Task, batches, loader, mlp, mse, per_example_mse
from mlflow import MlflowClient
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import Session, ZOConfig, ZOMixin, ZOStrategy
from zolightning.commands.federated import Federated
from zolightning.federated import Client, Refused, Reply, Round, RoundLog, Rules, Server, simulate
from zolightning.federated import Task as Work
from zolightning.federated.client import federated
from zolightning.federated.joining import Share, union
from zolightning.federated.messages import START
from zolightning.federated.opening import Opening
from zolightning.ledger import LedgerError, fingerprint, read, replay
from zolightning.ledger.format import Header, Step, opening
from zolightning.methods.private import PrivateSPSA, noise_for, spent
from zolightning.methods.surrogate import Surrogate
from zolightning.types import Key, Term

# one process on the union


@pytest.mark.parametrize(("normalize", "optimizer"), [(True, "adam"), (False, "module"), ("std", "module")])
def test_clients_with_shared_keys_are_one_process_with_their_batches(normalize: Any, optimizer: str) -> None:
    config = replace(EXACT, normalize=normalize, optimizer=optimizer)
    server, clients = federation(config=config)
    net = PerExampleTask(mlp(), per_example_mse)
    session = Session(net, net.configure_optimizers(), config)
    for number in range(7):
        go(server, clients)
        for shard in range(3):
            session.estimate(net.zo_objective, batches(6, seed=shard)[number % 6])
        session.update()
    assert marks(server, clients) == {fingerprint(net.named_parameters())}


def test_clients_with_own_keys_are_one_process_on_the_union() -> None:
    config = replace(EXACT, estimator="per_example", num_queries=1, structure="auto")
    server, clients = federation(rules=Rules(keys="own"), config=config)
    net = PerExampleTask(mlp(), per_example_mse)
    session = Session(net, net.configure_optimizers(), config)
    for number in range(12):
        go(server, clients)
        parts = [batches(6, seed=shard)[number % 6] for shard in range(3)]
        dealt: list[Tensor] = [torch.stack(side, 1).flatten(0, 1) for side in zip(*parts, strict=True)]
        session.estimate(net.zo_objective, tuple(dealt))
        session.update()
    assert marks(server, clients) == {fingerprint(net.named_parameters())}


def test_local_steps_average_the_moves_of_clients() -> None:
    config = replace(PLAIN, num_queries=2)
    server, clients = federation(rules=Rules(local_steps=4), config=config)
    ends = []
    for shard in range(3):
        net = PerExampleTask(mlp(), per_example_mse)
        session = Session(net, net.configure_optimizers(), config)
        for number in range(4):
            session.estimate(net.zo_objective, batches(6, seed=shard)[number])
            session.update()
        ends.append(nn.utils.parameters_to_vector(net.parameters()))
    assert go(server, clients).step == 4
    assert len(marks(server, clients)) == 1
    found = nn.utils.parameters_to_vector(clients["c0"].module.parameters())
    torch.testing.assert_close(found, torch.stack(ends).mean(0), rtol=1e-6, atol=1e-7)
    assert not torch.equal(ends[0], ends[1])


def test_clients_count_by_their_examples() -> None:
    def share(slot: int, examples: int, *values: float) -> Share:
        terms = tuple(Term(Key(1, 0, i), value) for i, value in enumerate(values))
        return Share(slot, examples, Step(0, 0, terms, (), float(slot)))

    shares = [share(1, 3, 4.0, 8.0), share(0, 1, 0.0, 4.0)]  # as they came
    assert [c for _, c in union(shares, 2, Rules()).terms] == [3.0, 7.0]
    assert union(shares, 2, Rules()).loss == 0.75
    own = union(shares, 2, Rules(keys="own")).terms
    assert [key.query for key, _ in own] == [0, 1, 2, 3]
    assert [c for _, c in own] == [0.0, 6.0, 2.0, 12.0]  # 1/2 and 3/2 of each, in a mean over four
    moves = union(shares, 2, Rules(keys="own", local_steps=2)).terms
    assert [c for _, c in moves] == [0.0, 3.0, 1.0, 6.0]


def test_a_strange_client_moves_the_median_little() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 1e5]
    shares = [Share(i, 1, Step(0, 0, (Term(Key(1, 0), value),), (), 0.0)) for i, value in enumerate(values)]
    assert union(shares, 5, Rules(average="median")).terms[0].coefficient == 3.0
    assert union(shares, 5, Rules(average="trimmed", trim=0.2)).terms[0].coefficient == 3.0
    assert union(shares, 5, Rules()).terms[0].coefficient > 1e4
    with pytest.raises(ValueError, match="needs keys='shared'"):
        Rules(average="median", keys="own")


def test_the_default_recipe_trains_in_a_federation() -> None:
    net = PerExampleTask(mlp(), per_example_mse, lambda parameters: SGD(parameters, lr=1e-3))
    shards = [[(x, y * 0) for x, y in batches(2, seed=i)] for i in range(2)]

    def loss(module: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(per_example_mse(net.net, batch).mean()) for shard in shards for batch in shard)

    before = loss(net)
    done = simulate(net, shards, rounds=20, keys="own")
    assert not any(each.refused for each in done.rounds)
    assert loss(net) < before


class Encoding(PerExampleTask):
    """A frozen encoder in front of the trained layers, whose output all probes share."""

    def __init__(self, prepares: bool) -> None:
        super().__init__(mlp(), per_example_mse, lambda parameters: SGD([p for p in parameters if p.requires_grad], lr=1e-2))
        self.encoder = nn.Linear(4, 4).requires_grad_(False)
        nn.init.eye_(self.encoder.weight)
        self.prepares, self.encoded = prepares, 0

    def zo_prepare(self, batch: Any) -> Any:
        self.encoded += 1
        return (self.encoder(batch[0]), batch[1], True) if self.prepares else None

    def zo_objective(self, batch: Any) -> Any:
        x, y, *encoded = batch
        return self.loss(self.net, (x if encoded else self.encoder(x), y))


def test_clients_prepare_a_batch_once_a_step_and_share_frozen_weights() -> None:
    found = []
    for prepares in (True, False):
        done = simulate(net := Encoding(prepares), [batches(3, seed=i) for i in range(2)], EXACT, rounds=4)
        assert not any(each.refused for each in done.rounds)
        found.append(fingerprint(net.named_parameters()))
        other: Any = done.clients["client-0001"].module
        assert other.encoder.weight is net.encoder.weight
        assert other.net[0].weight is not net.net[0].weight
        assert net.encoded == 4  # a call a step; the look for the weights that it reads leaves no trace
    assert found[0] == found[1]


@pytest.mark.parametrize("given", ["two lists", "mapping"])
def test_schedulers_of_the_module_are_refused_by_name(given: str) -> None:
    net = PerExampleTask(mlp(), per_example_mse)
    optimizer = SGD(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    made: Any = ([optimizer], [scheduler]) if given == "two lists" else {"optimizer": optimizer, "lr_scheduler": scheduler}
    net.configure_optimizers = lambda: made  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"gives a learning rate scheduler, .* give `schedule=...`"):
        simulate(net, [batches(2)], EXACT, rounds=1)
    net.configure_optimizers = lambda: [optimizer, optimizer]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must give one optimizer"):
        simulate(net, [batches(2)], EXACT, rounds=1)


# coming and going


def test_departures_late_joiners_and_returns_end_at_the_same_bits() -> None:
    """1,000 rounds in which each client is there half of the time; one begins anew, one joins late."""
    draw = random.Random(3)
    server, clients = federation(3, Rules(participation=0.7), replace(EXACT, num_queries=1))
    for number in range(1000):
        if number == 400:  # it has lost everything
            clients["c1"] = client(batches(6, seed=1), replace(EXACT, num_queries=1))
            server.lost("c1", "restarted")
        if number == 700:
            clients["late"] = client(batches(6, seed=9), replace(EXACT, num_queries=1))
            server.welcome("late", clients["late"].opening.pack())
        present = [name for name in clients if draw.random() < 0.5]
        if names := server.choose(present):
            done = go(server, clients, names)
            assert not done.refused
    assert server.step > 800
    assert len(marks(server, clients)) == 1


def test_a_client_that_fails_leaves_the_round_and_comes_back() -> None:
    server, clients = federation()
    first = clients["c0"].work
    clients["c0"].work = lambda task: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    done = go(server, clients)
    assert done.joined == ("c1", "c2")
    assert "ZeroDivisionError" in done.refused["c0"]
    clients["c0"].work = first  # type: ignore[method-assign]
    assert go(server, clients).joined == ("c0", "c1", "c2")
    assert len(marks(server, clients)) == 1


def test_nobody_moves_without_enough_replies() -> None:
    server, clients = federation(rules=Rules(fewest=3))
    server.begin(sorted(clients))
    done = server.close()
    assert done.refused == dict.fromkeys(clients, "no reply")
    assert done.step == 0
    assert "3 are needed" in done.skipped
    assert math.isnan(done.loss)
    assert go(server, clients).step == 1


def test_a_server_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole, others = federation()
    path = tmp_path / "federation.zo"
    server, clients = federation(path=path)
    for _ in range(7):
        go(whole, others)
        go(server, clients)
    server.begin(sorted(clients))  # it dies with a round open, and while it writes
    assert server._writer is not None
    server.end()
    path.write_bytes(path.read_bytes() + b"\x30\0\0\0\4torn")
    again = Server(path=path)
    for name, each in clients.items():
        again.welcome(name, each.opening.pack(), each.head)
    done = [go(again, clients) for _ in range(5)]
    for _ in range(5):
        go(whole, others)
    assert [each.number for each in done] == [7, 8, 9, 10, 11]
    assert marks(again, clients) == marks(whole, others)
    again.end()


@pytest.mark.integration
def test_a_server_that_gets_a_sigkill_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "federation.zo"
    script = (
        "import os, sys; from pathlib import Path; from federation import federation, go\n"
        "server, clients = federation(path=Path(sys.argv[1]))\n"
        "for _ in range(4): go(server, clients)\n"
        "server.begin(sorted(clients)); os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == -9
    whole, others = federation()
    for _ in range(6):
        go(whole, others)
    again, (_, clients) = Server(path=path), federation()
    for name, each in clients.items():
        each._batches = cycle(batches(6, seed=int(name[1:])))
        each._held = [next(each._batches) for _ in range(5)][4:]  # where the loaders of the others stand
        again.welcome(name, each.opening.pack())
    assert again.step == again.rounds == 4
    for _ in range(2):
        go(again, clients)
    assert marks(again, clients) == marks(whole, others)
    again.end()


def test_a_server_refuses_a_file_that_is_no_federations(tmp_path: Path) -> None:
    path = tmp_path / "ledger.zo"
    for data, match in (
        (b"hello", "is not a replay ledger"),
        (opening(Header(1, 0, "0" * 32, {}, (), "cpu", {}, {}, None)), "no"),
    ):
        path.write_bytes(data)
        with pytest.raises(LedgerError, match=match):
            Server(path=path)
        assert path.read_bytes() == data
    path.unlink()
    server = Server(path=path)  # the right to write was given back
    server.end()


def test_the_ledger_is_a_replay_ledger(tmp_path: Path) -> None:
    net = Task(mlp())
    base = copy.deepcopy(net)
    shards = [loader(batches(4, seed=i)) for i in range(2)]
    done = simulate(net, shards, ZOStrategy("mezo", lr=1e-2, select="all"), rounds=9, local_steps=2, ledger=tmp_path / "f.zo")
    assert [each.step for each in done.rounds] == list(range(2, 20, 2))
    ledger = read(tmp_path / "f.zo")
    replay(ledger, dict(base.named_parameters()))
    assert fingerprint(base.named_parameters()) == fingerprint(net.named_parameters())


def test_simulated_clients_learn(tmp_path: Path) -> None:
    net = PerExampleTask(mlp(), per_example_mse, lambda parameters: SGD(parameters, lr=3e-3))
    x, y = batches(1, size=40)[0]
    whole = (x, y * 0)

    def evaluate(module: nn.Module) -> float:
        return float(per_example_mse(net.net, whole).mean().detach())

    before = evaluate(net)
    shards = [[(x[i : i + 10], y[i : i + 10] * 0)] for i in range(0, 40, 10)]
    for_rounds: list[int] = []
    done = simulate(
        net, shards, "mezo", rounds=30, queries=4, keys="own", evaluate=evaluate, every=15,
        on_round=lambda each, values: for_rounds.append(each.number),
    )  # fmt: skip
    assert list(done.values) == [14, 29]
    assert for_rounds == list(range(30))
    assert done.values[29] < before
    assert done.bytes_up == sum(each.bytes_up for each in done.rounds) > 30 * 4 * 4 * 8


def test_rounds_are_logged_for_the_dashboard(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'm.db'}"
    shards = [batches(4, seed=i) for i in range(2)]
    with RoundLog(store, name="both") as log:
        done = simulate(
            PerExampleTask(mlp(), per_example_mse), shards, EXACT, rounds=3, evaluate=lambda module: 0.5, every=2, on_round=log
        )
    client = MlflowClient(store)
    runs = {run.info.run_name: run for run in client.search_runs([e.experiment_id for e in client.search_experiments()])}
    assert set(runs) == {"both, server", "both, client-0000", "both, client-0001"}
    assert {run.data.tags["zo.federation"] for run in runs.values()} == {"both"}
    assert all("zo.recipe" in run.data.tags for run in runs.values())  # the dashboard's Health page looks for it
    roles = {name: run.data.params["role"] for name, run in runs.items()}
    assert roles == {"both, server": "server", "both, client-0000": "client", "both, client-0001": "client"}
    server = runs["both, server"].data.metrics
    assert server["zo/clients/bytes_up"] == done.bytes_up
    assert server["zo/clients/bytes_down"] == done.bytes_down
    assert server["zo/clients/joined"] == 2
    assert server["zo/clients/refused"] == 0
    assert server["val/accuracy"] == 0.5
    history = client.get_metric_history(runs["both, server"].info.run_id, "val/accuracy")
    assert [point.step for point in history] == [2, 3]
    each = [run.data.metrics["zo/clients/bytes_up"] for name, run in runs.items() if name != "both, server"]
    assert sum(each) == done.bytes_up
    assert all(run.info.status == "FINISHED" for run in runs.values())


def test_the_log_of_a_server_that_starts_again_goes_on(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'm.db'}"

    def done(number: int) -> Round:
        return Round(number, number + 1, 0.5, ("anna", "ben"), ("anna",), {"ben": "no reply"}, 300, 100, {"anna": 100})

    for start in (0, 0, 2):  # another federation, one that is killed, and the same again
        with RoundLog(store, name="it's") as log:
            for number in range(start, start + 2):
                log(done(number), {})
    client = MlflowClient(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 6
    assert sorted(run.data.metrics["zo/clients/bytes_up"] for run in runs) == [0, 0, 200, 200, 400, 400]
    servers = {r.info.run_id: r.data.metrics for r in runs if r.data.tags["zo.role"] == "server"}
    assert sorted(found["zo/clients/refused"] for found in servers.values()) == [2, 4]
    assert {r.data.tags["mlflow.parentRunId"] for r in runs if r.data.tags["zo.role"] == "client"} == set(servers)
    log = RoundLog(store)
    log(done(0), {})
    with closing(sqlite3.connect(tmp_path / "m.db")) as database:
        database.execute("ALTER TABLE metrics RENAME TO elsewhere")
    with pytest.warns(UserWarning, match="round 1 could not be logged"):
        log(done(1), {})
    with warnings.catch_warnings(action="error"):
        log(done(2), {})  # told once


# privacy


def linear_client(shard: list[Any], clip: float, noise: float) -> Client:
    config = ZOConfig(PrivateSPSA(1e-3, 2, clip=clip, noise=noise), select="all", structure="rank1", normalize=False, seed=7)
    return client(shard, config)


def test_private_coefficients_are_clipped_example_by_example_and_noisy() -> None:
    (x, y), *_ = shard = batches(1, size=6)

    def sent(clip: float, noise: float, part: list[Any]) -> list[float]:
        server, one = Server(Rules(check_every=10**9)), linear_client(part, clip, noise)
        server.welcome("c", one.opening.pack())
        server.receive("c", one.work(server.begin(["c"])["c"]).pack())
        (share,), _ = server._shares["c"]
        assert math.isnan(share.step.loss)  # it would tell of the data
        return [c for _, c in share.step.terms]

    whole = sent(1e9, 0.0, shard)
    alone = torch.tensor([sent(1e9, 0.0, [(x[i : i + 1], y[i : i + 1])]) for i in range(6)])
    torch.testing.assert_close(torch.tensor(whole), alone.mean(0), rtol=1e-3, atol=1e-4)
    clipped = alone * (0.5 / alone.norm(dim=1, keepdim=True)).clamp(max=1.0)
    assert (alone.norm(dim=1) > 0.5).any()
    torch.testing.assert_close(torch.tensor(sent(0.5, 0.0, shard)), clipped.mean(0), rtol=1e-3, atol=1e-4)
    noise = torch.tensor([sent(0.5, 100.0, shard) for _ in range(40)]).sub(clipped.mean(0)).flatten()
    assert 0.7 < noise.std().item() / (2 * 0.5 * 100 / 6) < 1.3  # 80 draws: four standard errors
    assert sent(0.5, 1.0, shard) != sent(0.5, 1.0, shard)


def test_the_accountant_knows_the_gaussian_mechanism() -> None:
    pytest.importorskip("dp_accounting", reason='pip install "zolightning[private]"')
    rho = 300 / (2 * 50.0**2)
    assert spent(50.0, 300) <= rho + 2 * math.sqrt(rho * math.log(1e5))  # zero-concentrated privacy's bound
    assert spent(50.0, 300) > rho
    assert spent(noise_for(2.0, 300), 300) == pytest.approx(2.0, rel=1e-2)
    assert spent(0.0, 1) == math.inf


def test_privacy_needs_a_loss_for_each_example() -> None:
    config = ZOConfig(PrivateSPSA(1e-3, clip=1.0, noise=1.0), select="all", structure="dense", normalize=False, seed=7)
    server, one = Server(), client(batches(2), config)
    server.welcome("c", one.opening.pack())
    with pytest.raises(ValueError, match="`PrivateSPSA` clips each example's part"):
        one.work(server.begin(["c"])["c"])
    with pytest.raises(ValueError, match="must be > 0 and >= 0"):
        PrivateSPSA(1e-3, clip=0.0, noise=1.0)


# the verb

TASK = Path(__file__).with_name("federated_task.py")


def test_the_verb_writes_a_flower_app(tmp_path: Path) -> None:
    Federated(TASK, tmp_path / "My App", rounds=3, local_steps=7, keys="own", ledger=tmp_path / "f.zo")()
    assert (tmp_path / "My App" / "task.py").read_text() == TASK.read_text()
    project = tomllib.loads((tmp_path / "My App" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app"
    assert project["tool"]["flwr"]["app"]["components"] == {"serverapp": "app:server", "clientapp": "app:client"}
    said = (tmp_path / "My App" / "app.py").read_text()
    tree = ast.parse(said)
    assert "local_steps=7" in said
    assert repr(str(tmp_path / "f.zo")) in said
    assert "FLWR_TELEMETRY_ENABLED=0" in (tmp_path / "My App" / "flower.env").read_text()
    assert f"log=RoundLog('sqlite:///{Path.cwd() / 'mlflow.db'}', name='my-app')" in said
    assert "watch=Watch(task.module, task.evaluate)" in said
    assert {name.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(name := node.func, ast.Name)} >= {
        "Rules", "client_app", "server_app"
    }  # fmt: skip
    with pytest.raises(FileExistsError):
        Federated(TASK, tmp_path / "My App")()
    (tmp_path / "t.py").write_text("module = batches = method = None")
    Federated(tmp_path / "t.py", tmp_path / "bare", store="none")()
    assert "log=None,\n    watch=None," in (tmp_path / "bare" / "app.py").read_text()


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("method = 'mezo'", {}, "must define module, batches"),
        ("def", {}, "is not Python"),
        (TASK.read_text(), {"rounds": 0}, "must be >= 1"),
        (TASK.read_text(), {"keys": "own", "average": "median"}, "needs keys='shared'"),
    ],
)
def test_the_verb_refuses_and_writes_nothing(tmp_path: Path, text: str, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "t.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        Federated(tmp_path / "t.py", tmp_path / "app", **settings)()
    assert not (tmp_path / "app").exists()


# few weights


def test_the_surrogates_gradient_is_that_of_its_mean() -> None:
    """Against central differences of scikit-learn's own prediction, and exact along as many directions as weights."""
    config = ZOConfig(Surrogate(0.1, 30, probes=4, candidates=10), select="all", normalize=False, lr=1e-2, seed=7)
    net = PerExampleTask(nn.Linear(4, 3), mse)
    session = Session(net, SGD(net.parameters(), lr=1e-2), federated(config))
    surrogate = session.estimator
    assert isinstance(surrogate, Surrogate)
    batch = batches(1)[0]
    surrogate.bind(session.subspace(net.zo_objective, batch).view.leaves)
    for _ in range(6):
        estimate = session.estimate(net.zo_objective, batch)
        session.update()
    assert estimate is not None
    assert estimate.forwards == 5
    assert len(surrogate._seen) == 30
    here, points = surrogate._seen[-5][0], torch.stack([x for x, _ in surrogate._seen])
    losses = np.array([value for _, value in surrogate._seen])
    kernel = Matern(surrogate.length, nu=2.5)
    process = GaussianProcessRegressor(kernel, alpha=surrogate.noise, optimizer=None)
    process.fit(points.numpy(), (losses - losses.mean()) / losses.std())
    sides = [process.predict((here + side * 1e-4 * torch.eye(15).double()).numpy()) for side in (1, -1)]
    expected = (sides[0] - sides[1]) / 2e-4 * losses.std()
    found = sum(
        c * torch.cat([leaf.gradient([Term(z, 1.0)]).flatten() for leaf in session.view().leaves]) for z, c in estimate.terms
    )
    np.testing.assert_allclose(np.asarray(found) / len(estimate.terms), expected, rtol=1e-3, atol=1e-4)


def test_the_surrogate_needs_few_losses_in_a_federation() -> None:
    target = torch.linspace(-1, 1, 12).double()

    class Bowl(ZOMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(12).double())

        def zo_objective(self, batch: Tensor) -> Tensor:
            return (self.x - target - batch[0]).square().mean()

    module = Bowl()
    shards = [[torch.tensor([shift]).double()] for shift in (-0.2, 0.2)]
    config = ZOConfig(Surrogate(0.05, 12, probes=3, candidates=12), select="all", structure="dense", normalize=False, lr=1.0)
    before = float((module.x - target).square().mean())
    done = simulate(module, shards, config, rounds=8, local_steps=3)
    assert not any(each.refused for each in done.rounds)
    assert float((module.x - target).square().mean()) < 0.05 * before
    config = replace(config, estimator=Surrogate(0.05, 12, probes=3, candidates=12, correction=0.5))
    corrected = simulate(Bowl(), shards, config, rounds=8, local_steps=3)
    shifts = [each._surrogate._shift for each in corrected.clients.values() if each._surrogate is not None]
    assert shifts[0] is not None
    assert shifts[1] is not None  # two clients, on either side of their mean but for directions that depend on each other
    torch.testing.assert_close(shifts[0], -shifts[1], rtol=0.1, atol=5e-3)
    assert shifts[0].norm() > 0.05
    with pytest.raises(ValueError, match="1 <= probes <= candidates"):
        Surrogate(0.1, 4, probes=5)
    with pytest.raises(ValueError, match="call bind"):
        Surrogate(0.1, 50).tell(Key(0, 0), [])


# refusals


def reply_of(server: Server, clients: dict[str, Client], name: str = "c0") -> Reply:
    return clients[name].work(server.begin(sorted(clients))[name])


def altered(reply: Reply, server: Server, **changes: Any) -> bytes:
    """The reply with another step in it, and the right checksum."""
    step = Step(server.step, 0, tuple(Term(Key(7, server.step, i), 0.5) for i in range(2)), (), 0.5)
    return Reply.of(reply.examples, [replace(step, **changes)], server.head, 7).pack()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"terms": (Term(Key(7, 0, 0), math.nan),)}, "non-finite"),
        ({"terms": (Term(Key(7, 0, 0), math.inf),)}, "non-finite"),
        ({"loss": math.inf}, "non-finite"),
        ({"terms": (Term(Key(7, 0, 0), 1e30),)}, "huge"),
        ({"terms": tuple(Term(Key(7, 0, i), 1.0) for i in range(100))}, "huge"),
        ({"terms": (Term(Key(7, 0, 5), 1.0),)}, "foreign keys"),
        ({"terms": (Term(Key(8, 0, 0), 1.0),)}, "foreign keys"),
        ({"step": 3}, "forged"),
        ({"lrs": (1.0,)}, "forged"),
    ],
)
def test_a_bad_step_is_refused_by_name(changes: dict[str, Any], kind: str) -> None:
    server, clients = federation(2, Rules(most_terms=64, check_every=10**9))
    server._checked = 0
    reply = reply_of(server, clients)
    with pytest.raises(Refused, match=f"^{kind}: "):
        server.receive("c0", altered(reply, server, **changes))
    assert server.refusals == {"c0": {kind: 1}}
    server.receive("c1", altered(reply, server))
    done = server.close()
    assert done.joined == ("c1",)
    assert done.refused["c0"].startswith(kind)


def test_forged_bytes_and_replayed_records_are_refused() -> None:
    server, clients = federation()
    old = reply_of(server, clients).pack()
    for place in (7, len(old) // 2, len(old) - 1):
        forged = bytearray(old)
        forged[place] ^= 1
        with pytest.raises(Refused, match=r"^forged: its checksum"):
            server.receive("c0", bytes(forged))
    with pytest.raises(Refused, match=r"^damaged: "):
        server.receive("c0", b"")
    server.receive("c0", old)
    with pytest.raises(Refused, match=r"^uninvited: "):
        server.receive("c0", old)
    with pytest.raises(Refused, match=r"^uninvited: "):
        server.receive("stranger", old)
    server.close()
    server.begin(sorted(clients))
    with pytest.raises(Refused, match=r"^replayed: its records continue an older state"):
        server.receive("c0", old)
    assert server.refusals["c0"] == {"forged": 3, "damaged": 1, "uninvited": 1, "replayed": 1}


@pytest.mark.parametrize("examples", [0, 11])
def test_a_claim_of_too_many_examples_is_refused(examples: int) -> None:
    server, clients = federation(rules=Rules(most_examples=10))
    reply = reply_of(server, clients)
    with pytest.raises(Refused, match=r"^examples: it claims"):
        server.receive("c0", reply._replace(examples=examples).pack())


def test_another_model_method_or_version_is_refused() -> None:
    server, clients = federation()
    opening = clients["c0"].opening

    def refused(data: bytes, match: str) -> None:
        with pytest.raises(Refused, match=match):
            server.welcome("x", data)

    refused(client(batches(2), net=mlp(hidden=9)).opening.pack(), r"^another model: 'net.0.weight' is float32 \[9, 4\], and")
    other = mlp()
    nn.init.zeros_(other[0].bias)
    refused(client(batches(2), net=other).opening.pack(), "^another model: its weights have the fingerprint")
    refused(client(batches(2), replace(EXACT, num_queries=3)).opening.pack(), "^another method: its num_queries is 3, and 2")
    refused(client(batches(2), replace(EXACT, optimizer="adam")).opening.pack(), "^another method: its optimizer is 'adam'")
    versions = {**opening.header.versions, "zolightning": "0.0.1"}
    foreign = Opening(replace(opening.header, versions=versions), opening.method, opening.options)
    refused(foreign.pack(), "^foreign version: it runs zolightning 0.0.1, the federation")
    refused(opening.pack()[:7] + b"\x01" + opening.pack()[8:], "^foreign version: it writes ledgers of version 1, not")
    refused(opening.pack()[:-1], "^damaged: ")
    refused(b"hello", "^damaged: ")
    assert server.refusals["x"] == {"another model": 2, "another method": 2, "foreign version": 2, "damaged": 2}


def test_a_client_whose_weights_have_come_apart_is_found() -> None:
    server, clients = federation(rules=Rules(check_every=2))
    assert not go(server, clients).refused
    assert not go(server, clients).refused
    with torch.no_grad():
        next(clients["c2"].module.parameters()).add_(1.0)
    done = go(server, clients)
    assert done.refused["c2"].startswith("apart: its weights have the fingerprint")
    assert done.joined == ("c0", "c1")
    assert server.choose(sorted(clients)) == ["c0", "c1"]
    clients["c2"] = client(batches(6, seed=2))
    server.welcome("c2", clients["c2"].opening.pack())
    assert server.choose(sorted(clients)) == ["c0", "c1", "c2"]
    assert not go(server, clients).refused
    assert len(marks(server, clients)) == 1


def test_of_two_clients_that_have_come_apart_none_is_believed() -> None:
    server, clients = federation(2, Rules(check_every=2))
    assert not go(server, clients).refused
    assert not go(server, clients).refused
    with torch.no_grad():
        next(clients["c0"].module.parameters()).add_(1.0)
    before = server.head
    done = go(server, clients)
    assert set(done.refused) == {"c0", "c1"}
    assert all("as many others have" in reason for reason in done.refused.values())
    assert server.head == before  # no step, and no fingerprint that a replay would not find
    server.welcome("c1", clients["c1"].opening.pack())
    assert go(server, clients, ["c1"]).joined == ("c1",)
    assert len(marks(server, {"c1": clients["c1"]})) == 1


def test_a_client_refuses_a_server_that_it_does_not_fit() -> None:
    server, clients = federation()
    other, others = federation(config=replace(EXACT, num_queries=3))
    go(server, clients)
    go(other, others)
    before = clients["c0"].fingerprint()
    with pytest.raises(LedgerError, match="from where the server's records do not go on"):
        clients["c0"].catch_up(other.since(START), START)
    task: Work = server.begin(["c0"])["c0"]
    changed = task.records[:9] + bytes([task.records[9] ^ 1]) + task.records[10:]
    with pytest.raises(LedgerError, match="do not continue the one of digest"):
        clients["c0"].work(task._replace(records=changed))
    assert clients["c0"].fingerprint() == before
    moved = client(batches(2), net=mlp(hidden=5))
    with pytest.raises(LedgerError, match=r"it is another model|in the base, it was"):
        moved.work(task._replace(records=server.since(START), since=START))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_steps": 0}, "local_steps"),
        ({"participation": 0.0}, "participation"),
        ({"trim": 0.5}, "trim"),
        ({"largest": math.inf}, "largest"),
        ({"keys": "mine"}, "keys"),
        ({"average": "mode"}, "average"),
    ],
)
def test_bad_rules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(**settings)


def test_methods_that_look_at_one_clients_data_are_refused() -> None:
    with pytest.raises(ValueError, match="`conservative` depends on one client's data"):
        client(batches(2), replace(PLAIN, conservative=True))
    with pytest.raises(ValueError, match="`anchor` in a federation is not there"):
        client(batches(2), replace(PLAIN, anchor=0.1))
    server, clients = federation(rules=Rules(local_steps=2), config=replace(EXACT, optimizer="adam"))
    assert "averages moves of plain SGD" in go(server, clients).refused["c0"]
