"""Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs."""

from . import recipes
from .config import ZOConfig
from .mixin import ZOMixin
from .strategy import ZOStrategy

__version__ = "0.1.0"
__all__ = ["ZOConfig", "ZOMixin", "ZOStrategy", "recipes"]
