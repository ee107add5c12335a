"""A federation over Flower (``flwr``): its ServerApp and ClientApp carry our bytes, and its SuperLink and SuperNodes the apps.

Flower starts a process for each message. So a client keeps the ledger's bytes in Flower's context and replays them, and a
round is worth several local steps.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from hashlib import blake2b
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._answers import needs
from ..methods.config import ZOConfig
from ..types import Batch
from .client import Client
from .follower import Follower
from .messages import START, Refused, Task
from .rules import Rules
from .server import Round, Server
from .simulation import HasConfig, client_of, config_of
from .tracking import RoundLog

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

_log = logging.getLogger("flwr")  # Flower shows it
_NAME = "zolightning"
_TELEMETRY = "flwr.supercore.telemetry"


class Watch:
    """A model beside the server, which replays the ledger after each round.

    Args:
        module: makes it, with the weights that the clients' have.
        evaluate: the module → its accuracy, or another value.
    """

    def __init__(self, module: Callable[[], nn.Module], evaluate: Callable[[nn.Module], float]) -> None:
        self._module, self._evaluate = module, evaluate
        self._follower: Follower | None = None

    def __call__(self, server: Server) -> dict[str, float]:
        """The value at the server's last step.

        Raises:
            LedgerError: the module is not the federation's.
        """
        follower = self._follower = self._follower or Follower(self._module())
        follower.catch_up(server.since(follower.head), follower.head)
        with torch.no_grad():
            return {"value": self._evaluate(follower.module)}


def client_app(
    module: Callable[[], nn.Module],
    batches: Callable[[int, int], Iterable[Batch]],
    method: HasConfig | ZOConfig | str = "default",
) -> ClientApp:
    """The clients' side.

    Args:
        module: makes a LightningModule, or a module with ``zo_objective``, with the same weights on all clients.
        batches: (partition, partitions) → the loader of that client, which should shuffle: it begins anew with each message.
            The numbers are ``partition-id`` and ``num-partitions`` of a SuperNode's ``--node-config``.
        method: the same on all clients.
    """
    app = _part("clientapp").ClientApp()

    def client(context: Context) -> Client:
        node = context.node_config
        part, parts = int(node.get("partition-id", 0)), int(node.get("num-partitions", 1))
        return client_of(module(), batches(part, parts), config_of(method))

    def hello(message: Message, context: Context) -> Message:
        kept = _get(context.state, "ledger")
        found = {"opening": client(context).opening.pack(), "stands": START if kept is None else _head(kept)}
        return _part("app").Message(_record(found), reply_to=message)

    def work(message: Message, context: Context) -> Message:
        task = Task.unpack(_get(message.content, "task") or b"")
        kept = _get(context.state, "ledger")
        torch.manual_seed(_seed(context.node_id, task.step))
        one = client(context)
        if kept is not None:
            one.catch_up(kept, START)
        reply = one.work(task).pack()
        if task.since == START:
            kept = task.records
        elif kept is not None and _head(kept) == task.since:
            kept = kept + task.records
        context.state[_NAME] = _part("app").ConfigRecord({"ledger": kept or b""})
        return _part("app").Message(_record({"reply": reply}), reply_to=message)

    app.query()(hello)
    app.train()(work)
    return app


def server_app(
    rules: Rules | None = None,
    *,
    rounds: int,
    path: str = "federation.zo",
    clients: int = 2,
    timeout: float = 600.0,
    schedule: Callable[[int], float] = lambda number: 1.0,
    log: RoundLog | None = None,
    watch: Watch | None = None,
    on_round: Callable[[Round, Mapping[str, float]], None] = lambda done, values: None,
) -> ServerApp:
    """The server's side. It keeps its ledger in a file, and goes on with it where one is there.

    Args:
        rules: its settings.
        rounds: to run, those before a restart included.
        path: of the ledger.
        clients: to wait for before the first round.
        timeout: seconds that a round, or the wait for clients, may take.
        schedule: round → factor of the learning rates.
        log: gets each round, and writes it into an MLflow store for the dashboard.
        watch: evaluates the model, which the server has in no other place. None: nobody here has it.
        on_round: gets each round, and its accuracy as 'value' where there is a ``watch``.
    """
    app = _part("serverapp").ServerApp()

    def main(grid: Grid, context: Context) -> None:
        server = Server(rules, path, schedule)
        known: set[int] = set()
        began = time.monotonic()
        with log or nullcontext():
            while server.rounds < rounds:
                nodes = sorted(grid.get_node_ids())
                if strangers := [node for node in nodes if node not in known]:
                    _greet(grid, server, strangers, timeout)
                    known.update(strangers)
                names = server.choose([str(node) for node in nodes])
                if len(names) < min(clients, server.rules.fewest) or (not server.rounds and len(nodes) < clients) or not names:
                    if time.monotonic() - began > timeout:
                        raise TimeoutError(f"{len(nodes)} of {clients} clients have come within {timeout:g} s")
                    time.sleep(0.5)
                    continue
                done = _round(grid, server, names, timeout)
                values = watch(server) if watch is not None else {}
                _log.info(told(done) + "".join(f", value {value:.4f}" for value in values.values()))
                for tell in (log, on_round):
                    if tell is not None:
                        tell(done, values)
                began = time.monotonic()
        server.end()

    app.main()(main)
    return app


def told(done: Round) -> str:
    """A round in a line."""
    refused = "".join(f"; {name} {reason}" for name, reason in done.refused.items())
    return (
        f"round {done.number}: step {done.step}, loss {done.loss:.4f}, {len(done.joined)} of {len(done.asked)} clients, "
        f"{done.bytes_up} bytes up, {done.bytes_down} down{refused}"
    )


def _greet(grid: Grid, server: Server, nodes: Iterable[int], timeout: float) -> None:
    """Welcome clients; one that is refused is told of and never asked."""
    messages = [_part("app").Message(_part("app").RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    for reply in grid.send_and_receive(messages, timeout=timeout):
        name = str(reply.metadata.src_node_id)
        if reply.has_error():
            _log.warning(f"client {name} cannot take part: {reply.error.reason}")
            continue
        try:
            opening, stands = _get(reply.content, "opening"), _get(reply.content, "stands")
            server.welcome(name, opening or b"", stands or START)
        except Refused as refused:
            _log.warning(f"client {name} cannot take part: {refused}")


def _round(grid: Grid, server: Server, names: Iterable[str], timeout: float) -> Round:
    messages = [
        _part("app").Message(_record({"task": task.pack()}), dst_node_id=int(name), message_type="train", ttl=timeout)
        for name, task in server.begin(list(names)).items()
    ]
    for reply in grid.send_and_receive(messages, timeout=timeout):
        name = str(reply.metadata.src_node_id)
        if reply.has_error():
            server.lost(name, reply.error.reason)
            continue
        try:
            server.receive(name, _get(reply.content, "reply") or b"")
        except Refused as refused:
            _log.warning(f"client {name}: {refused}")
    return server.close()


def _record(values: dict[str, bytes]) -> RecordDict:
    app = _part("app")
    return app.RecordDict({_NAME: app.ConfigRecord(dict(values))})


def _get(content: Any, name: str) -> bytes | None:
    """A value that somebody else wrote: bytes, or None."""
    value = content[_NAME].get(name) if content is not None and _NAME in content else None
    return value if isinstance(value, bytes) and value else None


def _head(ledger: bytes) -> bytes:
    return ledger[-len(START) :]


def _seed(node: int, step: int) -> int:
    """Of the loader's order: another one for each client and round."""
    return int.from_bytes(blake2b(f"{node} {step}".encode(), digest_size=7).digest(), "little")


def _part(name: str) -> Any:
    """A module of Flower's, which sends nobody its telemetry."""
    _no_telemetry()
    with needs("flwr", "a federation over Flower", "zolightning[federated]"):
        return import_module(f"flwr.{name}")


def _no_telemetry() -> None:
    """Switch it off in this process and those that it starts, unless somebody has asked for it.

    Flower reads the variable when it is imported, which in a SuperNode's or SuperLink's processes comes before the app.
    """
    if os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0") == "0" and _TELEMETRY in sys.modules:
        sys.modules[_TELEMETRY].FLWR_TELEMETRY_ENABLED = "0"  # type: ignore[attr-defined]
