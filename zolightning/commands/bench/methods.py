"""The ways to take a step that are timed: each is a name and a function from the workload to a running method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset

from ...adapt.quantize import Kind
from ...engine.session import Session
from ...methods.config import EPS_BY_DTYPE, ZOConfig
from ...methods.recipes import QZO
from ...mixin import ZOMixin
from ...probing.objective import loss_value
from ...space import build_view, expose_scales
from ...strategy._lightning import Callback, pl
from ...strategy.strategy import ZOStrategy
from ...types import Batch
from .reference_mezo import ReferenceMeZO
from .workload import Spec, Unavailable, Workload

_PRECISION = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
LR = 1e-7  # small enough that nothing blows up, large enough that nothing is skipped


@dataclass
class Running:
    """A method on a workload, ready to step."""

    step: Callable[[float], float | None]
    """Takes one step with a learning rate; returns its seconds where only the method itself can tell them."""

    module: nn.Module
    """Whose weights it trains."""

    trained: int
    """Weights that a step perturbs or updates."""

    looking: Callable[[], bool] = lambda: False
    """Whether the next step takes longer than most, to look for state that the module keeps."""


Setup = Callable[[Workload], Running]


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    """For ``--methods`` and the files."""

    setup: Setup
    """Workload → running method."""

    backprop: bool = False
    """Takes a backward pass: its FLOPs are its own, and its memory may be too much."""

    state: float = 0.0
    """Least memory that it needs in addition to the weights, in units of the weights: gradients, optimizer state."""

    plain: bool = False
    """Runs on weights stored in the compute dtype, also where the others have fp32 masters."""

    kind: Kind | None = None
    """Runs on a quantised model of its own, see :func:`~zolightning.quantize`."""

    def workload(self, spec: Spec) -> Workload:
        """One of its own."""
        return Workload(spec.plain if self.plain else spec, self.kind)


def forward(work: Workload) -> Running:
    """Two forwards without gradients, which a two-point step needs at least."""
    model = work.shell()
    loss = work.loss(model)

    @torch.no_grad()
    def step(lr: float) -> None:
        for _ in range(2):
            loss_value(loss(work.batch))

    return Running(step, model, 0)


def reference_mezo(work: Workload) -> Running:
    """The published step on all weights."""
    model = work.shell()
    loss, mezo = work.loss(model), ReferenceMeZO(model.parameters(), EPS_BY_DTYPE[work.spec.compute_dtype], work.spec.seed)

    def step(lr: float) -> None:
        mezo.step(lambda: loss_value(loss(work.batch)), lr)

    return Running(step, model, work.numel)


def zeroth_order(work: Workload, config: ZOConfig) -> Running:
    """A session's step: probes, shaping, update by plain SGD, without the Trainer."""
    model = work.shell()
    if work.kind is not None:
        expose_scales(model)
    optimizer = SGD([p for p in model.parameters() if p.is_floating_point()], lr=LR)
    precision = _PRECISION.get(work.spec.compute_dtype, "")
    session = Session(model, optimizer, config.override(seed=work.spec.seed), precision=precision, device=work.device)
    loss = work.loss(model)

    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        session.estimate(loss, work.batch)
        record = session.update()
        if record.skipped:
            raise RuntimeError(f"a step was skipped, its time would mean nothing: {record.skipped}")

    try:
        space = session.subspace(loss, work.batch)
    except ValueError as error:  # no linear layers to take rank-1 directions of
        raise Unavailable(str(error)) from error
    if config.structure == "rank1" and not space.runner.examples.losses:
        raise Unavailable("the model reshapes its batch, so its linear layers cannot tell the examples apart")
    graphs = space.runner.graphs
    if graphs is not None:
        for _ in range(4):  # until the forwards are recorded
            if graphs.refused:
                raise Unavailable(graphs.refused)
            step(LR)
    return Running(step, model, space.view.numel, lambda: session.looking)


class _Module(ZOMixin, pl.LightningModule):
    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.model, self.lr = work.shell(), LR
        self._loss = work.loss(self.model)

    def zo_objective(self, batch: Batch) -> Tensor:
        return self._loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


class _Same(Dataset[object]):
    def __init__(self, item: object) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        return self.item


class _Stamps(Callback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.starts = device, list[float]()

    def on_train_batch_start(self, *args: object) -> None:
        synchronize(self.device)
        self.starts.append(time.perf_counter())


def in_trainer(work: Workload, config: ZOConfig) -> Running:
    """The same inside a Trainer: three steps, of which the second, from start to start, is the one timed."""
    module = _Module(work)
    module.eval()
    batches = DataLoader(_Same(work.batch), batch_size=None)

    def step(lr: float) -> float:
        module.lr = lr
        stamps = _Stamps(work.device)
        trainer = pl.Trainer(
            strategy=ZOStrategy(config.override(seed=work.spec.seed)),
            accelerator="gpu" if work.device.type == "cuda" else "cpu",
            devices=1,
            max_steps=3,
            callbacks=[stamps],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, batches)
        return stamps.starts[2] - stamps.starts[1]

    view = build_view(module, module.parameters(), config.build_distribution(), select_spec=config.select)
    return Running(step, module, view.numel)


def backprop(work: Workload, optimizer_type: Callable[..., torch.optim.Optimizer], checkpointed: bool = False) -> Running:
    """A training step by backprop on all weights."""
    model = work.shell()
    if checkpointed:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise Unavailable(f"{type(model).__name__} has no gradient checkpointing")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        model.train()  # the library checkpoints in training mode alone
    return _descent(work, model, optimizer_type)


def lora(work: Workload) -> Running:
    """Rank-8 adapters on the projections that peft chooses for the architecture, by AdamW."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed ({error}); pip install peft") from error
    try:
        model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0), work.shell())
    except ValueError as error:
        raise Unavailable(f"peft knows no adapters for this model: {error}") from error
    return _descent(work, model, AdamW)


def _descent(work: Workload, model: nn.Module, optimizer_type: Callable[..., torch.optim.Optimizer]) -> Running:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss = optimizer_type(trained, lr=LR), work.loss(model)

    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        value = loss(work.batch).mean()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        loss_value(value)

    return Running(step, model, sum(p.numel() for p in trained))


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_DENSE = ZOConfig(estimator="spsa", structure="dense", select="all", normalize=False)
_RANK1 = ZOConfig(estimator="per_example", structure="rank1", select="middle", normalize=False)

_QZO = QZO.override(structure="rank1", normalize=False)

FORWARD = Method("forward", forward, plain=True)
FORWARD_MASTER = Method("forward-master", forward)
REFERENCE = Method("reference-mezo", reference_mezo)
METHODS = {
    m.name: m
    for m in (
        FORWARD,
        FORWARD_MASTER,
        REFERENCE,
        Method("spsa-rademacher", partial(zeroth_order, config=_DENSE)),
        Method("spsa-gaussian", partial(zeroth_order, config=_DENSE.override(noise="gaussian"))),
        Method("spsa-middle", partial(zeroth_order, config=_DENSE.override(select="middle"))),
        Method("rank1", partial(zeroth_order, config=_RANK1)),
        Method("spsa-graphs", partial(zeroth_order, config=_DENSE.override(cuda_graphs=True))),
        Method("rank1-graphs", partial(zeroth_order, config=_RANK1.override(cuda_graphs=True))),
        Method("forward-nf4", forward, plain=True, kind="nf4"),
        Method("qzo-nf4", partial(zeroth_order, config=_QZO), plain=True, kind="nf4"),
        Method("qzo-nf4-graphs", partial(zeroth_order, config=_QZO.override(cuda_graphs=True)), plain=True, kind="nf4"),
        Method("forward-int8", forward, plain=True, kind="int8"),
        Method("qzo-int8", partial(zeroth_order, config=_QZO), plain=True, kind="int8"),
        Method("qzo-int8-graphs", partial(zeroth_order, config=_QZO.override(cuda_graphs=True)), plain=True, kind="int8"),
        Method("lightning", partial(in_trainer, config=_DENSE)),
        Method("backprop-sgd", partial(backprop, optimizer_type=SGD), backprop=True, state=1.0),
        Method("backprop-adamw", partial(backprop, optimizer_type=AdamW), backprop=True, state=3.0),
        Method("backprop-checkpointed", partial(backprop, optimizer_type=SGD, checkpointed=True), backprop=True, state=1.0),
        Method("lora", lora, backprop=True),
    )
}
_ON_REQUEST = ("forward-master", "lightning", "spsa-graphs", "rank1-graphs")
DEFAULT_METHODS = [name for name, method in METHODS.items() if name not in _ON_REQUEST and method.kind is None]
