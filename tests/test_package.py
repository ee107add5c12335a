"""The package as others import it: light, under its old names too, and where only torch and Lightning are installed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import StrategyRegistry

import zolightning
from zolightning._answers import needs
from zolightning._moved import MOVED
from zolightning.strategy.by_name import register_by_name

pytestmark = pytest.mark.integration

PYPROJECT = Path(zolightning.__file__).parent.parent / "pyproject.toml"

BARE = """
import sys
from importlib.metadata import MetadataPathFinder, requires
from packaging.requirements import Requirement

def closure(*names):
    "What pip would install with these packages and nothing else."
    seen, queue = set(), list(names)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            found = map(Requirement, requires(name) or ())
            queue += [r.name for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return seen

ASKED = ("psutil", "mlflow", "safetensors", "transformers", "peft", "gguf", "matplotlib", "bitsandbytes", "streamlit", "pandas",
         "requests", "accelerate", "jsonargparse", "datasets", "triton", "uplot", "torchao")
HIDDEN = set(ASKED) - closure("torch", "lightning")

class Others:
    "All finders there were, for packages that are not hidden."

    finders = [*sys.meta_path]

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

    def find_distributions(self, context):
        return (d for d in MetadataPathFinder.find_distributions(context) if d.metadata["Name"] not in HIDDEN)

    def invalidate_caches(self):
        pass

sys.meta_path[:] = [Others()]
"""

TRAIN = """
import zolightning
import lightning as L
import torch
from torch import nn

class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

L.seed_everything(0, verbose=False)
x = torch.randn(64, 8)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x @ torch.randn(8, 1)), batch_size=16)
module = Regression()
before = nn.functional.mse_loss(module.layer(x), data.dataset.tensors[1]).item()
trainer = L.Trainer(strategy="zo", max_epochs=40, accelerator="cpu", enable_progress_bar=False, logger=True)
trainer.fit(module, data)
after = nn.functional.mse_loss(module.layer(x), data.dataset.tensors[1]).item()
assert after < 0.5 * before, (before, after)
from pathlib import Path
assert list(Path().rglob("ledger.zo"))
"""

REFUSED = """
for name, package in (("ZOMonitor", "psutil"), ("mlflow_logger", "mlflow"), ("quantize", "bitsandbytes")):
    try:
        thing = getattr(zolightning, name)
        thing(*((nn.Sequential(nn.Linear(64, 64)),) if name == "quantize" else ()))
    except ImportError as error:
        assert package in str(error) and 'pip install "zolightning"' in str(error), error
    else:
        raise AssertionError(name)
print("trained and refused")
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return done.stdout


def test_importing_it_imports_neither_torch_nor_lightning_and_changes_no_variable() -> None:
    run(
        "import os, sys; before = dict(os.environ); import zolightning; "
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules); assert before == dict(os.environ)"
    )


@pytest.mark.parametrize("name", ["zo", "zolightning.ZOStrategy"])
def test_lightning_knows_the_strategy_by_name(name: str) -> None:
    """Where Lightning is imported first; the next test imports this package first."""
    kept = StrategyRegistry.pop(name.lower())  # monkeypatch would put back the outcome of get(), which makes a strategy
    register_by_name()
    assert StrategyRegistry[name.lower()].keys() == kept.keys()
    trainer = pl.Trainer(strategy=name, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is zolightning.ZOStrategy


def test_it_trains_where_only_torch_and_lightning_are_installed() -> None:
    assert "trained and refused" in run(BARE + TRAIN + REFUSED)


@pytest.mark.slow
def test_it_trains_in_an_environment_with_only_torch_and_lightning(tmp_path: Path) -> None:
    """The same without a simulation: a new environment, one to two minutes and some 300 MB from the package index."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    python = str(tmp_path / "bin" / "python")
    constraints = PYPROJECT.with_name("constraints.txt")
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "-c", str(constraints), "torch", "lightning"], check=True)
    subprocess.run([*install, "--no-deps", str(PYPROJECT.parent)], check=True)
    done = subprocess.run([python, "-c", TRAIN + REFUSED], cwd=tmp_path, capture_output=True, text=True)
    assert "trained and refused" in done.stdout, done.stderr


def test_every_public_name_is_there() -> None:
    for name in zolightning.__all__:
        assert getattr(zolightning, name) is not None
    assert set(zolightning.__all__) <= set(dir(zolightning))
    typed = {
        alias.name
        for node in ast.walk(ast.parse(Path(zolightning.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert set(zolightning.__all__) <= typed
    with pytest.raises(AttributeError, match="no attribute 'ZOStrateggy'"):
        zolightning.ZOStrateggy  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_old_names_import_the_same_module_and_say_where_it_is(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__ is not None
    assert module.__spec__.name == MOVED[old]


def test_what_is_missing_is_answered_by_the_line_that_installs_it() -> None:
    with (
        pytest.raises(
            ImportError,
            match=r'^reading x.gguf needs the package nowhere.*Run `pip install "zolightning\[demo\]"`, or read another\.$',
        ),
        needs("nowhere", "reading x.gguf", "zolightning[demo]", ", or read another"),
    ):
        import nowhere  # type: ignore[import-not-found]  # noqa: F401
