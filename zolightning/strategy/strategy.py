"""``Trainer(strategy=ZOStrategy())``: training steps by forward passes alone.

The path of one step: :meth:`ZOStrategy.training_step` runs all probes (``estimators``) through the view of the weights
(``space``); :meth:`ZOStrategy.backward` fires Lightning's hooks and nothing else; :meth:`ZOStrategy.optimizer_step` clips
and shapes the projected gradients (``step``, ``shaping``), makes the record, and applies it through the user's
optimizer (``updates``); the record goes into the ``run_ledger``. Set-up is in ``fit_strategy``: what is searched (``search``)
and what applies the steps. Checkpoints are in ``resumable``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from ..engine.step import finish, keep_best, merge, zo_step
from ..engine.ties import TieWatch
from ..engine.uninterrupted import uninterrupted
from ..engine.updates import UpdateStats, apply_update
from ..methods.config import Overrides, ZOConfig
from ..methods.recipes import name_of
from ..methods.recipes import recipe as named_recipe
from ..mixin import ZOMixin
from ..probing.objective import BatchObjective, loss_value
from ..space import View
from ..types import Estimate, Key, SkipStep, StepRecord, Term
from ._lightning import MisconfigurationException, Precision, SingleDeviceStrategy, StrategyRegistry, pl, rank_zero_info
from .checkpoints import ResumableStrategy


class ZOStrategy(ResumableStrategy):
    """Zeroth-order training on one device: no backward pass, the memory of inference.

    Args:
        recipe: a name from :data:`zolightning.methods.recipes.RECIPES`, or a :class:`~zolightning.ZOConfig`.
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
        base = recipe if isinstance(recipe, ZOConfig) else named_recipe(recipe)
        name = recipe if isinstance(recipe, str) else name_of(recipe)
        super().__init__(base.override(**overrides), name, ledger, accelerator, checkpoint_io, precision_plugin)
        self.last_record: StepRecord | None = None
        self.records: list[StepRecord] = []
        """Optimizer steps of the last batch: none inside an accumulation window, several in a manual training step."""
        self.last_stats: UpdateStats | None = None
        self.measure_update = False
        """Set by whoever wants ``last_stats`` of the next step."""
        self._skips = 0

    def _forget(self) -> None:
        super()._forget()
        self._window: list[Estimate] = []
        self._trials: list[Callable[[Sequence[Term]], float]] = []
        self._inside_closure = False
        self._closure_loss: Tensor | None = None
        self._ties = TieWatch()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        self._resume_rng(module.trainer)
        self.records = []
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

    @torch.no_grad()
    def _prepare(self, module: ZOMixin, batch: Any) -> Any:
        """What the module computes once for all probes of the step."""
        if type(module).zo_prepare is ZOMixin.zo_prepare:
            return batch
        optimizer = self.optimizers[0]
        with self.precision_plugin.train_step_context():
            # the first time it says what the objective gets, from which follows what is trained and must not be read here
            search = self._subspaces.get(id(optimizer)) or self._search(
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
            graphs, (examples, repeats) = search.graphs, search.examples.of(batch)
            with self._isolation.step() as probes:
                run, blocks = (forward, search.blocks) if graphs is None else (partial(graphs, forward), None)
                objective = BatchObjective(run, batch, probes, examples, repeats, self._muted, blocks)
                estimate = zo_step(objective, search.view, self.estimator, Key(self.seed, self.zo_step, seen))
        except SkipStep:
            return None, None
        estimate = estimate._replace(forwards=estimate.forwards + prepared)
        for news in (search.blocks.notice(), *(graphs.news() if graphs else ())):
            if news:
                rank_zero_info(f"ZO: {news}")
        if objective.refused:
            self._warn_once(
                "apart", f"a batch of {examples} ran in two forwards, since doubling it failed: {objective.refused}"
            )
        self._warn_coarse(objective.dtype, estimate)
        self._window.append(estimate)
        if self.config.conservative:
            self._trials.append(lambda terms: self._trial(forward, batch, search.view, terms))
        return objective.first, estimate

    def _trial(self, forward: Callable[[Any], Any], batch: Any, view: View, terms: Sequence[Term]) -> float:
        """The loss of a micro-batch at θ + Σ_k c_k z_k, beside the probes."""
        assert self._isolation is not None
        with self._muted(), self._isolation.dry(), view.at(terms):
            try:
                return loss_value(forward(batch))
            except SkipStep:
                return math.inf

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
        self.records.append(record)
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


# Lightning allows a compiled LightningModule only under strategies it knows; this is a single device to it
SingleDeviceStrategy.register(ZOStrategy)
for _name in ("zo", "zolightning.zostrategy"):  # the second is what `--trainer.strategy=zolightning.ZOStrategy` comes in as
    if _name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(_name, ZOStrategy, description="zeroth-order training: forward passes only")

__all__ = ["ZOStrategy"]
