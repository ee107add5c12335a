"""Modules that were public under another name: the old name still imports the module, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "zolightning.config": "zolightning.methods.config",
    "zolightning.estimators": "zolightning.methods.estimators",
    "zolightning.fakequant": "zolightning.adapt.fakequant",
    "zolightning.interventions": "zolightning.adapt.interventions",
    "zolightning.ledger_io": "zolightning.strategy.ledger_io",
    "zolightning.memory": "zolightning.records.memory",
    "zolightning.monitor": "zolightning.records.monitor",
    "zolightning.optimizers": "zolightning.methods.optimizers",
    "zolightning.outbox": "zolightning.records.outbox",
    "zolightning.peft": "zolightning.adapt.peft",
    "zolightning.recipes": "zolightning.methods.recipes",
    "zolightning.tracking": "zolightning.records.mlflow_logger",
}
"""Old name to new name. ``zolightning.quantize`` is the function of that name."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} has moved to {MOVED[old]}; please import it from there", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(MOVED[old])  # the import system hands out the module that stands here


def keep_old_names() -> None:
    """Let the import system find the old names, after all that really exist."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
