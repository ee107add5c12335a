"""``Trainer(strategy=ZOStrategy())``: training steps by forward passes alone.

The path of one step: :meth:`ZOStrategy.training_step` runs all probes (``estimators``) through the view of the weights
(``space``); :meth:`ZOStrategy.backward` fires Lightning's hooks and nothing else; :meth:`ZOStrategy.optimizer_step` clips
and shapes the projected gradients (``step``, ``shaping``), makes the record, and applies it through the user's
optimizer (``updates``). What is searched is found in ``search``; the record goes into the ``run_ledger``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ._lightning import (
    DoublePrecision,
    MisconfigurationException,
    Precision,
    SingleDeviceStrategy,
    StrategyRegistry,
    _ResultCollection,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from .config import Overrides, ZOConfig
from .isolation import Isolation, rng_state, set_rng_state
from .ledger import LedgerError, Position, Recorder
from .ledger_io import STATE, keeps_positions, lean
from .mixin import ZOMixin
from .objective import BatchObjective, batch_examples, loss_value
from .one_device import OneDeviceStrategy
from .optimizers import OPTIMIZERS, follow, in_place_of, is_plain_sgd
from .rates import base_lr, override_lr
from .recipes import recipe as named_recipe
from .run_ledger import RunLedger
from .search import Calibration, Search, compute_dtype, new_search, trainable
from .shaping import State, state_from
from .space import View, expose_scales
from .step import finish, keep_best, merge, zo_step
from .ties import TieWatch
from .types import Estimate, Key, SkipStep, StepRecord, Term
from .uninterrupted import uninterrupted
from .updates import UpdateStats, apply_update, widened_state


class _Muted(_ResultCollection):
    """Swallows ``self.log`` in the forwards of a step after the first."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ZOStrategy(OneDeviceStrategy):
    """Zeroth-order training on one device: no backward pass, the memory of inference.

    Args:
        recipe: a name from :data:`zolightning.recipes.RECIPES`, or a :class:`~zolightning.ZOConfig`.
        accelerator: as for any Lightning strategy; the Trainer fills it in.
        checkpoint_io: likewise.
        precision_plugin: likewise.
        ledger: where the replay ledger goes, from which :mod:`zolightning.ledger` rebuilds the weights of any step. True:
            ``ledger.zo`` beside the run's checkpoints, if the run keeps any files; a path; False: none.
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
        **overrides: Unpack[Overrides],
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        base = recipe if isinstance(recipe, ZOConfig) else named_recipe(recipe)
        self.config = base.override(**overrides)
        self.recipe_name = recipe if isinstance(recipe, str) else "custom"
        self.shaping = self.config.build_shaping()
        self._shaping_states: dict[int, State] = {}
        self.seed: int | None = None
        self.zo_step = 0
        """Optimizer steps taken: the step of the next perturbation's key."""
        self.last_record: StepRecord | None = None
        self.last_stats: UpdateStats | None = None
        self.measure_update = False
        """Set by whoever wants ``last_stats`` of the next step."""
        self.ledger = ledger
        self._skips = 0
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one fit."""
        self._searches: dict[int, Search] = {}
        self._steppers: dict[Optimizer, Optimizer] = {}
        self._window: list[Estimate] = []
        self._trials: list[Callable[[Sequence[Term]], float]] = []
        self._isolation: Isolation | None = None
        self._inside_closure = False
        self._closure_loss: Tensor | None = None
        self._warned: set[str] = set()
        self._ties = TieWatch()
        self._resumed_rng: dict[str, Any] | None = None
        self._ledger: RunLedger | None = None
        self._calibration = Calibration()

    # ---- set up --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        self._forget()
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        self.seed = (torch.initial_seed() if self.config.seed is None else self.config.seed) & 0xFFFFFFFFFFFFFFFF
        module = self.lightning_module
        assert module is not None
        self._isolation = Isolation(module, self.root_device)
        precision = str(getattr(self.precision_plugin, "precision", ""))
        self.estimator = self.config.build_estimator(compute_dtype(module, precision))
        # gradient clipping goes through the precision plugin's parameters: give it the projected gradients
        self._projected = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.precision_plugin.main_params = self._clipped_parameters  # type: ignore[method-assign]
        settings = {"recipe": self.recipe_name, **self.config.to_dict()}
        self._ledger = RunLedger(trainer, self.ledger, settings, keeps_positions(self.checkpoint_io))
        others = [c for c in trainer.callbacks if not isinstance(c, RunLedger)]  # type: ignore[attr-defined]
        trainer.callbacks[:] = [self._ledger, *others]  # type: ignore[attr-defined]

    def model_to_device(self) -> None:
        super().model_to_device()
        if self.config.scales != "frozen":  # only now are the layers quantised, and the optimizers come next
            assert self.model is not None
            expose_scales(self.model)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint's scales need their Parameters."""
        return self.config.scales != "frozen"

    def _clipped_parameters(self, optimizer: Optimizer) -> Iterator[nn.Parameter]:
        yield self._projected

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if not all(optimizer.param_groups for optimizer in self.optimizers):
            raise MisconfigurationException(
                "configure_optimizers returned None, so there is nothing to train; return an optimizer (under ZOStrategy "
                "torch.optim.SGD needs no memory)"
            )
        for optimizer in self.optimizers:
            if self.config.lr is not None:
                override_lr(optimizer, [c.scheduler for c in self.lr_scheduler_configs], self.config.lr)
            self._advise(optimizer)

    def _stepper(self, optimizer: Optimizer) -> Optimizer:
        """What applies the steps of the module's ``optimizer``: itself, or the settings' in its place."""
        make = self.config.make_optimizer
        if make is None:
            return optimizer
        if optimizer not in self._steppers:
            self._steppers[optimizer] = in_place_of(optimizer, make)
        follow(self._steppers[optimizer], optimizer)
        return self._steppers[optimizer]

    def _advise(self, optimizer: Optimizer) -> None:
        plain = is_plain_sgd(self._stepper(optimizer))
        if self.config.conservative and not (plain and not any(g.get("maximize") for g in optimizer.param_groups)):
            raise MisconfigurationException(
                "conservative=True tries the step of plain SGD that minimises; use it with optimizer='sgd', without maximize"
            )
        if self.config.make_optimizer is None and not plain:
            rank_zero_warn(
                f"ZOStrategy steps through the module's {type(optimizer).__name__}, which keeps state for every trained "
                "weight; ZOStrategy(optimizer='sgd') keeps none and needs the memory of inference"
            )
        lr = base_lr(optimizer.param_groups[0])
        most = max(1e-2, 5 * (self.config.eps or 0.0))  # what bears large probes bears large steps
        if self.config.normalize and plain and not 1e-5 <= lr <= most and lr != 0:
            rank_zero_warn(
                f"with normalised steps the learning rate is the RMS change per weight and step; lr={lr:g} is far from what "
                "trains (3e-4 to 3e-3 for a pretrained model). Set it with ZOStrategy(lr=...)"
            )

    def view(self, optimizer: Optimizer) -> View:
        """What this optimizer's steps search now; known from its first step on."""
        return self._searches[id(optimizer)].view

    def _search(self, optimizer: Optimizer, forward: Callable[[Any], Any], batch: Any) -> Search:
        search = self._searches.get(id(optimizer))
        if search is None or search.trainable != trainable(optimizer):  # something was frozen, unfrozen or added
            module, config = self.lightning_module, self.config
            assert module is not None
            assert self._isolation is not None
            search = new_search(
                module, optimizer, config, self.estimator, forward, batch, self._isolation, self._muted, self._calibration
            )
            rank_zero_info(search.describe(self.estimator, sum(p.numel() for p in module.parameters())))
            self._searches[id(optimizer)] = search
        return search

    # ---- one step ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        self._resume_rng(module.trainer)
        if not module.automatic_optimization:  # the probes run inside opt.step(closure=...)
            with torch.no_grad():
                return super().training_step(*args, **kwargs)

        if isinstance(args[0], Iterator):
            raise MisconfigurationException(
                "training_step(self, dataloader_iter) draws its own batches, so the probes of a step would see different ones; "
                "under ZOStrategy take the batch as the argument"
            )
        if isinstance(module, ZOMixin):
            forward: Callable[[Any], Any] = self._module_objective
        else:
            forward = lambda _: super(ZOStrategy, self).training_step(*args, **kwargs)  # noqa: E731
        batch = self._prepare(module, args[0]) if isinstance(module, ZOMixin) else args[0]
        out, estimate = self._estimate(forward, batch, self.optimizers[0], prepared=batch is not args[0])
        if estimate is None:
            return None
        # Lightning wants a tensor for its loops and progress bar; the doubles stay in the estimate
        loss = torch.tensor(estimate.loss, dtype=torch.float32, device=self.root_device)
        return {**out, "loss": loss} if isinstance(out, Mapping) else loss

    def _resume_rng(self, trainer: pl.Trainer) -> None:
        """In the middle of an epoch the data loader, which draws a seed when it starts, has moved the generator since."""
        if self._resumed_rng is not None and trainer.fit_loop.epoch_loop.batch_progress.current.ready > 1:
            set_rng_state(self._resumed_rng, self.root_device)
        self._resumed_rng = None

    @torch.no_grad()
    def _prepare(self, module: ZOMixin, batch: Any) -> Any:
        """What the module computes once for all probes of the step."""
        if type(module).zo_prepare is ZOMixin.zo_prepare:
            return batch
        optimizer = self.optimizers[0]
        with self.precision_plugin.train_step_context():
            # the first time it says what the objective gets, from which follows what is trained and must not be read here
            search = self._searches.get(id(optimizer)) or self._search(
                optimizer, self._module_objective, module.zo_prepare(batch)
            )
            with search.view.unread():
                return module.zo_prepare(batch)

    def _module_objective(self, batch: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self.lightning_module.zo_objective(batch)  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def _estimate(
        self, forward: Callable[[Any], Any], batch: Any, optimizer: Optimizer, prepared: bool = False
    ) -> tuple[Any, Estimate | None]:
        """Run the probes; (output of the first one, the estimate), and None for a micro-batch that is skipped."""
        assert self._isolation is not None
        assert self.seed is not None
        seen = sum(len(e.terms) for e in self._window)
        try:
            search = self._search(optimizer, forward, batch)
            examples = batch_examples(batch) if search.examples.losses else None
            with self._isolation.step() as probes:
                repeats, prefix = search.examples.repeats, search.view.prefix
                objective = BatchObjective(forward, batch, probes, examples, repeats, self._muted, prefix)
                estimate = zo_step(objective, search.view, self.estimator, Key(self.seed, self.zo_step, seen))
        except SkipStep:
            return None, None
        estimate = estimate._replace(forwards=estimate.forwards + prepared)
        if news := search.view.prefix.news():
            rank_zero_info(f"ZO: {news}")
        self._warn_coarse(objective.dtype, estimate)
        self._window.append(estimate)
        if self.config.conservative:
            self._trials.append(lambda terms: self._trial(forward, batch, search.view, terms))
        return objective.first, estimate

    def _trial(self, forward: Callable[[Any], Any], batch: Any, view: View, terms: Sequence[Term]) -> float:
        """The loss of a micro-batch at θ + Σ_k c_k z_k, beside the probes."""
        assert self._isolation is not None
        with self._muted(), self._isolation.dry(), view.at(terms):
            return loss_value(forward(batch))

    @contextmanager
    def _muted(self) -> Iterator[None]:
        loop = self.lightning_module.trainer.fit_loop.epoch_loop  # type: ignore[union-attr]
        results = loop._results
        loop._results = _Muted(training=True)
        try:
            yield
        finally:
            loop._results = results

    def _warn_coarse(self, dtype: torch.dtype | None, estimate: Estimate) -> None:
        if dtype in (torch.float16, torch.bfloat16):
            self._warn_once(
                "coarse",
                f"the loss is {dtype}, whose steps are coarse beside the difference of two probes; compute it in float32 "
                "(loss_fn(logits.float(), y))",
            )
        advice = self._ties(estimate.ties, len(estimate.terms), self.estimator.eps) if estimate.terms else ""
        if advice:
            self._warn_once("ties", advice)

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(message)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """No autograd: the hooks fire, and in a manual closure the loss is noted."""
        module, plugin = self.lightning_module, self.precision_plugin
        assert module is not None
        if not module.automatic_optimization:
            if not self._inside_closure:
                raise MisconfigurationException(
                    "manual_backward(loss); opt.step() needs gradients, which ZOStrategy does not have. Give the optimizer the "
                    "loss as a function: `opt.step(closure=lambda: loss_fn(batch))` (the closure may call manual_backward)"
                )
            self._closure_loss = closure_loss.detach()
            return self._closure_loss
        # the base class's methods: a mixed precision plugin would scale the loss
        closure_loss = Precision.pre_backward(plugin, closure_loss, module)
        return Precision.post_backward(plugin, closure_loss, module)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        module = self.lightning_module
        assert module is not None
        loss = closure() if module.automatic_optimization else self._manual_estimate(optimizer, closure)
        self._update(optimizer, module)
        return loss

    def _manual_estimate(self, optimizer: Optimizer, closure: Callable[[], Any]) -> float | None:
        def forward(_: Any) -> Any:
            self._inside_closure, self._closure_loss = True, None
            try:
                with self.precision_plugin.train_step_context():
                    returned = closure()
            finally:
                self._inside_closure = False
            loss = returned if returned is not None else self._closure_loss
            if loss is None:
                raise MisconfigurationException(
                    "under ZOStrategy manual optimisation needs the loss as a function: `opt.step(closure=...)`, where the "
                    "closure returns the loss or calls self.manual_backward(loss)"
                )
            return loss

        _, estimate = self._estimate(forward, None, optimizer)
        return None if estimate is None else estimate.loss

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, module: pl.LightningModule) -> None:
        """Clip, shape, record, apply."""
        assert self.seed is not None
        window, self._window = merge(self._window), []
        trials, self._trials = self._trials, []
        raw = torch.tensor(window.coefficients, dtype=torch.float64)
        self._projected.data = torch.zeros_like(raw)
        self._projected.grad = raw.clone()
        self.precision_plugin._after_closure(module, optimizer)
        assert self._projected.grad is not None
        clipped = self._projected.grad.tolist()
        place = [id(o) for o in self.optimizers].index(id(optimizer))
        state = self._shaping_states.get(place) or self.shaping.init()
        record, self._shaping_states[place] = finish(window, clipped, self.shaping, state, optimizer, self.zo_step)
        if trials and not record.skipped:
            record = keep_best(record, lambda terms: sum(trial(terms) for trial in trials) / len(trials), len(trials))
        self.last_record, self.last_stats = record, None
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at; its step() may not be called
        if record.skipped:
            self._count_skip(record)
        else:
            self._skips = 0
            with uninterrupted():
                self._apply(place, optimizer, record)
                self.zo_step += 1
            return
        self.zo_step += 1
        if self._recorder is not None:
            self._recorder.skipped(record.step)

    def _apply(self, place: int, optimizer: Optimizer, record: StepRecord) -> None:
        """Into the ledger first, then into the weights."""
        leaves, stepper = self.view(optimizer).leaves, self._stepper(optimizer)
        assert self._ledger is not None and self.lightning_module is not None and self.seed is not None
        recorder = self._ledger.open(self.lightning_module, self.seed, self.zo_step)
        if recorder is not None:
            recorder.step(place, stepper, leaves, record)
        key = Key(self.seed, record.step)
        self.last_stats = apply_update(stepper, leaves, record.terms, key, measure=self.measure_update)
        if recorder is not None:
            recorder.applied()

    @property
    def ledger_path(self) -> Path | None:
        """Where this fit's replay ledger goes; None when it keeps none, and between fits."""
        return None if self._ledger is None else self._ledger.path

    @property
    def _recorder(self) -> Recorder | None:
        return None if self._ledger is None else self._ledger.recorder

    def _count_skip(self, record: StepRecord) -> None:
        if not record.raw:  # training_step returned None
            return
        if all(map(math.isfinite, record.raw)):  # a tie
            self._skips = 0
            return
        self._skips += 1
        self._warn_once("skip", f"step {record.step} skipped: {record.skipped}; the weights are as before")
        if self._skips >= self.config.max_skips:
            raise RuntimeError(
                f"{self._skips} steps in a row had no finite projected gradient (last: {record.skipped}). The weights are "
                "those of the last finite step. Lower lr or eps, or look at the loss; ZOStrategy(max_skips=...) sets this limit"
            )

    # ---- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        lean_io, resumable = keeps_positions(self.checkpoint_io), "optimizer_states" in checkpoint
        position = self._position(lean_io) if lean_io or resumable else None
        if resumable:  # not for save_weights_only
            checkpoint[STATE] = {
                "seed": self.seed,
                "zo_step": self.zo_step,
                "shaping": {place: dict(state) for place, state in self._shaping_states.items()},
                "config": self.config.to_dict(),
                "rng": rng_state(self.root_device),
                "ledger": position,
                "calibration": asdict(self._calibration),
            }
        if lean_io and position is not None:
            assert self._recorder is not None and self.lightning_module is not None
            checkpoint = lean(checkpoint, position, dict(self.lightning_module.named_parameters()), self._recorder.slots())
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _position(self, needed: bool) -> dict[str, str] | None:
        """Where the ledger stands, in types that a safe checkpoint holds; None when it does not hold the weights of now."""
        if self._recorder is None:
            return None
        try:
            return self._recorder.position()._asdict()
        except LedgerError as error:
            if needed:
                self._warn_once("whole", f"checkpoints are whole ones, not positions in the ledger: {error}")
            return None

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if checkpoint.get(STATE, {}).get("replayed") is not None:
            raise MisconfigurationException(
                f"{checkpoint_path} holds a position in a replay ledger instead of weights; read it with "
                "Trainer(plugins=[LedgerCheckpointIO()])"
            )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._ledger is not None:  # a tuner's trial may be over, and the weights go back to where it began
            self._ledger.restart(self.lightning_module.trainer)  # type: ignore[union-attr]
        if isinstance(self.precision_plugin, DoublePrecision):  # else Lightning loads float64 weights into float32 ones
            assert self.lightning_module is not None
            self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The groups of the module's optimizer, and the state of what applies its steps."""
        groups, stepper = super().optimizer_state(optimizer), self._stepper(optimizer)
        return groups if stepper is optimizer else {**groups, "state": stepper.state_dict()["state"]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states, state = checkpoint["optimizer_states"], checkpoint.get(STATE)
        before = state["config"].get("optimizer") if state is not None else "module"
        if before != self.config.optimizer and {before, self.config.optimizer} <= {"module", *OPTIMIZERS}:
            if any(saved["state"] for saved in states):
                rank_zero_warn(f"optimizer={self.config.optimizer!r} starts without the state of {before!r} in the checkpoint")
            states = [{**saved, "state": {}} for saved in states]
        steppers = [self._stepper(optimizer) for optimizer in self.optimizers]
        super().load_optimizer_state_dict(
            {
                **checkpoint,
                "optimizer_states": [
                    saved if stepper is optimizer else {**saved, "state": {}}
                    for optimizer, stepper, saved in zip(self.optimizers, steppers, states, strict=True)
                ],
            }
        )
        for optimizer, stepper, saved in zip(self.optimizers, steppers, states, strict=True):
            if stepper is not optimizer:
                stepper.load_state_dict({**stepper.state_dict(), "state": saved["state"]})
            widened_state(stepper, saved)
        if state is None:
            rank_zero_warn("the checkpoint was not written under ZOStrategy: perturbations start again from step 0")
            return
        self._shaping_states = {place: state_from(saved, self.shaping) for place, saved in state["shaping"].items()}
        self.seed, self.zo_step = state["seed"], state["zo_step"]
        set_rng_state(state["rng"], self.root_device)
        self._resumed_rng = state["rng"]
        self._calibration = Calibration(**state.get("calibration", {}))
        position = state.get("ledger")
        if self._ledger is not None:
            self._ledger.resumed = None if position is None else Position(**position)

    def teardown(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        self.precision_plugin.__dict__.pop("main_params", None)
        for search in self._searches.values():
            search.view.release()
        super().teardown()


# Lightning allows a compiled LightningModule only under strategies it knows; this is a single device to it
SingleDeviceStrategy.register(ZOStrategy)
for _name in ("zo", "zolightning.zostrategy"):  # the second is what `--trainer.strategy=zolightning.ZOStrategy` comes in as
    if _name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(_name, ZOStrategy, description="zeroth-order training: forward passes only")

__all__ = ["ZOStrategy"]
