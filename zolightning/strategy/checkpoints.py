"""Checkpoints of a session: its entries in Lightning's, and a session that goes on from one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from torch import nn

from ..engine.session import Session
from ..ledger import LedgerError, PendingLedger, Position
from ..methods.optimizers import OPTIMIZERS
from ..offload import OffloadError
from ..types import StateDict
from ._lightning import MisconfigurationException, rank_zero_warn
from .ledger_io import STATE, slim


def saved(
    checkpoint: StateDict,
    session: Session,
    ledger: PendingLedger,
    module: nn.Module,
    *,
    positions: bool,
    away: Collection[str] = (),
    warn: Callable[[str], None],
) -> StateDict:
    """The checkpoint with the session's part; with a position in the ledger in place of the weights, where wanted.

    Args:
        checkpoint: Lightning's.
        session: of the fit.
        ledger: of the fit.
        module: whose weights the checkpoint holds.
        positions: hold a position in place of weights, when the ledger can give them.
        away: names of the weights that are not in memory, and for which there is nothing but a position.
        warn: gets the reason when it cannot.

    Raises:
        OffloadError: it cannot, and weights are not in memory.
    """
    resumable = "optimizer_states" in checkpoint  # not under save_weights_only
    if away:
        positions, warn = True, _refuse
        if ledger.open(module, session.seed, session.step) is None:
            _refuse("this run keeps no ledger; give it a place with ZOStrategy(ledger='path/ledger.zo')")
    else:
        say, warn = warn, lambda reason: say(f"checkpoints are whole ones, not positions in the ledger: {reason}")
    position = _position(ledger, warn if positions else None) if positions or resumable else None
    if resumable:
        checkpoint[STATE] = {**session.state_dict(), "ledger": position}
    if not positions or position is None or ledger.recorder is None:
        return checkpoint
    here = {name: parameter for name, parameter in module.named_parameters() if name not in away}
    lean = slim(checkpoint, position, here, ledger.recorder.slots())
    lean[STATE]["replayed"].update({name: name for name in away})
    return lean


def _refuse(reason: str) -> None:
    raise OffloadError(f"a checkpoint of offloaded weights is a position in the run's ledger: {reason}")


def _position(ledger: PendingLedger, warn: Callable[[str], None] | None) -> dict[str, str] | None:
    """The ledger's position in types that a safe checkpoint holds; None when it does not hold the weights of now."""
    if ledger.recorder is None:
        return None
    try:
        return ledger.recorder.position()._asdict()
    except LedgerError as error:
        if warn is not None:
            warn(str(error))
        return None


def restored(checkpoint: StateDict, session: Session, ledger: PendingLedger, path: str) -> StateDict | None:
    """Have the session go on from a checkpoint, read from `path`; the generators' state in it, or None when it is not ours."""
    states, state = checkpoint["optimizer_states"], checkpoint.get(STATE)
    before, now = state["config"].get("optimizer") if state is not None else "module", session.config.optimizer
    another = before != now and {before, now} <= {"module", *OPTIMIZERS}
    if another and any(optimizer_state["state"] for optimizer_state in states):
        rank_zero_warn(f"optimizer={now!r} starts without the state of {before!r} in the checkpoint")
    for optimizer, optimizer_state in zip(session.optimizers, states, strict=True):
        session.load_optimizer_state(optimizer, {**optimizer_state, "state": {}} if another else optimizer_state)
    if state is None:
        rank_zero_warn("the checkpoint was not written under ZOStrategy: perturbations start again from step 0")
        return None
    session.load_state_dict(state)
    position = state.get("ledger")
    # the ledger's steps rest on the state of another rule, which this optimizer does not take over
    ledger.resumed = None if position is None or another else Position(**position)
    ledger.checkpoint = Path(path).absolute()
    rng: StateDict = state["rng"]
    return rng


def check_whole(checkpoint: StateDict, path: str) -> None:
    """Refuse one that holds a position in place of weights."""
    if checkpoint.get(STATE, {}).get("replayed") is not None:
        raise MisconfigurationException(
            f"{path} holds a position in a replay ledger instead of weights; read it with "
            "Trainer(plugins=[LedgerCheckpointIO()]), or with ZOStrategy(offload=...) if it comes from an offloaded fit"
        )
