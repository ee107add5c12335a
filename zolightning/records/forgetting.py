"""How far a fit goes from the model that it began with: its weights, and its loss on text of other kinds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.anchor import StartingWeights
from ..strategy._lightning import Callback, MisconfigurationException, pl, rank_zero_warn
from ..strategy.strategy import ZOStrategy
from .mlflow_logger import MetricBuffer


class Forgetting(Callback):
    r"""Logs how much a model forgets while it learns: at the start, after each validation, and at the end.

    Metrics: ``forgetting/drift``, :math:`\lVert\theta - \theta_0\rVert / \lVert\theta_0\rVert` over the trained weights (the
    measure of 2605.30148), and ``forgetting/perplexity`` on text that the fit does not train on. Works under any strategy with
    whole weights in memory. The first weights go to a file beside the checkpoints, as large as the trained weights, which a
    resumed fit reads again; it stays until you delete it.

    Args:
        perplexity: gives the perplexity of the model as it is, for example
            ``partial(text_perplexity, model, tokenizer, general_text())``; None: only the drift is logged.

    Raises:
        MisconfigurationException: the weights are offloaded, so that they are not in memory.
    """

    def __init__(self, perplexity: Callable[[], float] | None = None) -> None:
        self.perplexity = perplexity
        self._start: StartingWeights | None = None
        self._saved = ""
        self._logged = -1

    def state_dict(self) -> dict[str, Any]:
        return {"path": "" if self._start is None else str(self._start.path.absolute())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["path"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        strategy = trainer.strategy
        if isinstance(strategy, ZOStrategy) and strategy.offload is not None:
            raise MisconfigurationException(
                "Forgetting compares weights in memory, not those of `ZOStrategy(offload=...)`; leave one of them out"
            )
        path, self._saved = Path(self._saved), ""
        if trainer.ckpt_path is None or not path.is_file():
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    "The weights that the resumed fit began with are not kept, so `forgetting/drift` counts from now."
                )
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix="first-weights-", suffix=".bin", delete=False) as file:
                path = Path(file.name)
        weights = {id(p): p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        self._start = StartingWeights(path, list(weights.values()))
        self._buffer = MetricBuffer(trainer.loggers, Path(trainer.default_root_dir))
        self._log(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)
        if self._start is not None:
            self._buffer.flush(wait=True)

    def _log(self, trainer: pl.Trainer) -> None:
        if self._start is None or trainer.global_step == self._logged:
            return
        self._logged = trainer.global_step
        metrics = {"forgetting/drift": self._start.drift()}
        if self.perplexity is not None:
            metrics["forgetting/perplexity"] = self.perplexity()
        self._buffer.add(metrics, trainer.global_step)
