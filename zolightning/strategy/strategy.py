"""``Trainer(strategy=ZOStrategy())``: training steps from forward passes only.

An adapter from Lightning's hooks to :class:`~zolightning.engine.session.Session`. The path of one step: ``training_step``
has the session run all probes; ``backward`` fires Lightning's hooks and nothing else; ``optimizer_step`` has the session
clip and shape the projected gradients, record the step and apply it through the user's optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ..engine.session import Session
from ..methods.config import Overrides, ZOConfig
from ..methods.ranking import forward_of
from ..methods.recipes import name_of
from ..methods.recipes import recipe as named_recipe
from ..mixin import ZOMixin
from ..offload import Offload, stored
from ..parallel import Parallel
from ..parallel.layout import Mode
from ..probing.isolation import set_rng_state
from ..space import expose_scales
from ..types import StepOutput
from . import checkpoints
from ._lightning import (
    DoublePrecision,
    FabricStrategy,
    MisconfigurationException,
    Precision,
    SingleDeviceStrategy,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from .fit_state import FitStrategy
from .ledger_io import keeps_positions
from .muted import muted
from .offloading import residency
from .requirements import DRAWS_BATCHES, NEEDS_CLOSURE, NEEDS_LOSS, check_fit, check_layers, check_ranks
from .run_ledger import RunLedger


class ZOStrategy(FitStrategy):
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
        self._loaded_from = ""
        self._resumed_rng: dict[str, Any] | None = None
        self._inside_closure, self._counts = False, True
        self._closure_loss: Tensor | None = None

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
                self.team.equalize(self.module)
            return
        before, self._session, self._run_ledger, self._resumed_rng = self._session, None, None, None
        super().setup(trainer)
        module = self.module
        check_fit(module, self.optimizers, self.config)
        settings = {"recipe": self.recipe_name, **self.config.to_dict()}
        choice = self.ledger if self.is_global_zero else False  # rank 0 writes for all
        self._run_ledger = RunLedger(trainer, choice, settings, keeps_positions(self.checkpoint_io))
        others = [c for c in trainer.callbacks if not isinstance(c, RunLedger)]  # type: ignore[attr-defined]
        trainer.callbacks[:] = [self._run_ledger, *others]  # type: ignore[attr-defined]
        self.weights.begin(self._run_ledger.pending)
        self._session = Session(
            module,
            self.optimizers,
            self.config,
            schedulers=[c.scheduler for c in self.lr_scheduler_configs],
            precision=str(getattr(self.precision_plugin, "precision", "")),
            device=self.root_device,
            repeatable=isinstance(module, ZOMixin),
            muted=partial(muted, trainer),
            ledger=self._run_ledger.pending,
            apply=self.weights.apply,
            ranks=self.team,
            inform=rank_zero_info,
            warn=rank_zero_warn,
        )
        if before is not None:
            self._session.follow(before)
        if self.team is not None:
            self.team.ledger = self.team.decide(lambda: str(self.ledger_path or ""))
        # Lightning clips the parameters that the precision plugin names: give it the projected gradients
        self._projected = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.precision_plugin.main_params = lambda optimizer: iter([self._projected])  # type: ignore[method-assign]

    def on_validation_start(self) -> None:
        """Evaluate one model: the buffers of rank 0, as the statistics of BatchNorm, are the run's."""
        super().on_validation_start()
        if self.team is not None and self._session is not None and (names := self.team.equalize(self.module)):
            self._session.notices.once(
                "buffers",
                f"ZO: {len(names)} buffers, as {names[0]!r}, follow each rank's own batches; those of rank 0 are the run's, "
                "and all ranks take them before each validation",
                rank_zero_info,
            )

    def model_to_device(self) -> None:
        module = self.module
        self.refuse_ranks()
        self._weights = residency(self.offload, module, self.root_device, module.trainer, self.checkpoint_io)
        super().model_to_device()
        check_layers(module, self.recipe_name)
        if self.config.scales != "frozen":  # only now are the layers quantised, and the optimizers come next
            expose_scales(module)

    def refuse_ranks(self) -> None:
        """Refuse settings that do not go with several processes."""
        check_ranks(self.is_distributed, self._offloads, self.config)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint's scales need their Parameters, and offloaded weights their store."""
        return self.config.scales != "frozen" or self._offloads

    @property
    def _offloads(self) -> bool:
        module = self.lightning_module
        return self.offload is not None or (module is not None and bool(stored(module.parameters())))

    def teardown(self) -> None:
        try:
            if self._session is not None:
                self._session.close()
        finally:
            if self._weights is not None:
                self._weights.close()
        self.precision_plugin.__dict__.pop("main_params", None)
        super().teardown()

    # one step

    def training_step(self, *args: Any, **kwargs: Any) -> StepOutput:
        with self.leaving():
            return self._training_step(*args, **kwargs)

    def _training_step(self, *args: Any, **kwargs: Any) -> StepOutput:
        module, session = self.module, self.session
        self._resume_rng(module.trainer)
        self.records = []
        self._counts = not self.stands_in(module.trainer.fit_loop.epoch_loop.batch_idx)
        if not module.automatic_optimization:  # the probes run inside opt.step(closure=...)
            with torch.no_grad():
                return super().training_step(*args, **kwargs)
        if isinstance(args[0], Iterator):
            raise MisconfigurationException(DRAWS_BATCHES)
        if isinstance(module, ZOMixin):
            prepare = None if type(module).zo_prepare is ZOMixin.zo_prepare else self._in_precision(module.zo_prepare)
            forward = self._in_precision(forward_of(module, session.estimator))
            estimate = session.estimate(forward, args[0], prepare=prepare, counts=self._counts)
        else:
            step = super().training_step
            estimate = session.estimate(lambda _: step(*args, **kwargs), args[0], counts=self._counts)
        if estimate is None:  # Lightning refuses None where other processes go on
            return torch.tensor(torch.nan, device=self.root_device) if self.is_distributed else None
        # Lightning wants a tensor for its loops and progress bar; the doubles stay in the estimate
        loss = torch.tensor(estimate.loss, dtype=torch.float32, device=self.root_device)
        return {**estimate.output, "loss": loss} if isinstance(estimate.output, Mapping) else loss

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """No autograd: the hooks fire, and in a manual closure the loss is noted."""
        module, plugin = self.module, self.precision_plugin
        if not module.automatic_optimization:
            if not self._inside_closure:
                raise MisconfigurationException(NEEDS_CLOSURE)
            self._closure_loss = closure_loss.detach()
            return self._closure_loss
        # the base class's methods: a mixed precision plugin would scale the loss
        closure_loss = Precision.pre_backward(plugin, closure_loss, module)
        return Precision.post_backward(plugin, closure_loss, module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        module, session = self.module, self.session
        if module.automatic_optimization:
            loss = closure()
        else:
            forward = self._in_precision(partial(self._manual_loss, closure))
            estimate = session.estimate(forward, optimizer=optimizer, counts=self._counts)
            loss = None if estimate is None else estimate.loss
        session.measure_update = self.measure_update
        with torch.no_grad(), self.leaving():
            self.records.append(session.update(optimizer, clip=partial(self._clipped, optimizer)))
        return loss

    def _in_precision(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def inside(batch: Any) -> Any:
            with self.precision_plugin.train_step_context():
                return call(batch)

        return inside

    def _manual_loss(self, closure: Callable[[], Any], _: Any) -> StepOutput:
        self._inside_closure, self._closure_loss = True, None
        try:
            returned = closure()
        finally:
            self._inside_closure = False
        loss = returned if returned is not None else self._closure_loss
        if loss is None:
            raise MisconfigurationException(NEEDS_LOSS)
        return loss

    def _clipped(self, optimizer: Optimizer, values: Sequence[float]) -> list[float]:
        """The projected gradients after Lightning's gradient clipping and its hooks."""
        raw = torch.tensor(values, dtype=torch.float64)
        self._projected.data, self._projected.grad = torch.zeros_like(raw), raw.clone()
        self.precision_plugin._after_closure(self.module, optimizer)
        clipped = self._projected.grad
        return list(values) if clipped is None else [float(v) for v in clipped]

    # checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.weights.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._session is not None and self._run_ledger is not None and self.is_global_zero:
            checkpoint = checkpoints.saved(
                checkpoint,
                self._session,
                self._run_ledger.pending,
                self.module,
                positions=keeps_positions(self.checkpoint_io),
                away=self.weights.away,
                warn=partial(self._session.notices.once, "whole"),
            )
            self.weights.save()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        self._loaded_from = str(checkpoint_path)
        if not self._offloads:
            checkpoints.check_whole(checkpoint, self._loaded_from)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.module
        if self._run_ledger is not None:  # a tuner's trial may be over, and the weights go back to where it began
            self._run_ledger.restart(module.trainer)
        if isinstance(self.precision_plugin, DoublePrecision):  # else Lightning loads float64 weights into float32 ones
            self.precision_plugin.convert_module(module)
        self.weights.load(checkpoint, self._loaded_from, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The groups of the module's optimizer, and the state of the optimizer that applies its steps."""
        return self.session.optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._run_ledger is not None:
            states = self.weights.optimizer_states(checkpoint["optimizer_states"])
            whole = {**checkpoint, "optimizer_states": states}
            self._resumed_rng = checkpoints.restored(whole, self.session, self._run_ledger.pending)

    def _resume_rng(self, trainer: pl.Trainer) -> None:
        """In the middle of an epoch the data loader, which draws a seed when it starts, has moved the generator since."""
        if self._resumed_rng is not None and trainer.fit_loop.epoch_loop.batch_progress.current.ready > 1:
            set_rng_state(self._resumed_rng, self.root_device)
        self._resumed_rng = None


# Lightning allows a compiled LightningModule only under strategies it knows; this is a single device to it
SingleDeviceStrategy.register(ZOStrategy)
FabricStrategy.register(ZOStrategy)  # so that Fabric comes as far as ZOStrategy._precision, which names the way

__all__ = ["ZOStrategy"]
