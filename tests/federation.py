"""Small clients and their server, in one process; without what only some tests need, since one of them starts in a process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import PLAIN, PerExampleTask, batches, mlp, per_example_mse
from torch import nn

from zolightning import ZOConfig
from zolightning.federated import Client, Rules, Server
from zolightning.federated.simulation import client_of, run_round

EXACT = replace(PLAIN, normalize=True, num_queries=2)


def client(shard: list[Any], config: ZOConfig = EXACT, net: nn.Module | None = None) -> Client:
    return client_of(PerExampleTask(mlp() if net is None else net, per_example_mse), shard, config)


def federation(
    count: int = 3, rules: Rules | None = None, config: ZOConfig = EXACT, path: Path | None = None
) -> tuple[Server, dict[str, Client]]:
    server = Server(rules, path)
    clients = {f"c{i}": client(batches(6, seed=i), config) for i in range(count)}
    for name, each in clients.items():
        server.welcome(name, each.opening.pack())
    return server, clients


def go(server: Server, clients: dict[str, Client], names: list[str] | None = None) -> Any:
    return run_round(server, names or sorted(clients), lambda name, task: clients[name].work(task).pack())


def marks(server: Server, clients: dict[str, Client]) -> set[str]:
    """The fingerprints of all clients once they have the whole ledger."""
    for each in clients.values():
        each.catch_up(server.since(each.head), each.head)
    return {each.fingerprint() for each in clients.values()}
