"""``Trainer(strategy=ZOStrategy())``: training steps by forward passes alone.

The path of one step: :meth:`ZOStrategy.training_step` runs all probes (``estimators``) through the view of the weights
(``space``); :meth:`ZOStrategy.backward` fires Lightning's hooks and nothing else; :meth:`ZOStrategy.optimizer_step` clips
and shapes the projected gradients (``step``, ``shaping``), makes the record, and applies it through the user's
optimizer (``updates``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ._lightning import (
    MisconfigurationException,
    Precision,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
    _ResultCollection,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from .config import ZOConfig
from .isolation import Isolation, rng_state, set_rng_state
from .mixin import ZOMixin
from .objective import BatchObjective, batch_examples, gives_per_example
from .recipes import recipe as named_recipe
from .shaping import state_from
from .space import View, build_view
from .step import finish, merge, zo_step
from .types import Estimate, Key, SkipStep, StepRecord
from .updates import UpdateStats, apply_update, is_plain_sgd, widened_state

_CHECKPOINT_KEY = "zolightning"
_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")


class _Muted(_ResultCollection):
    """Swallows ``self.log`` in the forwards of a step after the first."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ZOStrategy(Strategy):
    """Zeroth-order training on one device: no backward pass, the memory of inference.

    Args:
        recipe: a name from :data:`zolightning.recipes.RECIPES`, or a :class:`~zolightning.ZOConfig`.
        accelerator: as for any Lightning strategy; the Trainer fills it in.
        checkpoint_io: likewise.
        precision_plugin: likewise.
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
        **overrides: Any,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        base = recipe if isinstance(recipe, ZOConfig) else named_recipe(recipe)
        self.config = base.override(**overrides)
        self.recipe_name = recipe if isinstance(recipe, str) else "custom"
        self.shaping = self.config.build_shaping()
        self._shaping_state = self.shaping.init()
        self.seed: int | None = self.config.seed
        self.zo_step = 0
        """Optimizer steps taken: the step of the next perturbation's key."""
        self.last_record: StepRecord | None = None
        self.last_stats: UpdateStats | None = None
        self.measure_update = False
        """Set by whoever wants ``last_stats`` of the next step."""
        self._skips = 0
        self._parallel_devices: list[torch.device] = []
        self._num_nodes = 1
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one fit."""
        self._views: dict[int, tuple[Optimizer, View]] = {}
        self._window: list[Estimate] = []
        self._isolation: Isolation | None = None
        self._per_example: bool | None = None
        self._inside_closure = False
        self._closure_loss: Tensor | None = None
        self._warned: set[str] = set()

    # ---- one device ----------------------------------------------------------------------------------------------------

    global_rank = local_rank = node_rank = 0
    world_size = 1
    is_distributed = False
    is_global_zero = True  # type: ignore[assignment]

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices that the Trainer assigned; exactly one."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices or []
        self._one_device_only()

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        self._num_nodes = number
        self._one_device_only()

    def _one_device_only(self) -> None:
        if len(self._parallel_devices) > 1 or self._num_nodes > 1:
            raise MisconfigurationException(
                f"ZOStrategy trains on one device, got devices={len(self._parallel_devices)}, num_nodes={self._num_nodes}; "
                "use Trainer(devices=1)"
            )

    @property
    def root_device(self) -> torch.device:
        return self._parallel_devices[0] if self._parallel_devices else torch.device("cpu")

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    # ---- set up --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        self._forget()
        super().setup(trainer)
        if self.seed is None:
            self.seed = torch.initial_seed() & 0xFFFFFFFFFFFFFFFF
        if trainer.state.fn != "fit":
            return
        module = self.lightning_module
        assert module is not None
        self._isolation = Isolation(module, self.root_device)
        self.estimator = self.config.build_estimator(self._compute_dtype())
        # gradient clipping goes through the precision plugin's parameters: give it the projected gradients
        self._projected = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        plugin = self.precision_plugin
        plugin.main_params = lambda optimizer: [self._projected]  # type: ignore[method-assign, assignment]

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.config.optimizer == "sgd":
            self.optimizers = [self._as_sgd(o) for o in self.optimizers]
        if self.config.lr is not None:
            for optimizer in self.optimizers:
                self._override_lr(optimizer, self.config.lr)
        for optimizer in self.optimizers:
            self._advise(optimizer)

    def _as_sgd(self, optimizer: Optimizer) -> Optimizer:
        """Plain SGD over the same groups; the module's schedulers move over to it."""
        if is_plain_sgd(optimizer):
            return optimizer
        groups = [{k: g[k] for k in ("params", "lr", "weight_decay", "initial_lr") if k in g} for g in optimizer.param_groups]
        sgd = SGD(groups, lr=float(groups[0]["lr"]))
        for config in self.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                config.scheduler.optimizer = sgd
        return sgd

    def _override_lr(self, optimizer: Optimizer, lr: float) -> None:
        first = optimizer.param_groups[0]
        base = float(first.get("initial_lr", first["lr"]))
        if base == 0.0 and any(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups):
            raise MisconfigurationException(
                "`ZOStrategy(lr=...)` scales all learning rates by the first group's, which is 0; set them in the module"
            )
        for group in optimizer.param_groups:
            for name in _LR_KEYS:
                if isinstance(group.get(name), (int, float)):
                    group[name] = group[name] * (lr / base) if base else lr
        for config in self.lr_scheduler_configs:
            scheduler = config.scheduler
            if scheduler.optimizer is optimizer and isinstance(getattr(scheduler, "base_lrs", None), list):
                scheduler.base_lrs = [b * (lr / base) if base else lr for b in scheduler.base_lrs]

    def _advise(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if not is_plain_sgd(optimizer):
            rank_zero_warn(
                f"ZOStrategy steps through the module's {name}, which keeps state for every trained weight; "
                "ZOStrategy(optimizer='sgd') keeps none and needs the memory of inference"
            )
        lr = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
        if self.config.normalize and is_plain_sgd(optimizer) and not 1e-5 <= lr <= 1e-2 and lr != 0:
            rank_zero_warn(
                f"with normalised steps the learning rate is the RMS change per weight and step; lr={lr:g} is far from what "
                "trains (3e-4 to 2e-3 for a pretrained model). Set it with ZOStrategy(lr=...)"
            )

    def _compute_dtype(self) -> torch.dtype:
        """The dtype that the forward's matrix products run in."""
        precision = str(getattr(self.precision_plugin, "precision", ""))
        if precision in ("bf16-mixed", "16-mixed"):
            return torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        assert self.lightning_module is not None
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.lightning_module.parameters():
            if parameter.dtype.is_floating_point:
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        largest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
        return largest if largest in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32

    def view(self, optimizer: Optimizer) -> View:
        """What this optimizer's steps search."""
        if id(optimizer) not in self._views:
            self._views[id(optimizer)] = (optimizer, self._build_view(optimizer))
        return self._views[id(optimizer)][1]

    def _build_view(self, optimizer: Optimizer) -> View:
        module, config = self.lightning_module, self.config
        assert module is not None

        def build(structure: Any) -> View:
            return build_view(
                module,
                [p for g in optimizer.param_groups for p in g["params"]],
                config.build_distribution(),
                select_spec=config.select,
                structure=structure,
                compiled=getattr(module, "_compiler_ctx", None) is not None,
            )

        view = build("dense" if config.structure == "auto" else config.structure)
        if config.structure == "auto" and self._per_example and config.estimator == "per_example":
            try:
                rank1 = build("rank1")
            except ValueError:  # no linear layers
                rank1 = view
            if rank1.per_example and rank1.numel >= 0.9 * view.numel:
                view = rank1
        trainable = sum(p.numel() for p in module.parameters())
        kind = type(view.leaves[0]).__name__.removesuffix("Leaf").lower()
        rank_zero_info(
            f"ZO: {self.estimator!r} on {len(view.leaves)} {kind} leaves, {view.numel:,} of {trainable:,} weights "
            f"(select={config.select!r}); the rest stay as they are"
        )
        return view

    # ---- one step ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:  # the probes run inside opt.step(closure=...)
            with torch.no_grad():
                return super().training_step(*args, **kwargs)

        if isinstance(module, ZOMixin):
            forward, batch = self._module_objective, args[0]
        else:
            forward, batch = lambda _: super(ZOStrategy, self).training_step(*args, **kwargs), args[0]
        out, estimate = self._estimate(forward, batch, self.optimizers[0])
        if estimate is None:
            return None
        # Lightning wants a tensor for its loops and progress bar; the doubles stay in the estimate
        loss = torch.tensor(estimate.loss, dtype=torch.float32, device=self.root_device)
        return {**out, "loss": loss} if isinstance(out, Mapping) else loss

    def _module_objective(self, batch: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self.lightning_module.zo_objective(batch)  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def _estimate(self, forward: Callable[[Any], Any], batch: Any, optimizer: Optimizer) -> tuple[Any, Estimate | None]:
        """Run the probes; (output of the first one, the estimate), and None for a micro-batch that is skipped."""
        assert self._isolation is not None and self.seed is not None
        if self._per_example is None:
            wanted = isinstance(self.lightning_module, ZOMixin) and self.config.estimator == "per_example"
            with self._muted():
                self._per_example = wanted and gives_per_example(forward, batch, self._isolation)
        examples = batch_examples(batch) if self._per_example else None
        view = self.view(optimizer)
        seen = sum(len(e.terms) for e in self._window)
        with self._isolation.step() as probes:
            objective = BatchObjective(forward, batch, probes, examples, self._muted)
            try:
                estimate = zo_step(objective, view, self.estimator, Key(self.seed, self.zo_step, seen))
            except SkipStep:
                return None, None
        self._warn_coarse(objective.dtype, estimate)
        self._window.append(estimate)
        return objective.first, estimate

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
                f"the loss is {dtype}, whose steps are coarse beside the difference of two probes; compute it in float32 "
                "(loss_fn(logits.float(), y))"
            )
        if estimate.terms and estimate.ties == len(estimate.terms) and len(estimate.terms) == 1:
            self._warn_once(
                "both probes gave exactly the same loss, so this step has no gradient: the objective is too coarse for eps "
                f"({self.estimator.eps:g}), or it does not depend on the trained weights"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
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
        if module.automatic_optimization:
            out = closure()
            loss = out
        else:
            loss = self._manual_estimate(optimizer, closure)
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
        raw = torch.tensor(window.coefficients, dtype=torch.float64)
        self._projected.data = torch.zeros_like(raw)
        self._projected.grad = raw.clone()
        self.precision_plugin._after_closure(module, optimizer)
        assert self._projected.grad is not None
        clipped = self._projected.grad.tolist()
        record, self._shaping_state = finish(
            window, clipped, self.shaping, self._shaping_state, optimizer, self.zo_step
        )
        self.last_record, self.last_stats = record, None
        if record.skipped:
            self._count_skip(record)
        else:
            self._skips = 0
            self.last_stats = apply_update(
                optimizer, self.view(optimizer), record.terms, Key(self.seed, self.zo_step), measure=self.measure_update
            )
        optimizer._opt_called = True  # type: ignore[attr-defined]  # a skipped step is no mistake of the scheduler's
        self.zo_step += 1

    def _count_skip(self, record: StepRecord) -> None:
        if record.raw:
            self._skips += 1
            self._warn_once(f"step {record.step} skipped: {record.skipped}; the weights are as before")
        if self._skips >= self.config.max_skips:
            raise RuntimeError(
                f"{self._skips} steps in a row had no finite projected gradient (last: {record.skipped}). The weights are those "
                "of the last finite step. Lower lr or eps, or look at the loss; ZOStrategy(max_skips=...) sets this limit"
            )

    # ---- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint:  # not for save_weights_only
            checkpoint[_CHECKPOINT_KEY] = {
                "seed": self.seed,
                "zo_step": self.zo_step,
                "shaping": dict(self._shaping_state),
                "config": self.config.to_dict(),
                "rng": rng_state(self.root_device),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            widened_state(optimizer, saved)
        state = checkpoint.get(_CHECKPOINT_KEY)
        if state is None:
            rank_zero_warn("the checkpoint was not written under ZOStrategy: perturbations start again from step 0")
            return
        self._shaping_state = state_from(state["shaping"], self.shaping)
        self.seed, self.zo_step = state["seed"], state["zo_step"]
        set_rng_state(state["rng"], self.root_device)

    def teardown(self) -> None:
        self.precision_plugin.__dict__.pop("main_params", None)
        for _, view in self._views.values():
            view.release()
        super().teardown()


# Lightning allows a compiled LightningModule only under strategies it knows; this is a single device to it
SingleDeviceStrategy.register(ZOStrategy)
if "zo" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("zo", ZOStrategy, description="zeroth-order training: forward passes only")

__all__ = ["ZOStrategy"]
