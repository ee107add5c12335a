"""One zeroth-order fit without a Trainer: probes, estimate, update, ledger.

::

    session = Session(model, optimizer)
    for batch in loader:
        session.estimate(lambda batch: loss_fn(model(batch.x), batch.y), batch)
        record = session.update()

:class:`~zolightning.ZOStrategy` is this behind Lightning's hooks.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..methods.config import ZOConfig
from ..methods.optimizers import follow, in_place_of
from ..methods.shaping import State, state_from
from ..parallel import Alone, Ranks, Standing
from ..probing.isolation import Isolation, rng_state, set_rng_state
from ..probing.objective import loss_value
from ..probing.runner import Muted
from ..space import View
from ..types import Batch, Estimate, Forward, Key, Prepare, Shared, SkipStep, StateDict, StepRecord, Term
from .advice import take_over
from .anchor import anchor_of
from .hybrid import gradients_of
from .notices import Notices, Say, SkipWatch
from .rates import base_lr
from .recording import Recording
from .step import Clip, finish, keep_best
from .step_size import StepSizes
from .subspace import Calibration, Epoch, Setting, Subspace, compute_dtype, find_subspace, unknown_epoch
from .uninterrupted import uninterrupted
from .updates import Apply, UpdateStats, apply_update, load_state, state_of
from .window import Window

_log = logging.getLogger("zolightning")


class Session:
    """The state of one fit.

    Args:
        module: whose code runs in the probes, and whose parameters are trained.
        optimizers: one, or those of manual optimisation; their learning rates are read at each step.
        config: the method. A recipe is one, see :mod:`zolightning.recipes`.
        schedulers: of the learning rates, which ``config.lr`` scales too.
        precision: Lightning's name of the precision that the forwards run in, as "bf16-mixed"; "": that of the weights.
        device: where the forwards run. None: where the parameters are.
        repeatable: whether the forwards given to :meth:`estimate` evaluate the batch that they are given.
        muted: makes the context of forwards that are to log nothing: all of a step but the first.
        ledger: records the steps before they are applied, as a :class:`~zolightning.ledger.PendingLedger`; None: no record.
        apply: has a step reach the weights, those that are not in memory too.
        ranks: the processes that take each step together, as a :class:`~zolightning.parallel.Team`.
        epoch: says how many optimizer steps an epoch has, where the method asks.
        folder: for the file of ``config.anchor``. None: the system's for temporary files.
        inform: gets lines on the choices that the fit made.
        warn: gets lines on settings that the user should change.

    Raises:
        ValueError: an optimizer that a zeroth-order step cannot go through, or a learning rate that cannot be scaled.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        config: ZOConfig | None = None,
        *,
        schedulers: Iterable[LRScheduler] = (),
        precision: str = "",
        device: torch.device | None = None,
        repeatable: bool = True,
        muted: Muted = nullcontext,
        ledger: Recording | None = None,
        apply: Apply = apply_update,
        ranks: Ranks | None = None,
        epoch: Epoch = unknown_epoch,
        folder: str | None = None,
        inform: Say = _log.info,
        warn: Say = warnings.warn,
    ) -> None:
        self.module, self.config = module, config or ZOConfig()
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.device = device or next((p.device for p in module.parameters()), torch.device("cpu"))
        self.estimator = self.config.build_estimator(compute_dtype(module, precision))
        self.shaping = self.config.build_shaping()
        self.ranks: Ranks = ranks or Alone()
        seed = self.ranks.decide(torch.initial_seed) if self.config.seed is None else self.config.seed
        self.seed = seed % (1 << 64)
        self.step = 0
        """Optimizer steps taken: the step of the next perturbation's key."""
        self.last_record: StepRecord | None = None
        self.last_stats = UpdateStats()
        self.measure_update = False
        """Measure how the next update changes the weights, for :attr:`last_stats`."""
        self._ledger, self._anchor = ledger, anchor_of(self.config, apply, folder)
        self._apply_update = partial(apply_update, anchor=self._anchor) if self._anchor.decay else apply
        self.notices = Notices(inform, warn)
        self._isolation = Isolation(module, self.device)
        self._subspaces: dict[int, Subspace] = {}
        make = self.config.make_optimizer
        self._steppers = {id(o): o if make is None else in_place_of(o, make) for o in self.optimizers}
        self._shaping_states: dict[int, State] = {}
        self._calibration = Calibration()
        self._sizes = StepSizes(self.config.finds_lr, inform, self.ranks.decide)
        self._window = Window()
        self._skips = SkipWatch(self.config.max_skips)
        rates = [base_lr(group) for group in self.optimizers[0].param_groups]
        take_over(self.config, self.estimator, self.optimizers, schedulers, self.stepper, warn)
        self._kept = gradients_of(module, self.optimizers, self.config, rates)
        self._setting = Setting(module, self.config, self.estimator, self._isolation, repeatable, muted, epoch, self._kept)
        self.ranks.begin(module, self.estimator, self.config.build_distribution(), self.config.to_dict())

    @torch.no_grad()
    def estimate(
        self,
        forward: Forward,
        batch: Batch = None,
        *,
        optimizer: Optimizer | None = None,
        prepare: Prepare | None = None,
        counts: bool = True,
    ) -> Estimate | None:
        """Run the probes of one micro-batch; its estimate counts in the next :meth:`update`.

        Args:
            forward: batch → loss: a number, a tensor, per-example losses of shape (B,), or a mapping with 'loss'.
            batch: examples along dimension 0 of its tensors.
            optimizer: whose parameters are perturbed. None: the first one.
            prepare: see :data:`~zolightning.types.Prepare`; it counts as a forward pass, and reads no trained weight.

        Returns:
            None when ``forward`` returned None: the micro-batch is skipped.
        """
        optimizer = optimizer or self.optimizers[0]
        place, window = self._place(optimizer), self._window
        key = Key(self.seed, self.step, sum(part.taken for part in window.parts))
        part = self.ranks.part(self.estimator, key, len(window.parts), batch)
        looks: list[float] = []
        try:
            prepared = None if prepare is None else self._prepared(prepare, forward, batch, optimizer)
            batch = batch if prepared is None else prepared
            space = self.subspace(forward, batch, optimizer)
            space.runner.view.check()
            trial = partial(self._trial, forward, batch, space)
            if not window.parts:
                looks = self._sizes.look(place, optimizer, space.runner.view.leaves, trial, self._steppers[id(optimizer)])
                space.runner.view.read.clear()
            ran = space.runner.run(forward, batch, part.ask)
        except SkipStep:
            return None
        estimate = part.tell(ran.answers)
        estimate = part.estimate = estimate._replace(forwards=estimate.forwards + (prepared is not None) + len(looks))
        self.notices.report(space.runner, ran, estimate, self.estimator.eps)
        if counts:
            window.parts.append(part)
            window.looks += looks
            window.trials += [trial] if self.config.conservative else []
        return estimate._replace(output=ran.output)

    @torch.no_grad()
    def update(self, optimizer: Optimizer | None = None, clip: Clip | None = None) -> StepRecord:
        """Clip, shape, record and apply the estimates since the last update, as one optimizer step.

        Args:
            optimizer: the one that steps. None: the first one.
            clip: the projected gradients → as many clipped ones.

        Raises:
            RuntimeError: too many steps in a row had no finite projected gradient; the weights are the last finite step's.
            RanksError: another rank is gone, or has come apart from this one; likewise.
        """
        optimizer = optimizer or self.optimizers[0]
        place, window, self._window = self._place(optimizer), self._window, Window()
        joint = self._joined(place, optimizer, window)
        if self._kept.names:
            self._kept.note_rates()  # the module's, before the probes' step has a size of its own
        with self._sizes.applied(place, optimizer):
            state = self._shaping_states.get(place) or self.shaping.init()
            lrs = [float(group["lr"]) for group in optimizer.param_groups]
            record, self._shaping_states[place] = finish(joint, clip, self.shaping, state, lrs, self.step)
            if self.config.conservative and not record.skipped:
                record = keep_best(record, partial(window.tried, self.ranks), len(window.trials) * self.ranks.size)
            self.last_stats = UpdateStats()
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it, and its step() may not be called
            if found := self._skips(record):
                self.notices.once("skip", found)
            if self._kept.names and not record.skipped and not self._kept.finite():
                record = record._replace(skipped="non-finite gradient of backprop")
            if not record.skipped:
                view = self._subspaces[id(optimizer)].runner.view
                unread = self.notices.unread(view, Key(self.seed, record.step))
                anchor = self._anchor.begin(view.leaves, record.step) if self._anchor.decay else None
                record = record._replace(unread=unread, backprop=tuple(self._kept.names), anchor=anchor)
            with uninterrupted():
                if not record.skipped:
                    self._apply(place, optimizer, record)
                elif self._ledger is not None:
                    self._ledger.skipped(record.step)
                if self._kept.names:
                    self._kept.end(None if record.skipped else Key(self.seed, record.step))
                self._sizes.took(place, record)
                self.step += 1
        self.last_record = record
        return record

    def _joined(self, place: int, optimizer: Optimizer, window: Window) -> Estimate:
        """The findings of all ranks."""
        space = self._subspaces.get(id(optimizer))
        standing = partial(Standing.of, self.step, place, optimizer, space and space.runner.view, self.module)
        joint = self.ranks.join(Key(self.seed, self.step), window.parts, window.looks, standing)
        self._sizes.choose(place, joint.looks)
        if joint.standing is not None:
            for group, settings in zip(optimizer.param_groups, joint.standing.groups, strict=True):
                group.update(settings)
            view = self.view(optimizer)
            view.read.update(id(view.leaves[place].parameter) for place in joint.standing.read)
        return joint.estimate

    def _place(self, optimizer: Optimizer) -> int:
        return [id(o) for o in self.optimizers].index(id(optimizer))

    def subspace(
        self, forward: Forward, batch: Batch, optimizer: Optimizer | None = None, prepare: Prepare | None = None
    ) -> Subspace:
        """The subspace that the optimizer's steps search, found by trying ``forward`` on the batch when it is not known yet.

        Raises:
            ValueError: there is nothing to train, or not in this way.
        """
        optimizer = optimizer or self.optimizers[0]
        space, place = self._subspaces.get(id(optimizer)), self._place(optimizer)
        if space is None or self.ranks.stale(place, space.holds(batch)):
            if space is not None:
                self._calibration.both = None  # measured on other weights
            with torch.no_grad():
                if prepare is not None and (tried := self._isolation.tried(prepare, batch)) is not None:
                    batch = tried
                space = find_subspace(self._setting, optimizer, forward, batch, self._calibration, self.ranks)
            self.ranks.found(place)
            self.notices.inform(space.describe(self.estimator, sum(p.numel() for p in self.module.parameters())))
            self._subspaces[id(optimizer)] = space
        return space

    @property
    def looking(self) -> bool:
        """Whether the next step, as a fit's first ones, takes longer to look for state that the module keeps."""
        return self._isolation.due

    def view(self, optimizer: Optimizer | None = None) -> View:
        """The subspace that this optimizer's steps search now; known from its first estimate on."""
        return self._subspaces[id(optimizer or self.optimizers[0])].runner.view

    def stepper(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that applies the steps of ``optimizer``: itself, or the settings' in its place."""
        stepper = self._steppers[id(optimizer)]
        if stepper is not optimizer:
            follow(stepper, optimizer)
        return stepper

    def state_dict(self) -> StateDict:
        """All that the next step depends on in addition to weights and optimizers, in types that a safe checkpoint holds."""
        return {
            "seed": self.seed,
            "zo_step": self.step,
            "shaping": {place: dict(state) for place, state in self._shaping_states.items()},
            "config": self.config.to_dict(),
            "rng": rng_state(self.device),
            "calibration": asdict(self._calibration),
            "step_sizes": self._sizes.state_dict(),
            "backprop": self._kept.state_dict(),
            "anchor": self._anchor.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Go on where :meth:`state_dict` was taken, generators included.

        Raises:
            ValueError: another recipe wrote it, or the weights to which ``config.anchor`` draws are gone.
        """
        self._anchor.load_state_dict(state, dict(self.module.named_parameters()), self.notices.inform)
        self._shaping_states = {place: state_from(saved, self.shaping) for place, saved in state["shaping"].items()}
        self.seed, self.step = state["seed"], state["zo_step"]
        self._calibration = Calibration(**state.get("calibration", {}))
        self._sizes.load_state_dict(state.get("step_sizes"))
        self._kept.load_state_dict(state.get("backprop", {}))
        set_rng_state(state["rng"], self.device)

    def follow(self, before: Session) -> None:
        """Count on where an earlier fit of the same strategy ended, so that no perturbation comes twice."""
        self.step, self._shaping_states = before.step, before._shaping_states

    def optimizer_state(self, optimizer: Optimizer) -> StateDict:
        """The groups of ``optimizer``, and the state of the one that applies its steps."""
        return state_of(optimizer, self.stepper(optimizer))

    def load_optimizer_state(self, optimizer: Optimizer, saved: StateDict) -> None:
        """Restore the result of :meth:`optimizer_state`; state of low-precision weights stays float32."""
        load_state(optimizer, self.stepper(optimizer), saved)

    def close(self) -> None:
        """End the ledger, and give the probes' memory back."""
        if self._ledger is not None:
            self._ledger.close()
        for space in self._subspaces.values():
            space.release()

    def _prepared(self, prepare: Prepare, forward: Forward, batch: Batch, optimizer: Optimizer) -> Batch:
        space = self._subspaces.get(id(optimizer)) or self.subspace(forward, batch, optimizer, prepare)
        with space.view.refusing_reads():
            return prepare(batch)  # again: no probe may be run on the value that was tried

    def _trial(self, forward: Forward, batch: Batch, space: Subspace, terms: Sequence[Term]) -> float:
        """The loss of a micro-batch at θ + Σ_k c_k z_k, which leaves no trace."""
        with self._setting.muted(), self._isolation.dry(everywhere=False), space.view.at(Shared(tuple(terms))):
            try:
                return loss_value(forward(batch))
            except SkipStep:
                return math.inf

    def _apply(self, place: int, optimizer: Optimizer, record: StepRecord) -> None:
        """Into the ledger first, then into the weights."""
        leaves, stepper = self.view(optimizer).leaves, self.stepper(optimizer)
        recorder = None if self._ledger is None else self._ledger.open(self.module, self.seed, self.step)
        if recorder is not None:
            recorder.step(place, stepper, leaves, record)
        read, key = [leaf for i, leaf in enumerate(leaves) if i not in record.unread], Key(self.seed, record.step)
        self.last_stats = self._apply_update(stepper, read, record.terms, key, measure=self.measure_update)
        if recorder is not None:
            recorder.applied()
