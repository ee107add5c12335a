"""Which file may import which: ideas depend downwards only, from room to room and from file to file."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import zolightning

ROOT = Path(zolightning.__file__).parent
DASHBOARD = ROOT.parent / "dashboard"

LAYERS = [
    {"types", "cache", "_version", "_answers", "_moved"},
    {"noise"},
    {"space"},
    {"offload"},
    {"mixin", "probing"},
    {"methods"},
    {"parallel"},
    {"engine"},
    {"ledger"},
    {"strategy"},
    {"records"},
    {"adapt", "data", "objectives"},
    {"blackbox"},
    {"federated", "tasks"},
    {"__init__"},
    {"commands"},
    {"cli"},
]
"""Rooms and the modules at the root, lowest first: a file imports from its own room and from lower lines only."""

LOWEST = {"ledger.format", "strategy._lightning"}
"""They import nothing of their room."""

UPWARDS: set[tuple[str, str]] = set()
"""What still breaks the order."""

LATER = {"offload", "blackbox"}
"""Rooms that have their place before they are there."""

LIGHTNING = {"strategy", "records", "commands", "tasks.module"}
"""Who may import Lightning: rooms and one file."""

SHIM = "strategy._lightning"
HEAVY = {"transformers", "peft", "mlflow", "gguf", "bitsandbytes", "streamlit", "matplotlib"}
CORE = {"types", "cache", "noise", "space", "offload", "mixin", "probing", "methods", "parallel", "engine", "ledger"}


def name_of(path: Path) -> str:
    """``space/scales/__init__.py`` → ``space.scales``, and ``__init__`` for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[0]


def layer(module: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room(module) in rooms)


@cache
def imports(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """(modules of this package, other packages) that a file imports anywhere, in functions and for types too."""
    own, others = set(), set()
    package = path.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = {alias.name: "" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found = {f"{start}.{alias.name}": start for alias in node.names}
        else:
            continue
        for name, parent in found.items():
            if room(name) != "zolightning":
                others.add(room(name))
            else:
                inner, outer = (n.partition(".")[2] or "__init__" for n in (name, parent or name))
                own.add(inner if inner in MODULES else outer)
    return frozenset(own), frozenset(others)


def graph() -> dict[str, set[str]]:
    """Module → the modules that it imports; who imports ``space.view`` from outside of ``space`` runs ``space`` first."""
    needs: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        found, _ = imports(path)
        packages = {".".join(name.split(".")[:i]) for name in found for i in range(1, name.count(".") + 1)}
        around = {package for package in packages if not f"{module}.".startswith(f"{package}.")}
        needs[module] = (set(found) | around) - {module}
    return needs


def test_every_module_has_its_layer() -> None:
    rooms = [name for names in LAYERS for name in names]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) - LATER <= {room(module) for module in MODULES} <= set(rooms)


def test_imports_name_modules_that_exist() -> None:
    assert {name for needs in graph().values() for name in needs} <= MODULES.keys()


def test_scripts_that_tests_start_name_modules_that_exist() -> None:
    """Some of them run on machines with a GPU's compiler only."""
    root = Path(__file__).parent.parent
    texts = [path.read_text() for folder in ("tests", "examples") for path in (root / folder).rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"^\s*from (zolightning(?:\.\w+)*) import", text, re.MULTILINE)}
    assert len(named) > 50
    assert not [name for name in sorted(named) if importlib.util.find_spec(name) is None]


def test_imports_go_down() -> None:
    inside = [f"{m} imports {n}" for m in LOWEST for n in imports(MODULES[m])[0] if room(n) == room(m)]
    upwards = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in sorted(imports(path)[0])
        if room(name) != room(module) and layer(name) >= layer(module) and (module, name) not in UPWARDS
    ]
    assert not inside + upwards


def test_no_file_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1][::-1]))


def test_lightning_comes_through_one_file() -> None:
    users = {
        module for module, path in MODULES.items() if imports(path)[1] & {"lightning", "pytorch_lightning", "lightning_fabric"}
    }
    assert users == {SHIM}
    strangers = {m for m, path in MODULES.items() if SHIM in imports(path)[0] and not {room(m), m} & LIGHTNING}
    assert not strangers


def test_the_core_needs_torch_and_little_else() -> None:
    """Layers of other libraries are looked at in ``space.scales`` only, each by its own file."""
    core = [m for m in MODULES if room(m) in CORE and not m.startswith("space.scales.")]
    heavy = {m: imports(MODULES[m])[1] & HEAVY for m in core}
    assert not {m: found for m, found in heavy.items() if found}


def test_few_modules_stand_at_the_root() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_files_and_functions_are_short() -> None:
    """At most 350 lines a file and 60 a function, docstring included."""
    lengths: dict[str, int] = {}
    for path in (*ROOT.rglob("*.py"), *DASHBOARD.rglob("*.py")):
        source, name = path.read_text(), path.relative_to(ROOT.parent).as_posix()
        if (lines := len(source.splitlines())) > 350:
            lengths[name] = lines
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    lengths[f"{name} {node.name}"] = lines
    assert lengths == {}


@pytest.mark.parametrize("package", [ROOT, DASHBOARD], ids=lambda path: path.name)
def test_few_types_are_left_open(package: Path) -> None:
    """``Any`` stands at most 15 times in 1,000 lines, imports not counted."""
    lines = [line for path in package.rglob("*.py") for line in path.read_text().splitlines()]
    found = sum(len(re.findall(r"\bAny\b", line)) for line in lines if not line.startswith(("from ", "import ")))
    assert 1000 * found <= 15 * len(lines)


def test_the_dashboard_imports_nothing_of_the_plugin() -> None:
    for path in DASHBOARD.rglob("*.py"):
        packages = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }
        assert not packages & {"zolightning", "torch", "lightning", "pytorch_lightning"}, path


@pytest.mark.integration
def test_the_core_runs_without_lightning() -> None:
    """Importing every module below the strategy does not bring Lightning in, nor MLflow."""
    code = """
import importlib, sys, types
package = types.ModuleType("zolightning")
package.__path__ = [sys.argv[1]]
sys.modules["zolightning"] = package
for name in sys.argv[2:]:
    importlib.import_module("zolightning." + name)
found = {"lightning", "pytorch_lightning", "lightning_fabric", "mlflow", "streamlit"} & set(sys.modules)
assert not found, found
"""
    libraries = {"triton", "bitsandbytes", "hqq", "torchao"}  # files that import such a package
    core = [m for m in MODULES if room(m) in CORE and not any(library in m for library in libraries)]
    subprocess.run([sys.executable, "-c", code, str(ROOT), *core], check=True)
