"""``Trainer(strategy="zo")`` after a bare ``import zolightning``, which itself imports neither torch nor Lightning.

Lightning looks strategies up in a registry and has no entry point for other packages. So the name is registered at once where
Lightning has been imported, and else as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .strategy import ZOStrategy

NAMES = ("zo", "zolightning.zostrategy")
"""The second is the lower-case form in which ``--trainer.strategy=zolightning.ZOStrategy`` arrives."""

_HOMES = ("lightning.pytorch.strategies", "pytorch_lightning.strategies")


def _make(**options: Any) -> ZOStrategy:
    from .strategy import ZOStrategy

    return ZOStrategy(**options)


def _register(strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    for name in NAMES:
        if name not in registry:
            registry.register(name, _make, description="zeroth-order training: forward passes only")


class _OnImport(MetaPathFinder):
    """Registers the names when Lightning's strategies have been imported; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOMES:
            return None
        sys.meta_path.remove(self)  # its work is done, and the next line asks the other finders
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_by_name() -> None:
    """Make :data:`NAMES` known to Lightning, now or when it is imported."""
    loaded = [sys.modules[home] for home in _HOMES if home in sys.modules]
    for strategies in loaded:
        _register(strategies)
    if not loaded:
        sys.meta_path.insert(0, _OnImport())
