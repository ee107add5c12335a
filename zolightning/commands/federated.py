"""``zolightning federated``: a Flower app around a module and its loaders."""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..federated.rules import Rules
from ..records.mlflow_logger import DEFAULT_STORE
from .console import say

_APP = '''"""A Flower app: `task.py` says what is trained, this file how."""

import task

from zolightning.federated import RoundLog, Rules
from zolightning.federated.flower import Watch, client_app, server_app

client = client_app(task.module, task.batches, task.method)
server = server_app(
    {rules!r},
    rounds={rounds},
    clients={clients},
    timeout={timeout},
    path={path!r},
    log={log},
    watch={watch},
)
'''

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "Federated zeroth-order training"
license = "Apache-2.0"
dependencies = ["zolightning[federated]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
"""


_ENVIRONMENT = """\
# For flower-superlink, flower-supernode and flwr, which read it when they start.
FLWR_TELEMETRY_ENABLED=0
FLWR_DISABLE_UPDATE_CHECK=1
FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
"""


@dataclass
class Federated:
    """Make a Flower app: clients keep their data and send coefficients. Example: zolightning federated task.py --out app

    Then start Flower's servers and run it, see examples/federated/README.md.
    """

    task: Path
    """A Python file with `module()`, `batches(partition, partitions)` and `method`: what is trained, each client's loader, and
    a ZOStrategy, a ZOConfig or a recipe's name. With `evaluate(module)`, an accuracy, the server logs it after each round."""
    out: Path = Path("federated-app")
    """The app's folder, which is made."""
    rounds: int = 10
    """Rounds to run, >= 1."""
    local_steps: int = 20
    """Steps of a client in a round. Flower starts a process for each message, so that several pay."""
    keys: Literal["shared", "own"] = "shared"
    """'shared': all clients probe the same directions; 'own': each probes others."""
    average: Literal["mean", "median", "trimmed"] = "mean"
    """Of the clients' projected gradients."""
    participation: float = 1.0
    """Share of the clients that a round asks, in (0, 1]."""
    largest: float = 1e6
    """Larger coefficients are refused."""
    clients: int = 2
    """Clients to wait for before the first round, >= 1."""
    timeout: float = 600.0
    """Seconds that a round may take."""
    store: str = DEFAULT_STORE
    """The MLflow store in which the server logs rounds, bytes, participation and accuracy for `zolightning dash`: an SQLite
    file of the server's machine, or an address; 'none': no log."""
    ledger: Path = Path("federation.zo")
    """The server's ledger, from which `zolightning replay` makes the weights."""

    def __call__(self) -> None:
        """Write the folder.

        Raises:
            ValueError: a setting is out of range, or the file lacks one of the three names.
            OSError: the folder is there already, or the file is not.
        """
        if self.rounds < 1 or self.clients < 1 or not self.timeout > 0:
            raise ValueError("`--rounds` and `--clients` must be >= 1, and `--timeout` > 0 seconds")
        rules = Rules(
            local_steps=self.local_steps,
            keys=self.keys,
            average=self.average,
            participation=self.participation,
            largest=self.largest,
        )
        text = self.task.read_text()
        defined = _defined(text, self.task)
        if missing := [name for name in ("module", "batches", "method") if name not in defined]:
            raise ValueError(f"{self.task} must define {', '.join(missing)}; `zolightning federated --help` says more")
        self.out.mkdir(parents=True)
        shutil.copy(self.task, self.out / "task.py")
        name = _plain(self.out.resolve().name)
        app = _APP.format(
            rules=rules,
            rounds=self.rounds,
            clients=self.clients,
            timeout=self.timeout,
            path=str(self.ledger.absolute()),
            log=None if self.store == "none" else f"RoundLog({_absolute(self.store)!r}, name={name!r})",
            watch="Watch(task.module, task.evaluate)" if "evaluate" in defined else None,
        )
        (self.out / "app.py").write_text(app)
        (self.out / "pyproject.toml").write_text(_PROJECT.format(name=name))
        (self.out / "flower.env").write_text(_ENVIRONMENT)
        say(
            f"{self.out} is a Flower app. In each shell: `set -a; . {self.out / 'flower.env'}; set +a`, which has Flower's "
            f"telemetry off. Start flower-superlink and flower-supernode, then `flwr run {self.out} local`"
        )


def _defined(text: str, path: Path) -> set[str]:
    """Names at the top of a Python file."""
    try:
        nodes = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"{path} is not Python: {error}") from error
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _absolute(store: str) -> str:
    """The store, wherever Flower starts the server."""
    path = store.removeprefix("sqlite:///")
    return store if path == store else f"sqlite:///{Path(path).absolute()}"


def _plain(name: str) -> str:
    """A package's name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") or "federated-app"
