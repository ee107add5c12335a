"""Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs."""

from . import recipes
from ._version import __version__
from .config import ZOConfig
from .ledger_io import LedgerCheckpointIO
from .mixin import ZOMixin
from .monitor import ZOMonitor
from .onednn import keep_few_shapes
from .quantize import quantize
from .space import Cycle, LowRank, Sparse, Structure, expose_scales
from .strategy import ZOStrategy
from .tracking import mlflow_logger

keep_few_shapes()  # before the first product, or it has no effect

__all__ = [
    "Cycle",
    "LedgerCheckpointIO",
    "LowRank",
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
