"""What the pages say is so: links lead somewhere, commands and code run, and the front page is short."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Task, batches, fit, mlp
from tables import pages, rebuilt

from zolightning import ZOConfig, ZOStrategy
from zolightning.cli import VERBS
from zolightning.methods.estimators import Estimator
from zolightning.methods.recipes import RECIPES

ROOT = Path(__file__).parent.parent
ROOMS = ("dashboard", "examples", "tests", "zolightning")
PAGES = [ROOT / "README.md", *(page for room in ROOMS for page in sorted((ROOT / room).rglob("*.md")))]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> list[str]:
    """Each ``zolightning VERB ...`` on the pages, in code blocks and in running text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(zolightning [^`]+)`", text)
        found += [line.split("  #")[0].strip() for line in lines if line.startswith("zolightning ")]
    return sorted(set(found))


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    results = text.split("## Results")[1].split("\n## ")[0]
    assert 3 <= sum(line.startswith("| ") for line in results.splitlines()) - 2 <= 7
    assert "## When not to use it" in text


def test_the_front_page_lists_every_recipe() -> None:
    table = (ROOT / "README.md").read_text().split("## Methods")[1].split("\n## ")[0]
    assert {name for name in RECIPES if name != "default" and f'"{name}"' not in table} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_on_the_pages_imports_names_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zolightning"):
                module = import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("command", commands())
def test_commands_on_the_pages_have_their_verbs_and_options(command: str) -> None:
    _, verb, *words = command.split()
    if verb.startswith("-") or verb == "VERB":
        return
    module, function = VERBS[verb][0].split(":")
    options = set(inspect.signature(getattr(import_module(f"zolightning.{module}"), function)).parameters) | {"config", "help"}
    given = {word.split("=")[0][2:].replace("-", "_").removeprefix("no_").split(".")[0] for word in words if word[:2] == "--"}
    assert given <= options


def test_the_recipe_for_an_estimator_trains() -> None:
    (block,) = [b for b in blocks(ROOT / "tests" / "README.md", "python") if "class FourPoint" in b]
    assert len(block.split("class FourPoint")[1].strip().splitlines()) <= 11
    names: dict[str, Any] = {}
    exec(block, names)
    estimator: Estimator = names["FourPoint"](1e-2)
    config = ZOConfig(estimator=estimator, select="all", structure="dense", normalize=False, seed=7)
    strategy, module = ZOStrategy(config), Task(mlp().double())
    data = batches(1)
    x, y = (part.double() for part in data[0])

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(torch.func.functional_call(module.net, weights, (x,)), y)

    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    slope = torch.func.grad(loss)(before)
    fit(module, [(x, y)], strategy)
    record = strategy.last_record
    assert record is not None
    assert record.forwards == 4
    moved = {name: p.detach() - before[name] for name, p in module.net.named_parameters()}  # −lr·g·z
    along = sum((slope[name] * moved[name]).sum() for name in slope) / -1e-2  # g·(z·∇L), and g = z·∇L up to ε⁴
    assert float(along) == pytest.approx(record.projected_grad**2, rel=1e-4)


@pytest.mark.integration
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Half a minute of CPU time; no download."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "keep the notebook without outputs"
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300, kernel_name="python3", resources=where).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "after 150 steps of forward passes only" in printed


def test_tables_show_the_raw_results() -> None:
    """Every figure of a marked table is the one in its results.json; `make tables` writes them again."""
    found = list(pages())
    assert ROOT / "README.md" in found
    assert [page for page in found if rebuilt(page) != page.read_text()] == []
