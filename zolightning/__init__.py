"""Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs."""

from ._version import __version__
from .adapt.quantize import quantize
from .methods import recipes
from .methods.config import ZOConfig
from .mixin import ZOMixin
from .records.mlflow_logger import mlflow_logger
from .records.monitor import ZOMonitor
from .space import Cycle, LowRank, Sparse, Structure, expose_scales
from .strategy.ledger_io import LedgerCheckpointIO
from .strategy.onednn import keep_few_shapes
from .strategy.strategy import ZOStrategy

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
