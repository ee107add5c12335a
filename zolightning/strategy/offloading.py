"""A Lightning fit whose weights are offloaded: where they go, and checkpoints that are positions in the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.deferred import Deferred
from ..engine.updates import Apply, apply_update
from ..ledger import PendingLedger, Replayed, replay
from ..offload import DiskTier, Offload, OffloadError, StoredParameter, attach, left_in_memory, move, resume, stored
from ..parallel import Alone, Ranks
from ..types import StateDict
from ._lightning import CheckpointIO, pl, rank_zero_info, rank_zero_warn
from .ledger_io import STATE, find_ledger, keeps_positions, run_folder

_FOLDER = "offload"
_OF_A_RANK = b"rank"  # names updates of ranks that write no ledger: no record has this name


class InMemory:
    """The weights of a LightningModule, all of them where its Parameters say."""

    apply: Apply = staticmethod(apply_update)
    away: Collection[str] = ()
    """Names of the parameters that are not in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def begin(self, ledger: PendingLedger) -> None:
        """A fit is about to take its first step, which goes into this ledger."""

    def state_dict(self) -> StateDict:
        """The module's, as far as it is in memory."""
        return self._module.state_dict()

    def save(self) -> None:
        """A checkpoint is written now."""

    def load(self, checkpoint: Mapping[str, Any], path: str, strict: bool) -> None:
        """Bring the module to a checkpoint."""
        self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_states(self, states: list[StateDict]) -> list[StateDict]:
        """A checkpoint's, with all of the state of weights in memory."""
        return states

    def traffic(self) -> dict[str, float]:
        """Costs of moving weights so far, by the ends of the metrics' names."""
        return {}

    def close(self) -> None:
        """The fit is over."""


class Offloading(InMemory):
    """A LightningModule's weights, of which the matrices are in a store.

    Args:
        options: the user's.
        module: whose matrices go.
        device: where operations read them.
        trainer: says where the run keeps its files.
        ranks: of the run; each but the first works in a folder ``rank-N`` of its own.
    """

    def __init__(self, options: Offload, module: nn.Module, device: torch.device, trainer: pl.Trainer, ranks: Ranks) -> None:
        super().__init__(module)
        self._own_folder, self._rank = options.folder is None, ranks.rank
        self._spare: tempfile.TemporaryDirectory[str] | None = None
        folder = Path(options.folder) if options.folder is not None else self._beside_the_run(trainer, ranks)
        self.store = attach(module, options, device, folder / f"rank-{ranks.rank}" if ranks.rank else folder)
        self.away = [name for name, p in module.named_parameters() if isinstance(p, StoredParameter)]
        self._replayed: Replayed | None = None
        for kind, nbytes in left_in_memory(module).items():
            rank_zero_warn(f"offload does not stream {kind} yet: {nbytes / 1e6:.0f} MB of it stay in memory")
        size = sum(entry.nbytes for entry in self.store.entries)
        rank_zero_info(
            f"ZO: {len(self.away)} matrices, {size / 1e6:.1f} MB, are offloaded to the {options.tier}; up to "
            f"{self.store.pool / 1e6:.1f} MB of them are in memory at once"
        )

    def _beside_the_run(self, trainer: pl.Trainer, ranks: Ranks) -> Path:
        folder = ranks.decide(lambda: run_folder(trainer))
        if "://" in folder or not (trainer.loggers or trainer.checkpoint_callbacks) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._spare = tempfile.TemporaryDirectory(prefix="zolightning-")  # a run that keeps no files
            return Path(self._spare.name)
        return Path(folder) / _FOLDER

    def begin(self, ledger: PendingLedger) -> None:
        self.apply = Deferred(self.store, lambda: _OF_A_RANK if self._rank else ledger.mark)
        self.store.start()

    def state_dict(self) -> StateDict:
        state = self._module.state_dict(keep_vars=True)
        here = {key: value for key, value in state.items() if not isinstance(value, StoredParameter)}
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in here.items()}

    def traffic(self) -> dict[str, float]:
        store, tier = self.store, self.store.tier
        return {
            "offload/read_bytes": tier.read_bytes,
            "offload/write_bytes": tier.written_bytes,
            "offload/wait_seconds": store.waited,
            "offload/pool_bytes": store.pool,
        }

    def save(self) -> None:
        """Bring the tier up to date, so that a later run may go on from it."""
        self.store.flush()

    def load(self, checkpoint: Mapping[str, Any], path: str, strict: bool) -> None:
        """Bring the module to a checkpoint: to the weights that it holds, and to those at its position in the ledger.

        Raises:
            OffloadError: it holds whole weights, which are not streamed in.
            LedgerError: the ledger cannot be found, or the module's weights are not those that the run started from.
        """
        state, module, away = checkpoint["state_dict"], self._module, set(self.away)
        if whole := sorted(away & state.keys()):
            raise OffloadError(
                f"offload does not stream a checkpoint's whole weights in yet ({whole[0]!r} and others in {path}); load them "
                "into the module before `fit`, or give from_pretrained their folder"
            )
        found = module.load_state_dict(state, strict=False)
        replayed = set(checkpoint.get(STATE, {}).get("replayed") or ())
        missing = [key for key in found.missing_keys if key not in replayed]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"{path} does not fit the module: missing {missing}, unexpected {found.unexpected_keys}")
        if replayed:
            self._replay(checkpoint[STATE]["ledger"], Path(path))

    def _replay(self, position: dict[str, str], path: Path) -> None:
        ledger = find_ledger(position, path)
        position["path"] = str(ledger.path)
        tier, store = self.store.tier, self.store
        runs = store.running
        store.stop()  # replayed updates must not reach the work files before those that an earlier run left were looked at
        self._rewind()
        self._replayed = replay(ledger, dict(self._module.named_parameters()), apply=Deferred(store).replayed)
        count = 0
        store.empty()  # of the weights that were compared
        if isinstance(tier, DiskTier) and not self._rank:  # the others' files have no names of the ledger's
            folders = sorted(ledger.path.parent.glob(f"{_FOLDER}*")) if self._own_folder else [Path(str(tier.folder))]
            for folder in folders:
                count = count or (tier.move_to(folder) and resume(tier, store.entries)) or 0
        if runs:
            store.start()
        lacking = sum(bool(entry.log) for entry in store.entries)
        rank_zero_info(
            f"ZO: {count} offloaded matrices and parts go on as the last run left them; {lacking} are brought up from their "
            "base"
        )

    @torch.no_grad()
    def _rewind(self) -> None:
        """A module that was trained goes back to where its run began, which is where the ledger begins."""
        self.store.rewind()
        for name, before in self.store.vectors.items():
            self._module.get_parameter(name).copy_(before)

    def optimizer_states(self, states: list[StateDict]) -> list[StateDict]:
        """A checkpoint's, with the state of the weights in memory as the replay left it."""
        if self._replayed is None:
            return states
        for place, saved in enumerate(states):
            if place in self._replayed.optimizers:
                found = self._replayed.optimizers[place].state
                by_name = dict(self._module.named_parameters())
                slots = self._replayed.slots[place].items()
                saved["state"].update({slot: found[by_name[name]] for name, slot in slots if by_name[name] in found})
        return states

    def close(self) -> None:
        """Bring the tier up to date, if it can be, and end the threads; the module can still be read."""
        try:
            if self.store.running:
                self.store.flush()
        except OffloadError as error:
            rank_zero_warn(str(error))
        self.store.stop()
        move(self._module.parameters(), torch.device("cpu"))  # where the module goes now


def residency(
    choice: str | Offload | None,
    module: nn.Module,
    device: torch.device,
    trainer: pl.Trainer,
    io: CheckpointIO | None,
    ranks: Ranks | None = None,
) -> InMemory:
    """Where the module's weights are to be during the Trainer's run.

    Args:
        choice: the user's; None: in memory, but for modules that hold offloaded weights already.
        module: not on its device yet.
        device: of the run.
        trainer: of the run.
        io: of its checkpoints.
        ranks: of it; None: one process.

    Raises:
        ValueError: `choice` is not one.
        OffloadError: the module cannot be streamed in this way.
    """
    if choice is None and not stored(module.parameters()):
        return InMemory(module)
    if keeps_positions(io):
        raise OffloadError(
            "LedgerCheckpointIO rebuilds all weights in memory; checkpoints of an offloaded fit are positions in its ledger "
            "without it: leave the plugin out"
        )
    options = choice if isinstance(choice, Offload) else Offload() if choice is None else Offload(choice)  # type: ignore[arg-type]
    return Offloading(options, module, device, trainer, ranks or Alone())
