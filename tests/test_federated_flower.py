"""The same clients and server inside Flower's apps. Needs ``flwr``, in an environment of its own: ``make test-flower``."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import federated_task as task
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed; make test-flower makes an environment that has it")

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore import telemetry
from flwr.supercore.task_identity import TaskIdentity
from mlflow import MlflowClient

from zolightning import ZOConfig
from zolightning.commands.federated import Federated
from zolightning.federated import Round, Rules
from zolightning.federated.flower import client_app, server_app
from zolightning.federated.simulation import client_of
from zolightning.ledger import read, replay


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower's own processes have."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Nodes:
    """Flower's Grid over client apps of this process, and their contexts; counts the bytes of Flower's messages."""

    def __init__(self, count: int) -> None:
        self.app = client_app(task.module, task.batches, task.method)
        self.contexts = {
            10 + i: Context(1, 10 + i, {"partition-id": i, "num-partitions": count}, RecordDict(), {}) for i in range(count)
        }
        self.present = set(self.contexts)
        self.fails: set[int] = set()
        self.silent: set[int] = set()
        self.up = self.down = 0
        self.sent: list[tuple[int, str]] = []

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.present)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append((node, message.metadata.message_type))
            self.down += message_to_proto(message).ByteSize()
            if node in self.silent:
                continue
            if node in self.fails:
                yield Message(Error(code=1, reason="its process ended"), reply_to=message)
                continue
            reply = self.app(message, self.contexts[node])
            self.up += message_to_proto(reply).ByteSize()
            yield reply


def run(nodes: Nodes, rounds: int, path: Path, watch: Callable[[Round], None] = lambda done: None, **rules: Any) -> list[Round]:
    done: list[Round] = []

    def on_round(each: Round, values: Mapping[str, float]) -> None:
        done.append(each)
        watch(each)

    app = server_app(Rules(**rules), rounds=rounds, path=str(path), clients=len(nodes.present), timeout=60, on_round=on_round)
    app(nodes, Context(1, 0, {}, RecordDict(), {}))  # type: ignore[arg-type]
    return done


def weights_of(path: Path) -> torch.nn.Module:
    module = task.module()
    replay(read(path), dict(module.named_parameters()))
    return module


def loss_of(module: torch.nn.Module) -> float:
    with torch.no_grad():
        return sum(float(module.zo_objective(b)) for i in range(3) for b in task.batches(i, 3))


def test_a_federation_inside_flowers_apps(tmp_path: Path) -> None:
    nodes = Nodes(3)
    done = run(nodes, 6, tmp_path / "f.zo", local_steps=8, check_every=2)
    assert [each.step for each in done] == [8, 16, 24, 32, 40, 48]
    assert not any(each.refused for each in done)
    assert loss_of(weights_of(tmp_path / "f.zo")) < loss_of(task.module())
    ours = sum(each.bytes_up for each in done)
    assert ours > 6 * 3 * 8 * 4 * 8
    openings = 3 * 2000
    assert ours < nodes.up < ours + openings + 21 * 400  # Flower's envelope is less than 400 bytes a message
    print(f"up: {ours} bytes by us, {nodes.up} in Flower's messages; down: {nodes.down}")


def test_the_apps_log_rounds_and_accuracy_and_send_no_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `zolightning federated` writes them; the processes that load them have imported Flower by then."""
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    store = f"sqlite:///{tmp_path / 'm.db'}"
    Federated(Path(task.__file__), tmp_path / "app", rounds=3, ledger=tmp_path / "f.zo", store=store)()
    monkeypatch.syspath_prepend(tmp_path / "app")
    monkeypatch.delitem(sys.modules, "task", raising=False)
    app = importlib.import_module("app")
    assert telemetry.FLWR_TELEMETRY_ENABLED == os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    nodes = Nodes(2)
    nodes.app = app.client
    app.server(nodes, Context(1, 0, {}, RecordDict(), {}))
    runs = logged(store)
    assert {run.info.run_name for run in runs} == {"app, server", "app, 10", "app, 11"}
    (server,) = (run for run in runs if run.data.tags["zo.role"] == "server")
    assert server.data.metrics["zo/clients/joined"] == 2
    assert server.data.metrics["zo/clients/bytes_up"] > 3 * 2 * 20 * 4 * 8
    points = MlflowClient(store).get_metric_history(server.info.run_id, "val/accuracy")
    assert [point.step for point in points] == [20, 40, 60]
    assert points[-1].value == task.evaluate(weights_of(tmp_path / "f.zo"))  # type: ignore[arg-type]


@pytest.mark.slow
def test_bytes_of_the_digits_in_flowers_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten clients with two classes each, as in examples/federated.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    digits = importlib.import_module("federated")
    shards, _ = digits.data(0)

    def module() -> torch.nn.Module:
        torch.manual_seed(0)
        net: torch.nn.Module = digits.Digits(32)
        return net

    method = ZOConfig("one_sided", select="all", structure="dense", lr=0.02, optimizer="adam", seed=0, num_queries=20)
    found = []
    for rounds in (2, 12):
        nodes = Nodes(10)
        nodes.app = client_app(module, lambda part, parts: [shards[part]], method)
        done = run(nodes, rounds, tmp_path / f"{rounds}.zo", check_every=1000)
        assert not any(each.refused for each in done)
        found.append((sum(e.bytes_up for e in done), nodes.up, sum(e.bytes_down for e in done), nodes.down))
    ours_up, up, ours_down, down = ((b - a) / 10 for a, b in zip(*found, strict=True))
    print(f"a round of ten clients: up {ours_up:.0f} bytes by us, {up:.0f} in messages; down {ours_down:.0f} by us, {down:.0f}")
    assert ours_up < up < ours_up + 10 * 400


def test_clients_vanish_fail_and_come_back(tmp_path: Path) -> None:
    nodes = Nodes(3)

    def watch(done: Round) -> None:
        nodes.silent = {10} if done.number == 0 else set()
        nodes.fails = {11} if done.number == 1 else set()
        nodes.present = {10, 11, 12} - ({12} if done.number == 2 else set())

    done = run(nodes, 6, tmp_path / "f.zo", watch, local_steps=2)
    assert [each.joined for each in done] == [
        ("10", "11", "12"), ("11", "12"), ("10", "12"), ("10", "11"), ("10", "11", "12"), ("10", "11", "12")
    ]  # fmt: skip
    assert "its process ended" in done[2].refused["11"]
    assert done[1].refused["10"] == "no reply"
    for partition, context in enumerate(nodes.contexts.values()):
        kept = context.state["zolightning"]["ledger"]
        assert isinstance(kept, bytes)
        client = client_of(task.module(), task.batches(partition, 3), task.method)
        client.catch_up(kept, bytes(8))
        assert client.step == 10  # they have not heard of the last round yet


def test_the_server_goes_on_after_a_restart(tmp_path: Path) -> None:
    nodes = Nodes(2)
    run(nodes, 2, tmp_path / "f.zo")
    done = run(nodes, 4, tmp_path / "f.zo")
    assert [each.number for each in done] == [2, 3]
    assert done[-1].step == 4
    weights_of(tmp_path / "f.zo")


def test_another_model_is_told_and_never_asked(tmp_path: Path) -> None:
    nodes = Nodes(3)
    good = nodes.app

    def other() -> torch.nn.Module:
        net = task.module()
        torch.nn.init.zeros_(net.net.bias)
        return net

    bad = client_app(other, task.batches, task.method)
    nodes.app = lambda message, context: (bad if context.node_id == 12 else good)(message, context)  # type: ignore[assignment]
    done = run(nodes, 2, tmp_path / "f.zo")
    assert [each.asked for each in done] == [("10", "11")] * 2
    assert nodes.sent.count((12, "query")) == 1
    assert (12, "train") not in nodes.sent


# Flower's own processes on loopback


class Calls:
    """One way of an HTTP/1.1 connection, whose requests and answers come in turn: (bytes, those of the content) of each."""

    def __init__(self) -> None:
        self._rest = b""
        self.sizes: list[tuple[int, int]] = []

    def feed(self, data: bytes) -> None:
        self._rest += data
        while (head := self._rest.find(b"\r\n\r\n") + 4) > 3:
            told = re.search(rb"content-length: *(\d+)", self._rest[:head], re.IGNORECASE)
            end = head + int(told[1]) if told else self._rest.find(b"\r\n0\r\n\r\n", head - 2) + 7  # in chunks
            if end < head or len(self._rest) < end:
                return
            self.sizes.append((end, end - head))
            self._rest = self._rest[end:]


class Sample(NamedTuple):
    """Bytes so far: all that went through TCP, and those of the calls that carried a message."""

    up: int
    down: int
    up_carrying: int
    down_carrying: int


class Relay:
    """A TCP relay to a port on loopback; counts the bytes of both ways."""

    def __init__(self, target: int) -> None:
        self.up = self.down = 0
        self._target = target
        self._calls: list[tuple[Calls, Calls]] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            up, down = Calls(), Calls()
            self._calls.append((up, down))
            threading.Thread(target=self._copy, args=(near, far, "up", up), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, "down", down), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, way: str, calls: Calls) -> None:
        try:
            while data := source.recv(65536):
                setattr(self, way, getattr(self, way) + len(data))
                calls.feed(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def sample(self) -> Sample:
        """Without TLS. Heartbeats, and questions for work of which there is none, have less than 100 bytes of content."""
        pairs = [pair for up, down in self._calls for pair in zip(list(up.sizes), list(down.sizes), strict=False)]
        carrying = [(up, down) for (up, sent), (down, got) in pairs if max(sent, got) > 100]
        return Sample(self.up, self.down, sum(up for up, _ in carrying), sum(down for _, down in carrying))

    def close(self) -> None:
        self._socket.close()


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def program(name: str) -> str:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or pytest.skip(f"{name} is not beside {sys.executable}")


@contextmanager
def started(log: Path, *command: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process group, which ends with the block."""
    with log.open("wb") as out, subprocess.Popen(
        command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def until(condition: Callable[[], bool], logs: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            texts = [f"== {log}\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(logs.glob("*.log"))]
            raise AssertionError("it did not happen:\n" + "\n".join(texts))
        time.sleep(0.5)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def certificates(folder: Path) -> None:
    """A certificate authority, and a certificate of 127.0.0.1 that it signed."""
    (folder / "san.cnf").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", "server.pem",
        "-extfile", "san.cnf",
    )  # fmt: skip


def key_pair(folder: Path, name: str) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", name, "-C", ""]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("secure", [False, True])
def test_two_supernodes_on_loopback(tmp_path: Path, secure: bool) -> None:
    """SuperLink, two SuperNodes and `flwr run`; with TLS and registered keys, where a stranger's node is not let in."""
    if secure and not (shutil.which("openssl") and shutil.which("ssh-keygen")):
        pytest.skip("openssl and ssh-keygen are needed for certificates and keys")
    root, port = Path(__file__).parent, free()
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    where = "insecure = true" if not secure else f'root-certificates = "{tmp_path / "ca.crt"}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\n{where}\n'
    )
    ledger, rounds, store = tmp_path / "f.zo", 2 if secure else 3, f"sqlite:///{tmp_path / 'm.db'}"
    Federated(root / "federated_task.py", tmp_path / "app", rounds=rounds, local_steps=10, ledger=ledger, store=store)()
    link = [program("flower-superlink"), "--port", str(port), "--insecure"]
    node_tls: list[str] = ["--insecure"]
    if secure:
        certificates(tmp_path)
        tls = ("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key")
        link = [*link[:3], *(str(tmp_path / w) if not w.startswith("--") else w for w in tls), "--enable-supernode-auth"]
        node_tls = ["--root-certificates", str(tmp_path / "ca.crt")]
    relay = Relay(port)

    def node(number: int, name: str) -> Any:
        words = [program("flower-supernode"), *node_tls, "--superlink", f"127.0.0.1:{relay.port}", "--port", str(free())]
        if secure:
            key_pair(tmp_path, name)
            words += ["--auth-supernode-private-key", str(tmp_path / name)]
            if name != "stranger":
                register = [program("flwr"), "supernode", "register", str(tmp_path / f"{name}.pub"), "local"]
                subprocess.run(register, env=env, check=True, capture_output=True, timeout=120)
        words += ["--node-config", f"partition-id={number} num-partitions=2"]
        return started(tmp_path / f"{name}.log", *words, env=env)

    with started(tmp_path / "link.log", *link, env=env):
        until(lambda: answers(port), tmp_path)
        with node(0, "anna"), node(1, "ben"):
            run_app = [program("flwr"), "run", str(tmp_path / "app"), "local"]
            subprocess.run(run_app, env=env, check=True, capture_output=True, timeout=120)
            found: dict[int, Sample] = {}  # after so many steps

            def ended() -> bool:
                last = read(ledger).last if ledger.exists() else 0
                found.setdefault(last, relay.sample())
                return last >= 10 * rounds

            until(ended, tmp_path)
            until(lambda: "FINISHED" in {run.info.status for run in logged(store)}, tmp_path)
            if secure:
                with node(0, "stranger") as process:
                    until(lambda: process.poll() is not None, tmp_path, 120)
            else:
                report(found, store)
    weights_of(ledger)
    print(f"on the wire: {relay.up} bytes up, {relay.down} down, heartbeats and the app's code included")
    (server,) = (run for run in logged(store) if run.data.tags["zo.role"] == "server")
    assert 0 < server.data.metrics["zo/clients/bytes_up"] < relay.up
    assert 0 < server.data.metrics["val/accuracy"] <= 1
    relay.close()


def logged(store: str) -> list[Any]:
    """The runs of an MLflow store."""
    client = MlflowClient(store)
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def report(found: Mapping[int, Sample], store: str) -> None:
    """Bytes a round of two clients, without those of the first round and of what comes before it."""
    client = MlflowClient(store)
    (server,) = (run for run in logged(store) if run.data.tags["zo.role"] == "server")
    first, last = min(step for step in found if step), max(found)
    for way in ("up", "down"):
        history = client.get_metric_history(server.info.run_id, f"zo/clients/bytes_{way}")
        ours = {point.step: point.value for point in history}
        pairs = [(ours[step], *(getattr(found[step], name) for name in (f"{way}_carrying", way))) for step in (first, last)]
        mine, carrying, all_ = ((b - a) * 10 / (last - first) for a, b in zip(*pairs, strict=True))
        print(
            f"{way}: {mine:.0f} bytes a round by us, {carrying:.0f} in calls that carry a message, {all_:.0f} with heartbeats"
        )
        assert mine < carrying < all_
