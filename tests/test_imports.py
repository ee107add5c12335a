"""Which file may import which: ideas depend downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zolightning

ROOT = Path(zolightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    {"types", "cache", "_version", "optimizers"},
    {"noise"},
    {"space"},
    {"estimators", "shaping", "updates", "isolation", "losses", "ties", "uninterrupted"},
    {"step", "objective", "config", "mixin", "rates", "ledger"},
    {"inspection", "graphs"},
    {"recipes", "one_device", "ledger_io", "search"},
    {"run_ledger"},
    {"fit_strategy"},
    {"resumable"},
    {"strategy"},
]
"""The core, lowest first: a file imports from lower layers only, and what is not listed stands above all of them."""

LIGHTNING = {
    "_lightning",
    "one_device",
    "ledger_io",
    "run_ledger",
    "fit_strategy",
    "resumable",
    "strategy",
    "monitor",
    "cli",
    "tracking",
    "demo",
    "bench",
    "sweep",
    "tasks",
}


def module_of(path: Path) -> str:
    """The first part of the module's name below the package: its file or its folder."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[str, str]]:
    """(piece of this package, "") or ("", top-level package) for each import at run time, nested ones too."""
    package = ("zolightning", *path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [("", alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(("", (node.module or "").split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [((*base, *name.split("."))[1], "") for name in names]
    return found


def layer(piece: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if piece in names), len(LAYERS))


def test_every_core_piece_exists() -> None:
    assert {piece for names in LAYERS for piece in names} <= {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        return
    for piece, _ in imports(path):
        if piece and piece not in (own, "_lightning"):
            same = {"recipes": {"config"}, "objective": {"isolation"}}.get(own, set())
            allowed = layer(piece) < layer(own) or layer(own) == len(LAYERS) or piece in same
            assert allowed, f"{own} imports {piece}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lightning_and_transformers_stay_at_the_edge(path: Path) -> None:
    own = module_of(path)
    packages = {package for _, package in imports(path)}
    uses_lightning = packages & {"lightning", "pytorch_lightning", "lightning_fabric"}
    assert not uses_lightning or own in LIGHTNING
    assert ("_lightning", "") not in imports(path) or own in LIGHTNING
    if layer(own) < len(LAYERS):
        assert not packages & {"transformers", "peft", "mlflow", "gguf"}


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path != ROOT / "__init__.py":
            graph.setdefault(module_of(path), set()).update(piece for piece, _ in imports(path) if piece)
    for piece in graph:
        graph[piece] -= {piece}
    while free := {piece for piece, needs in graph.items() if not needs & set(graph)}:
        for piece in free:
            del graph[piece]
    assert not graph


def test_the_core_runs_without_lightning() -> None:
    """Importing the pieces below the strategy does not bring Lightning in."""
    code = """
import sys, types
package = types.ModuleType("zolightning")
package.__path__ = [sys.argv[1]]
sys.modules["zolightning"] = package
from zolightning import config, estimators, isolation, ledger, mixin, noise, objective, recipes, shaping, space, step, updates
assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)
