"""One fit under Lightning: its session, its ledger, and the batch that the Trainer's loops are at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.session import Session
from ..methods.ranking import forward_of
from ..mixin import ZOMixin, prepare_of
from ..probing.isolation import set_rng_state
from ..types import Batch, Forward, StateDict, StepOutput, StepRecord
from ._lightning import MisconfigurationException, Precision, pl
from .requirements import DRAWS_BATCHES, NEEDS_CLOSURE, NEEDS_LOSS
from .run_ledger import RunLedger


class Fit:
    """A session as Lightning's loops drive it: they ask for a batch's loss, and then for the optimizer's step.

    Args:
        session: the engine.
        ledger: the callback that keeps the session's ledger.
        module: the LightningModule.
        plugin: the Trainer's precision; until :meth:`close` its gradient clipping is that of the projected gradients.
    """

    def __init__(self, session: Session, ledger: RunLedger, module: pl.LightningModule, plugin: Precision) -> None:
        self.session, self.ledger, self._module, self._plugin = session, ledger, module, plugin
        self.records: list[StepRecord] = []
        """Optimizer steps of the last batch: none inside an accumulation window, several in a manual training step."""
        self.resumed_rng: StateDict | None = None
        """The generators' state in the checkpoint from which the next batch goes on."""
        self._counts, self._in_closure = True, False
        self._closure_loss: Tensor | None = None
        self._projected = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        # Lightning clips the parameters that the precision plugin names
        plugin.main_params = lambda optimizer: iter([self._projected])  # type: ignore[method-assign]

    def probe(self, step: Callable[[], StepOutput], batch: Batch, counts: bool) -> StepOutput:
        """Run the probes of a batch: its loss for Lightning's loops and progress bar, or None when it is skipped.

        Args:
            step: Lightning's training step on the batch.
            batch: of the loader.
            counts: whether the batch is one of the epoch's, and no stand-in for one.
        """
        module, session = self._module, self.session
        self._resume_rng()
        self.records, self._counts = [], counts
        if not module.automatic_optimization:  # the probes run inside opt.step(closure=...)
            with torch.no_grad():
                return step()
        if isinstance(batch, Iterator):
            raise MisconfigurationException(DRAWS_BATCHES)
        if isinstance(module, ZOMixin):
            prepare = prepare_of(module)
            prepare = None if prepare is None else self._in_precision(prepare)
            forward = self._in_precision(forward_of(module, session.estimator))
            estimate = session.estimate(forward, batch, prepare=prepare, counts=counts)
        else:
            estimate = session.estimate(lambda _: step(), batch, counts=counts)
        if estimate is None:  # Lightning refuses None where other processes go on
            return torch.tensor(torch.nan, device=session.device) if session.ranks.size > 1 else None
        # Lightning wants a tensor; the doubles stay in the estimate
        loss = torch.tensor(estimate.loss, dtype=torch.float32, device=session.device)
        return {**estimate.output, "loss": loss} if isinstance(estimate.output, Mapping) else loss

    def backward(self, loss: Tensor) -> Tensor:
        """No autograd: the hooks fire, and in a manual closure the loss is noted."""
        if self._module.automatic_optimization:  # the base class's methods: a mixed precision plugin would scale the loss
            loss = Precision.pre_backward(self._plugin, loss, self._module)
            return Precision.post_backward(self._plugin, loss, self._module)
        if not self._in_closure:
            raise MisconfigurationException(NEEDS_CLOSURE)
        self._closure_loss = loss.detach()
        return self._closure_loss

    def update(self, optimizer: Optimizer, closure: Callable[[], Any], measure: bool) -> Any:
        """One optimizer step; the closure's loss.

        Args:
            optimizer: whose step it is.
            closure: runs the batch, or in manual optimisation gives the loss at each probe.
            measure: measure how the step changes the weights.
        """
        session = self.session
        if self._module.automatic_optimization:
            loss = closure()
        else:
            forward = self._in_precision(partial(self._manual_loss, closure))
            estimate = session.estimate(forward, optimizer=optimizer, counts=self._counts)
            loss = None if estimate is None else estimate.loss
        session.measure_update = measure
        self.records.append(session.update(optimizer, clip=partial(self._clipped, optimizer)))
        return loss

    def close(self) -> None:
        """End the session; its last state can still be read."""
        self._plugin.__dict__.pop("main_params", None)
        self.session.close()

    def _in_precision(self, call: Forward) -> Forward:
        def inside(batch: Batch) -> StepOutput:
            with self._plugin.train_step_context():
                return call(batch)

        return inside

    def _manual_loss(self, closure: Callable[[], Any], _: Batch) -> StepOutput:
        self._in_closure, self._closure_loss = True, None
        try:
            returned = closure()
        finally:
            self._in_closure = False
        loss = returned if returned is not None else self._closure_loss
        if loss is None:
            raise MisconfigurationException(NEEDS_LOSS)
        return loss

    def _clipped(self, optimizer: Optimizer, values: Sequence[float]) -> list[float]:
        """The projected gradients after Lightning's gradient clipping and its hooks."""
        raw = torch.tensor(values, dtype=torch.float64)
        self._projected.data, self._projected.grad = torch.zeros_like(raw), raw.clone()
        self._plugin._after_closure(self._module, optimizer)
        clipped = self._projected.grad
        return list(values) if clipped is None else [float(v) for v in clipped]

    def _resume_rng(self) -> None:
        """In the middle of an epoch the data loader, which draws a seed when it starts, has moved the generator since."""
        if self.resumed_rng is not None and self._module.trainer.fit_loop.epoch_loop.batch_progress.current.ready > 1:
            set_rng_state(self.resumed_rng, self.session.device)
        self.resumed_rng = None
