"""``Trainer(strategy=ZOStrategy())``: training steps from forward passes only.

An adapter from Lightning's hooks to :class:`~zolightning.engine.session.Session`. The path of one step: ``training_step``
has the session run all probes; ``backward`` fires Lightning's hooks and nothing else; ``optimizer_step`` has the session
clip and shape the projected gradients, record the step and apply it through the user's optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from ..engine.session import Session
from ..engine.updates import UpdateStats
from ..methods.config import Overrides, ZOConfig
from ..methods.estimators import Estimator
from ..methods.recipes import name_of
from ..methods.recipes import recipe as named_recipe
from ..mixin import ZOMixin
from ..offload import Offload, stored
from ..parallel import Parallel, tensors_of
from ..parallel.layout import Mode
from ..space import View, expose_scales
from ..types import StateDict, StepOutput, StepRecord
from . import checkpoints
from ._lightning import (
    DoublePrecision,
    FabricStrategy,
    MisconfigurationException,
    SingleDeviceStrategy,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from .devices import DevicesStrategy
from .fit import Fit
from .ledger_io import files_folder, keeps_positions
from .muted import muted, steps_of_epoch
from .offloading import InMemory, residency
from .requirements import check_backprop, check_fit, check_layers, check_ranks
from .run_ledger import RunLedger


class ZOStrategy(DevicesStrategy):
    """Zeroth-order training on one device or several: no backward pass, the memory of inference.

    Args:
        recipe: a name from :data:`zolightning.recipes.RECIPES`, or a :class:`~zolightning.ZOConfig`.
        accelerator: as for any Lightning strategy; the Trainer fills it in.
        checkpoint_io: likewise.
        precision_plugin: likewise.
        ledger: where the replay ledger goes, from which :mod:`zolightning.ledger` rebuilds the weights of any step. True:
            ``ledger.zo`` beside the run's checkpoints, if the run keeps any files; a path; False: none.
        offload: where weights are while no operation needs them: "cpu" or "disk", or an :class:`~zolightning.offload.Offload`.
            None: in memory.
        parallel: how the Trainer's processes share a step, where it has several: 'data', 'query', 'sign', 'data+sign', or a
            :class:`~zolightning.parallel.Parallel`.
        cluster_environment: says who starts them, as for any Lightning strategy; the Trainer finds out.
        **overrides: fields of :class:`~zolightning.ZOConfig` that replace the recipe's, as in
            ``ZOStrategy("mezo", lr=1e-7)`` or ``ZOStrategy(eps=1e-3, num_queries=4)``.

    Raises:
        ValueError, TypeError: unknown recipe, field or value.
    """

    strategy_name = "zo"

    def __init__(
        self,
        recipe: str | ZOConfig = "default",
        *,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        ledger: bool | str | Path = True,
        offload: Literal["cpu", "disk"] | Offload | None = None,
        parallel: Mode | Parallel = "data",
        cluster_environment: Any = None,
        **overrides: Unpack[Overrides],
    ) -> None:
        how = parallel if isinstance(parallel, Parallel) else Parallel(parallel)
        super().__init__(how, accelerator, checkpoint_io, precision_plugin, cluster_environment)
        base = recipe if isinstance(recipe, ZOConfig) else named_recipe(recipe)
        self.config = base.override(**overrides)
        self.recipe_name = recipe if isinstance(recipe, str) else name_of(recipe)
        self.ledger, self.offload = ledger, offload
        self.measure_update = False
        """Set it to get ``last_stats`` of the next step."""
        self._loaded_from = ""
        self._weights: InMemory | None = None
        self._fit: Fit | None = None

    # the fit that runs, or the last one

    @property
    def fit(self) -> Fit:
        """Made by a fit's set-up; readable until the next one.

        Raises:
            RuntimeError: there was none yet.
        """
        if self._fit is None:
            raise RuntimeError("ZOStrategy has not been set up for a fit; call trainer.fit(...) first")
        return self._fit

    @property
    def session(self) -> Session:
        """Its engine."""
        return self.fit.session

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule."""
        module = self.lightning_module
        if module is None:
            raise RuntimeError("ZOStrategy has no LightningModule yet; call trainer.fit(...) first")
        return module

    @property
    def estimator(self) -> Estimator:
        return self.session.estimator

    @property
    def seed(self) -> int:
        """Seed of the perturbations."""
        return self.session.seed

    @property
    def zo_step(self) -> int:
        """Optimizer steps taken: the step of the next perturbation's key."""
        return 0 if self._fit is None else self._fit.session.step

    @property
    def records(self) -> list[StepRecord]:
        """Optimizer steps of the last batch: none inside an accumulation window, several in a manual training step."""
        return [] if self._fit is None else self._fit.records

    @property
    def last_record(self) -> StepRecord | None:
        """The last optimizer step."""
        return None if self._fit is None else self._fit.session.last_record

    @property
    def last_stats(self) -> UpdateStats | None:
        """The changes of the last update."""
        return None if self._fit is None else self._fit.session.last_stats

    @property
    def ledger_path(self) -> Path | None:
        """Where its replay ledger goes; None when it keeps none."""
        return None if self._fit is None else self._fit.ledger.path

    def view(self, optimizer: Optimizer) -> View:
        """The subspace that this optimizer's steps search now; known from its first step on."""
        return self.session.view(optimizer)

    @property
    def weights(self) -> InMemory:
        """Where the module's weights are; in memory until the strategy is set up."""
        return self._weights or InMemory(self.module)

    # set-up

    @property
    def _precision(self) -> Any:
        """Fabric asks for it first."""
        raise MisconfigurationException(
            "ZOStrategy drives a Trainer, and Fabric has none; in a loop of your own use zolightning.Session: "
            "`session = Session(model, optimizer)`, then `session.estimate(loss_fn, batch); session.update()` for each batch"
        )

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != "fit":  # a checkpoint saved after a test is that of the fit before it
            super().setup(trainer)
            if self.team is not None:
                self.team.equalize(tensors_of(self.module))
            return
        before, self._fit = self._fit, None
        super().setup(trainer)
        check_fit(self.module, self.optimizers, self.config)
        check_backprop(self.config, self.is_distributed, self._offloads, getattr(self.precision_plugin, "precision", ""))
        self._fit = self._begin(trainer)
        if before is not None:
            self._fit.session.follow(before.session)
        if self.team is not None:
            self.team.ledger = self.team.decide(lambda: str(self.ledger_path or ""))

    def _begin(self, trainer: pl.Trainer) -> Fit:
        module, plugin = self.module, self.precision_plugin
        settings = {"recipe": self.recipe_name, **self.config.to_dict()}
        choice = self.ledger if self.is_global_zero else False  # rank 0 writes for all
        ledger = RunLedger(trainer, choice, settings, keeps_positions(self.checkpoint_io))
        others = [c for c in trainer.callbacks if not isinstance(c, RunLedger)]  # type: ignore[attr-defined]
        trainer.callbacks[:] = [ledger, *others]  # type: ignore[attr-defined]
        self.weights.begin(ledger.pending)
        session = Session(
            module,
            self.optimizers,
            self.config,
            schedulers=[c.scheduler for c in self.lr_scheduler_configs],
            precision=str(getattr(plugin, "precision", "")),
            device=self.root_device,
            repeatable=isinstance(module, ZOMixin),
            muted=partial(muted, trainer),
            ledger=ledger.pending,
            apply=self.weights.apply,
            ranks=self.team,
            epoch=partial(steps_of_epoch, trainer),
            folder=files_folder(trainer),
            inform=rank_zero_info,
            warn=rank_zero_warn,
        )
        return Fit(session, ledger, module, plugin)

    def on_validation_start(self) -> None:
        """Evaluate one model: the buffers of rank 0, as the statistics of BatchNorm, are the run's."""
        super().on_validation_start()
        buffers = dict(self.module.named_buffers())
        if self.team is not None and self._fit is not None and (names := self.team.equalize(buffers)):
            self._fit.session.notices.once(
                "buffers",
                f"ZO: {len(names)} buffers, as {names[0]!r}, follow each rank's own batches; those of rank 0 are the run's, "
                "and all ranks take them before each validation",
                rank_zero_info,
            )

    def model_to_device(self) -> None:
        module = self.module
        self.refuse_ranks()
        if self.team is not None and self._offloads:  # while they can be sent
            self.team.equalize(tensors_of(module))
        self._weights = residency(self.offload, module, self.root_device, module.trainer, self.checkpoint_io, self.team)
        super().model_to_device()
        check_layers(module, self.recipe_name)
        if self.config.scales != "frozen":  # only now are the layers quantised, and the optimizers come next
            expose_scales(module)

    def refuse_ranks(self) -> None:
        """Refuse settings that do not go with several processes."""
        check_ranks(self.is_distributed, self.config)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint's scales need their Parameters, and offloaded weights their store."""
        return self.config.scales != "frozen" or self._offloads

    @property
    def _offloads(self) -> bool:
        module = self.lightning_module
        return self.offload is not None or (module is not None and bool(stored(module.parameters())))

    def traffic(self) -> dict[str, float]:
        """Bytes and seconds that offload and the exchange between ranks have cost since this fit began."""
        return self.weights.traffic() | (self.team.traffic() if self.team is not None else {})

    def teardown(self) -> None:
        try:
            if self._fit is not None:
                self._fit.close()
        finally:
            if self._weights is not None:
                self._weights.close()
        super().teardown()

    # one step

    def training_step(self, *args: Any, **kwargs: Any) -> StepOutput:
        fit, step = self.fit, partial(super().training_step, *args, **kwargs)
        with self.leaving():
            return fit.probe(step, args[0], counts=not self.stands_in())

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return self.fit.backward(closure_loss)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        fit = self.fit
        with self.leaving():
            return fit.update(optimizer, closure, self.measure_update)

    # checkpoints

    def lightning_module_state_dict(self) -> StateDict:
        return self.weights.state_dict()

    def save_checkpoint(self, checkpoint: StateDict, filepath: Any, storage_options: Any = None) -> None:
        if self._fit is not None and self.is_global_zero:
            checkpoint = checkpoints.saved(
                checkpoint,
                self._fit.session,
                self._fit.ledger.pending,
                self.module,
                positions=keeps_positions(self.checkpoint_io),
                away=self.weights.away,
                warn=partial(self._fit.session.notices.once, "whole"),
            )
        if self._fit is not None:
            self.weights.save()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> StateDict:
        checkpoint: StateDict = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        self._loaded_from = str(checkpoint_path)
        if not self._offloads:
            checkpoints.check_whole(checkpoint, self._loaded_from)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.module
        if self._fit is not None:  # a tuner's trial may be over, and the weights go back to where it began
            self._fit.ledger.restart(module.trainer)
        if isinstance(self.precision_plugin, DoublePrecision):  # else Lightning loads float64 weights into float32 ones
            self.precision_plugin.convert_module(module)
        self.weights.load(checkpoint, self._loaded_from, strict)

    def optimizer_state(self, optimizer: Optimizer) -> StateDict:
        """The groups of the module's optimizer, and the state of the optimizer that applies its steps."""
        return self.session.optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._fit is not None:
            states = self.weights.optimizer_states(checkpoint["optimizer_states"])
            whole = {**checkpoint, "optimizer_states": states}
            pending = self._fit.ledger.pending
            self._fit.resumed_rng = checkpoints.restored(whole, self._fit.session, pending, self._loaded_from)


# Lightning allows a compiled LightningModule only under strategies it knows; this is a single device to it
SingleDeviceStrategy.register(ZOStrategy)
FabricStrategy.register(ZOStrategy)  # so that Fabric comes as far as ZOStrategy._precision, which names the way

__all__ = ["ZOStrategy"]
