"""The clients and the server of a federation in one process, without a network: for tests and papers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn
from torch.optim import SGD, Optimizer

from ..methods.config import ZOConfig
from ..methods.ranking import forward_of
from ..methods.recipes import recipe
from ..mixin import ZOMixin, prepare_of
from ..types import Batch, Forward
from .client import Client
from .messages import Refused, Task
from .rules import Rules
from .server import Round, Server

Transport = Callable[[str, Task], bytes]
"""Client, task → its reply's bytes."""


class HasConfig(Protocol):
    """A :class:`~zolightning.ZOStrategy`, of which a federation uses the settings only."""

    config: ZOConfig


@dataclass
class Simulated:
    """A federation that was run.

    Args:
        server: with its ledger.
        clients: by name, all at the federation's last step.
        rounds: in their order.
        values: round → what ``evaluate`` gave after it.
    """

    server: Server
    clients: dict[str, Client]
    rounds: list[Round]
    values: dict[int, float]

    @property
    def bytes_up(self) -> int:
        """Sent by all clients together."""
        return sum(each.bytes_up for each in self.rounds)

    @property
    def bytes_down(self) -> int:
        """Sent to all clients together."""
        return sum(each.bytes_down for each in self.rounds)


def simulate(
    module: nn.Module,
    shards: Sequence[Iterable[Batch]],
    method: HasConfig | ZOConfig | str = "default",
    *,
    rounds: int,
    local_steps: int = 1,
    queries: int | None = None,
    keys: Literal["shared", "own"] = "shared",
    rules: Rules | None = None,
    schedule: Callable[[int], float] = lambda number: 1.0,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 100,
    on_round: Callable[[Round, Mapping[str, float]], None] | None = None,
    ledger: str | Path | None = None,
) -> Simulated:
    """Train a module by clients that share no data: one for each shard, each with a copy of the module.

    Args:
        module: a LightningModule, or one with ``zo_objective``; it ends with the federation's weights.
        shards: the batches of each client, as DataLoaders; a client's weight is the length of its loader's dataset.
        method: a :class:`~zolightning.ZOStrategy`, a :class:`~zolightning.ZOConfig` or a recipe's name.
        rounds: to run.
        local_steps: of each client in a round.
        queries: directions of a step, in place of the method's.
        keys: 'shared' or 'own', see :class:`Rules`.
        rules: the server's other settings.
        schedule: round → factor of the learning rates.
        evaluate: the module → a value, called every so many rounds and after the last.
        every: rounds between evaluations.
        on_round: gets each round and what was evaluated in it, as 'value'.
        ledger: where the server keeps its ledger; None: in memory.

    Raises:
        ValueError: a setting is out of range.
        Refused: a client cannot take part.
    """
    config = config_of(method, queries)
    server = Server(replace(rules or Rules(), local_steps=local_steps, keys=keys), ledger, schedule)
    clients = {}
    for number, shard in enumerate(shards):
        clients[name_of(number)] = client_of(copy_of(module) if number else module, shard, config)
    for name, client in clients.items():
        server.welcome(name, client.opening.pack())
    done = Simulated(server, clients, [], {})
    first = clients[name_of(0)]
    for number in range(rounds):
        done.rounds.append(run_round(server, server.choose(list(clients)), lambda name, task: clients[name].work(task).pack()))
        if evaluate is not None and ((number + 1) % every == 0 or number + 1 == rounds):
            first.catch_up(server.since(first.head), first.head)
            done.values[number] = evaluate(module)
        if on_round is not None:
            on_round(done.rounds[-1], {"value": done.values[number]} if number in done.values else {})
    for client in clients.values():
        client.catch_up(server.since(client.head), client.head)
    server.end()
    return done


def run_round(server: Server, names: Sequence[str], send: Transport) -> Round:
    """A round over clients that answer at once; one that raises is one that vanished."""
    for name, task in server.begin(names).items():
        try:
            data = send(name, task)
        except Exception as error:  # of any client's model, data or machine
            server.lost(name, repr(error))
            continue
        with contextlib.suppress(Refused):  # counted, and told by the round
            server.receive(name, data)
    return server.close()


def name_of(number: int) -> str:
    """Of a simulated client, in the order of the numbers."""
    return f"client-{number:04d}"


def copy_of(module: nn.Module) -> nn.Module:
    """A copy for another client, which shares the frozen weights: no client writes to them."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


def config_of(method: HasConfig | ZOConfig | str, queries: int | None = None) -> ZOConfig:
    """The settings of a method, however it is given."""
    named = recipe(method) if isinstance(method, str) else method
    config = named if isinstance(named, ZOConfig) else named.config
    return config if queries is None else config.override(num_queries=queries)


def client_of(module: nn.Module, batches: Iterable[Batch], config: ZOConfig) -> Client:
    """The client around a module with ``zo_objective``, or a LightningModule with a ``training_step``."""
    optimizer = _optimizer(module, config)
    dataset: Any = getattr(batches, "dataset", None)
    examples = len(dataset) if hasattr(dataset, "__len__") and getattr(batches, "batch_size", None) is not None else None
    prepare = prepare_of(module) if isinstance(module, ZOMixin) else None
    return Client(module, batches, config, optimizer, _forward(module, config), examples=examples, prepare=prepare)


def _forward(module: nn.Module, config: ZOConfig) -> Forward:
    if isinstance(module, ZOMixin):
        return forward_of(module, config.build_estimator(next(module.parameters()).dtype))
    step: Any = getattr(module, "training_step", None)
    if step is None:
        raise ValueError(f"{type(module).__name__} has neither `zo_objective` (see ZOMixin) nor a `training_step`")
    return lambda batch: step(batch, 0)


def _optimizer(module: nn.Module, config: ZOConfig) -> Optimizer:
    """The module's own, and SGD where it has none."""
    configure: Any = getattr(module, "configure_optimizers", lambda: None)
    if (given := configure()) is None:
        if config.own_lr is None:
            raise ValueError(f"{type(module).__name__} has no `configure_optimizers`; give the method a learning rate: lr=1e-3")
        return SGD(module.parameters(), lr=config.own_lr)
    made, schedulers = _parts(given)
    if len(made) != 1 or not isinstance(made[0], Optimizer):
        raise ValueError(f"`{type(module).__name__}.configure_optimizers` must give one optimizer, got {made!r}")
    if schedulers:
        raise ValueError(
            f"`{type(module).__name__}.configure_optimizers` gives a learning rate scheduler, and in a federation the server "
            "sets the rates: return the optimizer only, and give `schedule=...` (round → factor) to `simulate` or `server_app`"
        )
    if config.own_lr is not None:
        for group in made[0].param_groups:
            group["lr"] = config.own_lr
    return made[0]


def _parts(made: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers, in each of the forms in which Lightning takes them."""
    pair = isinstance(made, (tuple, list)) and len(made) == 2 and all(isinstance(part, list) for part in made)
    each, schedulers = made if pair else (made if isinstance(made, (tuple, list)) else [made], [])
    schedulers = [*schedulers, *(one["lr_scheduler"] for one in each if isinstance(one, Mapping) and "lr_scheduler" in one)]
    return [one.get("optimizer") if isinstance(one, Mapping) else one for one in each], schedulers
