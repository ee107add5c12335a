"""Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs."""

from . import recipes
from .config import ZOConfig
from .mixin import ZOMixin
from .monitor import ZOMonitor
from .strategy import ZOStrategy
from .tracking import mlflow_logger

__version__ = "0.1.0"
__all__ = ["ZOConfig", "ZOMixin", "ZOMonitor", "ZOStrategy", "mlflow_logger", "recipes"]
