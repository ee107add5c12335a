"""Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs.

Importing this package imports neither torch nor Lightning: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._moved import keep_old_names
from ._version import __version__
from .strategy.by_name import register_by_name

if TYPE_CHECKING:
    from .adapt.quantize import quantize
    from .engine.session import Session
    from .methods import recipes
    from .methods.config import ZOConfig
    from .mixin import ZOMixin
    from .records.forgetting import Forgetting
    from .records.mlflow_logger import mlflow_logger
    from .records.monitor import ZOMonitor
    from .space import Cycle, Epochs, Groups, LowRank, Sparse, Structure, expose_scales
    from .strategy.ledger_io import LedgerCheckpointIO
    from .strategy.strategy import ZOStrategy

__all__ = [
    "Cycle",
    "Epochs",
    "Forgetting",
    "Groups",
    "LedgerCheckpointIO",
    "LowRank",
    "Session",
    "Sparse",
    "Structure",
    "ZOConfig",
    "ZOMixin",
    "ZOMonitor",
    "ZOStrategy",
    "__version__",
    "expose_scales",
    "mlflow_logger",
    "quantize",
    "recipes",
]

_HOMES = {
    "Cycle": ".space",
    "Epochs": ".space",
    "Forgetting": ".records.forgetting",
    "Groups": ".space",
    "LedgerCheckpointIO": ".strategy.ledger_io",
    "LowRank": ".space",
    "Session": ".engine.session",
    "Sparse": ".space",
    "Structure": ".space",
    "ZOConfig": ".methods.config",
    "ZOMixin": ".mixin",
    "ZOMonitor": ".records.monitor",
    "ZOStrategy": ".strategy.strategy",
    "expose_scales": ".space",
    "mlflow_logger": ".records.mlflow_logger",
    "quantize": ".adapt.quantize",
}

keep_old_names()
register_by_name()


def __getattr__(name: str) -> Any:
    """A public name from its home, or a module of this package, on its first use (PEP 562)."""
    if name in _HOMES:
        try:
            value = getattr(import_module(_HOMES[name], __name__), name)
        except ModuleNotFoundError as error:  # an installation without its dependencies
            raise ImportError(f'`zolightning.{name}`: {error}. Run `pip install "zolightning"`.') from error
    elif name == "recipes":
        value = import_module(".methods.recipes", __name__)
    else:
        try:
            value = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
