"""The one place that knows where Lightning lives: ``lightning``, or ``pytorch_lightning`` where only that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("lightning") is not None:
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from lightning.fabric.strategies import Strategy as FabricStrategy
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.fabric.utilities.distributed import _sync_ddp_if_available
    from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import MLFlowLogger
    from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
    from lightning.pytorch.plugins.precision import DoublePrecision, Precision
    from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy, Strategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
else:
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments import ClusterEnvironment
    from lightning_fabric.strategies import Strategy as FabricStrategy
    from lightning_fabric.utilities.apply_func import move_data_to_device
    from lightning_fabric.utilities.distributed import _sync_ddp_if_available
    from lightning_fabric.utilities.logger import _convert_params, _flatten_dict
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint
    from pytorch_lightning.loggers import MLFlowLogger
    from pytorch_lightning.plugins.io import CheckpointIO, TorchCheckpointIO
    from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
    from pytorch_lightning.plugins.precision import DoublePrecision, Precision
    from pytorch_lightning.strategies import ParallelStrategy, SingleDeviceStrategy, Strategy
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = [
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "DoublePrecision",
    "FabricStrategy",
    "MLFlowLogger",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ParallelStrategy",
    "Precision",
    "SingleDeviceStrategy",
    "Strategy",
    "TorchCheckpointIO",
    "_MultiProcessingLauncher",
    "_ResultCollection",
    "_SubprocessScriptLauncher",
    "_WrappingCheckpointIO",
    "_convert_params",
    "_flatten_dict",
    "_sync_ddp_if_available",
    "move_data_to_device",
    "pl",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
