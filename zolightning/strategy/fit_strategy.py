"""What one fit has: settings, seed, optimizers, what they search, the ledger. Found at set-up, dropped with the next fit."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..engine.subspace import Calibration, Subspace, compute_dtype, find_subspace
from ..ledger import Recorder
from ..methods.config import ZOConfig
from ..methods.optimizers import follow, in_place_of, is_plain_sgd, needs_closure
from ..methods.shaping import State
from ..mixin import ZOMixin
from ..probing.isolation import Isolation
from ..space import Rounds, View, expose_scales
from ._lightning import MisconfigurationException, _ResultCollection, pl, rank_zero_info, rank_zero_warn
from .ledger_io import keeps_positions
from .one_device import OneDeviceStrategy
from .rates import base_lr, override_lr
from .run_ledger import RunLedger


class _Muted(_ResultCollection):
    """Swallows ``self.log`` in the forwards of a step after the first."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class FitStrategy(OneDeviceStrategy, ABC):
    """A strategy that is set up for zeroth-order fits, one after another.

    Args:
        config: the settings.
        recipe_name: where they come from, for ledgers and loggers.
        ledger: see :class:`~zolightning.ZOStrategy`.
        accelerator, checkpoint_io, precision_plugin: as for any Lightning strategy.
    """

    def __init__(
        self,
        config: ZOConfig,
        recipe_name: str,
        ledger: bool | str | Path,
        accelerator: Any,
        checkpoint_io: Any,
        precision_plugin: Any,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self.config, self.recipe_name, self.ledger = config, recipe_name, ledger
        self.shaping = config.build_shaping()
        self._shaping_states: dict[int, State] = {}
        self.seed: int | None = None
        self.zo_step = 0
        """Optimizer steps taken: the step of the next perturbation's key."""
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one fit."""
        self._subspaces: dict[int, Subspace] = {}
        self._steppers: dict[Optimizer, Optimizer] = {}
        self._isolation: Isolation | None = None
        self._ledger: RunLedger | None = None
        self._calibration = Calibration()
        self._warned: set[str] = set()

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != "fit":  # a checkpoint saved after a test is that of the fit before it
            super().setup(trainer)
            return
        self._forget()
        super().setup(trainer)
        self.seed = (torch.initial_seed() if self.config.seed is None else self.config.seed) & 0xFFFFFFFFFFFFFFFF
        module = self.lightning_module
        assert module is not None
        if self.config.cuda_graphs and not isinstance(module, ZOMixin):
            raise MisconfigurationException(
                f"`cuda_graphs=True` records `zo_objective`, which {type(module).__name__} has not; derive it from ZOMixin, or "
                "leave cuda_graphs out"
            )
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
        self._expect_rounding()
        if self.config.scales != "frozen":  # only now are the layers quantised, and the optimizers come next
            assert self.model is not None
            expose_scales(self.model)

    def _expect_rounding(self) -> None:
        """The recipe 'zeroqat' would train plain layers too, and nobody would see why nothing is rounded."""
        assert self.model is not None
        if self.recipe_name == "zeroqat" and not any(isinstance(m, Rounds) for m in self.model.modules()):
            raise MisconfigurationException(
                "ZOStrategy('zeroqat') trains through the rounding of fake-quantised layers, and the module has none; call "
                "zolightning.adapt.fakequant.fake_quantize(model) first, or use ZOStrategy() for plain weights"
            )

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
        stepper = self._stepper(optimizer)
        plain = is_plain_sgd(stepper)
        if needs_closure(stepper):
            raise MisconfigurationException(
                f"{type(stepper).__name__} looks at the loss again within a step, which a zeroth-order step has no way to; use "
                "an optimizer whose step() needs no closure, as torch.optim.SGD or Adam"
            )
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
        return self._subspaces[id(optimizer)].view

    def _search(self, optimizer: Optimizer, forward: Callable[[Any], Any], batch: Any) -> Subspace:
        search = self._subspaces.get(id(optimizer))
        if search is None or not search.holds(batch):
            if search is not None:
                self._calibration.both = None  # measured on other weights
            module, config = self.lightning_module, self.config
            assert module is not None
            assert self._isolation is not None
            search = find_subspace(
                module, optimizer, config, self.estimator, forward, batch, self._isolation, self._muted, self._calibration
            )
            rank_zero_info(search.describe(self.estimator, sum(p.numel() for p in module.parameters())))
            self._subspaces[id(optimizer)] = search
        return search

    @contextmanager
    def _muted(self) -> Iterator[None]:
        loop = self.lightning_module.trainer.fit_loop.epoch_loop  # type: ignore[union-attr]
        results = loop._results
        loop._results = _Muted(training=True)
        try:
            yield
        finally:
            loop._results = results

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(message)

    @property
    def ledger_path(self) -> Path | None:
        """Where this fit's replay ledger goes; None when it keeps none, and between fits."""
        return None if self._ledger is None else self._ledger.path

    @property
    def _recorder(self) -> Recorder | None:
        return None if self._ledger is None else self._ledger.recorder

    def teardown(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        self.precision_plugin.__dict__.pop("main_params", None)
        for search in self._subspaces.values():
            search.release()
        super().teardown()
