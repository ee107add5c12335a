"""Checkpoints of a zeroth-order fit, and going on from them: the same steps as if it had never stopped."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from ..engine.subspace import Calibration
from ..engine.updates import widened_state
from ..ledger import LedgerError, Position
from ..methods.optimizers import OPTIMIZERS
from ..methods.shaping import state_from
from ..probing.isolation import rng_state, set_rng_state
from ._lightning import DoublePrecision, MisconfigurationException, pl, rank_zero_warn
from .fit_strategy import FitStrategy
from .ledger_io import STATE, keeps_positions, lean


class ResumableStrategy(FitStrategy, ABC):
    """Saves seed, step, shaping, generators and place in the ledger beside what Lightning saves, and restores them."""

    def _forget(self) -> None:
        super()._forget()
        self._resumed_rng: dict[str, Any] | None = None

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
        another = before != self.config.optimizer and {before, self.config.optimizer} <= {"module", *OPTIMIZERS}
        if another:
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
            self._ledger.resumed = None if position is None or another else Position(**position)  # whose rule has the state

    def _resume_rng(self, trainer: pl.Trainer) -> None:
        """In the middle of an epoch the data loader, which draws a seed when it starts, has moved the generator since."""
        if self._resumed_rng is not None and trainer.fit_loop.epoch_loop.batch_progress.current.ready > 1:
            set_rng_state(self._resumed_rng, self.root_device)
        self._resumed_rng = None
