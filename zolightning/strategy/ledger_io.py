"""The ledger beside a Lightning run: where it is, and checkpoints that hold a position in it instead of weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ledger import Claim, Ledger, LedgerError, base_path, claim, load_base, locate, replay
from ..types import StateDict
from ._lightning import CheckpointIO, ModelCheckpoint, TorchCheckpointIO, _WrappingCheckpointIO, pl, rank_zero_warn

STATE = "zolightning"
"""Key of ZOStrategy's part of a checkpoint."""

_NAME = "ledger.zo"


def claim_ledger(trainer: pl.Trainer, choice: bool | str | Path) -> Claim | None:
    """The right to write this run's ledger; None when it is to have none.

    ``True`` puts it into the folder where Lightning keeps the run's checkpoints, when the run keeps anything: a Trainer
    without logger and checkpoints, or with ``fast_dev_run``, leaves no files.

    Raises:
        LedgerError: another run has the path that was given.
        OSError: the path that was given cannot be written to.
    """
    if choice is False or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if choice is not True:
        return claim(Path(choice))
    if not trainer.loggers and not trainer.checkpoint_callbacks:
        return None
    folder = run_folder(trainer)
    number = 1
    while True:
        try:
            if "://" in folder:
                raise OSError(f"{folder} is not on this machine")
            return claim(Path(folder) / (_NAME if number == 1 else f"ledger-{number}.zo"))
        except LedgerError:  # a run beside this one, in the same folder
            number += 1
        except OSError as error:
            rank_zero_warn(
                f"this run keeps no replay ledger: {error}. Give it a place with ZOStrategy(ledger='path/ledger.zo'), or say "
                "ledger=False"
            )
            return None


def files_folder(trainer: pl.Trainer) -> str | None:
    """Where this machine has the run's files; None where it keeps none, or elsewhere."""
    keeps = (trainer.loggers or trainer.checkpoint_callbacks) and not trainer.fast_dev_run  # type: ignore[attr-defined]
    folder = run_folder(trainer) if keeps and trainer.is_global_zero else "://"
    return None if "://" in folder else folder


def run_folder(trainer: pl.Trainer) -> str:
    """Where Lightning's checkpoints of the run go: the logger's folder of this run, or the one that ModelCheckpoint has."""
    root = str(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(str(logger.save_dir or root), str(logger.name), version)
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    default = os.path.join(root, "checkpoints")
    return next((str(folder) for folder in folders if os.path.abspath(folder) != os.path.abspath(default)), root)


class LedgerCheckpointIO(TorchCheckpointIO):
    """Checkpoints of some kilobytes: a position in the replay ledger, from which loading rebuilds weights and optimizer state.

    ``Trainer(strategy=ZOStrategy(), plugins=[LedgerCheckpointIO()], callbacks=[ModelCheckpoint(every_n_train_steps=1)])``
    works as with whole checkpoints: best and last, resuming, testing. The weights that the run started from are written
    once, beside the ledger. State that the ledger cannot give stays in the checkpoint: a checkpoint made before the first step,
    with an optimizer that cannot be replayed, or after other code changed a parameter, holds all weights.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> StateDict:
        checkpoint: StateDict = super().load_checkpoint(path, *args, **kwargs)
        replayed = checkpoint.get(STATE, {}).pop("replayed", None)
        if replayed is None:
            return checkpoint
        position = checkpoint[STATE]["ledger"]
        ledger = find_ledger(position, Path(path))
        position["path"] = str(ledger.path)
        parameters = base_of(ledger)
        state = replay(ledger, parameters)
        checkpoint["state_dict"].update({key: parameters[name].detach() for key, name in replayed.items()})
        for place, saved in enumerate(checkpoint.get("optimizer_states", [])):
            if place in state.optimizers:
                found = state.optimizers[place].state
                slots = state.slots[place].items()
                saved["state"].update({slot: found[parameters[n]] for n, slot in slots if parameters[n] in found})
        return checkpoint


def keeps_positions(io: CheckpointIO | None) -> bool:
    """Whether checkpoints go through LedgerCheckpointIO, within another plugin too."""
    while isinstance(io, _WrappingCheckpointIO):
        io = io.checkpoint_io
    return isinstance(io, LedgerCheckpointIO)


def slim(
    checkpoint: StateDict,
    position: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    slots: Mapping[int, Collection[int]],
) -> StateDict:
    """The checkpoint without the state that its position in the ledger gives, as LedgerCheckpointIO reads it.

    Args:
        checkpoint: the whole one.
        position: in the ledger.
        parameters: the module's, by name. A tensor that only bears such a name (an average of the weights) stays.
        slots: optimizer → the parameters whose state the ledger gives, by place.
    """
    names = {_place(p): name for name, p in parameters.items()}
    state = checkpoint["state_dict"]
    replayed = {key: names[_place(v)] for key, v in state.items() if isinstance(v, Tensor) and _place(v) in names}
    lean = {**checkpoint, "state_dict": {key: value for key, value in state.items() if key not in replayed}}
    lean[STATE] = {**checkpoint.get(STATE, {}), "ledger": dict(position), "replayed": replayed}
    if "optimizer_states" in checkpoint:
        lean["optimizer_states"] = [
            {**saved, "state": {slot: value for slot, value in saved["state"].items() if slot not in slots.get(place, ())}}
            for place, saved in enumerate(checkpoint["optimizer_states"])
        ]
    return lean


def find_ledger(position: Mapping[str, str], checkpoint: Path) -> Ledger:
    """The ledger up to a position, though the run's folder was moved or the file made room for a newer one.

    Raises:
        LedgerError: none of the places has it; the message names the contents of each.
    """
    try:
        return locate(Path(position["path"]), bytes.fromhex(position["digest"]), checkpoint)
    except LedgerError as error:
        raise LedgerError(f"the checkpoint {checkpoint} rests on a ledger that is not to be had: {error}") from error


def base_of(ledger: Ledger) -> dict[str, nn.Parameter]:
    """The base's weights beside the ledger, on the device whose arithmetic the run used, where it is at hand.

    Raises:
        LedgerError: they are not there.
    """
    path = base_path(ledger.path.parent, ledger.header.base)
    if not path.exists():
        raise LedgerError(f"{path} is missing: the weights that the run of {ledger.path} started from")
    device = torch.device(ledger.header.device if ledger.header.device != "cuda" or torch.cuda.is_available() else "cpu")
    return {name: nn.Parameter(p.to(device), requires_grad=False) for name, p in load_base(path).items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
