"""The settings of a method, and the pieces of a step that are built from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch

from .._answers import did_you_mean
from ..noise import DISTRIBUTIONS, Distribution
from ..space import STRUCTURES, Cycle, Groups, Scales, Select, Structure
from .backprop import Backprop
from .estimators import SPSA, Coordinatewise, Estimator, ForwardGradient, OneSidedSPSA, PerExampleSPSA, Population
from .optimizers import OPTIMIZERS, MakeOptimizer
from .shaping import Chain, Clip, Normalize, Ranks, Shaping, Standardize

ESTIMATORS: dict[str, Callable[[float, int], Estimator]] = {
    "spsa": SPSA,
    "one_sided": OneSidedSPSA,
    "coordinatewise": Coordinatewise,
    "population": Population,
    "forward_gradient": lambda eps, num_queries: ForwardGradient(num_queries),
    "per_example": PerExampleSPSA,
}
"""Name → (eps, number of directions) → estimator."""

EPS_BY_DTYPE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 3e-3, torch.float16: 3e-3}
"""eps where the recipe leaves it open: bfloat16 forwards need the larger one (the projected gradient's correlation with
float32's is 0.97 at 1e-3 and 0.99 at 3e-3)."""


@dataclass(frozen=True)
class ZOConfig:
    """A ZO method: a value composed of pieces. Named ones are in :mod:`zolightning.methods.recipes`."""

    estimator: str | Estimator = "per_example"
    """'spsa' (two probes a direction, shared by the batch), 'one_sided' (one probe a direction and one without),
    'coordinatewise' (likewise, eps being how far a probe moves a weight; for structure='groups'), 'population'
    (one probe a direction, compared with each other), 'forward_gradient' (exact, by forward differentiation), 'per_example'
    (a direction for each example where the module has a per-example objective, else as 'spsa'), or an
    :class:`~zolightning.methods.estimators.Estimator`."""

    eps: float | None = None
    """Perturbation scale, > 0. None: from the dtype that the forward runs in, see :data:`EPS_BY_DTYPE`."""

    num_queries: int | Literal["weights"] = 1
    """Directions per step (per example for 'per_example'), >= 1. Forward passes grow with it. 'weights': as many as a step
    trains weights, which makes groups of one weight each; for structure='groups'."""

    noise: str | Distribution = "rademacher"
    """'rademacher' (±1), 'gaussian', or a :class:`~zolightning.noise.Distribution`."""

    select: Select = "middle"
    """Which trainable parameters are perturbed and updated: 'all', 'middle', 'first:K', 'last:K', 'blocks:I-J', 'dominant'
    (one block, found on the first batch), 're:PATTERN', 'scales' (of quantised layers; 'scales:middle' and so on), or a
    function (name, parameter) -> bool."""

    cycle: Cycle | None = None
    """Blocks of the selection that take turns, see :class:`~zolightning.space.Cycle`. None: each step trains them all."""

    structure: str | Structure = "auto"
    """'dense': z of the weight's shape. 'rank1': z = u vᵀ on the matrices of linear layers. 'sparse': dense, on small weights
    only. 'lowrank': z = U Vᵀ, V the same for some steps. 'groups': each of the step's directions moves weights of its own. Or a
    :class:`~zolightning.space.Structure`, as Sparse(0.8). 'auto': 'rank1' for 'per_example' where it can run and linear layers
    hold nearly all selected weights, else 'dense'."""

    scales: Scales = "frozen"
    """Scales Δ of quantised layers. 'absolute': trained, probed at Δ + eps·z. 'relative': at Δ(1 + eps·z). 'frozen': they
    stay as they are, and other trainable weights are trained."""

    one_batch: bool = True
    """Run both probes in one batch of twice the size, where the module gives its losses by ``zo_objective`` and the batch is
    small (4,096 tokens; 256 for a direction that the examples share, and on a CPU where the first blocks may run once for
    both): faster. False: two forwards, with the activation memory of inference."""

    cuda_graphs: bool = False
    """Record the forwards of ``zo_objective`` as CUDA graphs, one for each shape of batch, so that a small model on a GPU no
    longer waits for Python. Python code of the forward (logging, counting, reading anything but the batch) runs for
    the first batches of a shape only. Forwards that cannot be recorded, or whose replay gives other bits, run as they are, and
    the log says why."""

    normalize: bool | Literal["std", "rank"] = True
    """Divide g by its running RMS, so that lr is the RMS change per weight and step. 'std': by its standard deviation over
    the step's directions, as FZOO and ES do. 'rank': its order among the step's directions in its place, which no increasing
    transform of the loss changes where each direction is probed once. False: a plain lr."""

    normalize_beta: float = 0.9
    """Decay of that running RMS, in [0, 1)."""

    clip: float | None = None
    """Largest |g| before normalising, > 0; None: no clip beyond the Trainer's gradient_clip_val."""

    lr: float | Literal["auto", "module"] | None = None
    """Learning rate in place of the module's own; its schedule keeps its shape. 'auto', of the default recipe: one that is
    found, free of the scale of weights and loss, see :class:`~zolightning.engine.step_size.StepSize`; it is for steps that are
    normalised by their RMS, on weights and not on scales, and means the module's elsewhere. None or 'module': the module's."""

    optimizer: str | MakeOptimizer = "module"
    """'module': the optimizer that configure_optimizers returns. Else one that takes its place, with the lr, weight decay and
    direction of its parameter groups and with its schedules: 'sgd' or 'sign' (no state), 'momentum' (0.9; one float32 number
    for each trained weight), 'adam' (two), or a function from parameter groups, as partial(torch.optim.RMSprop, alpha=0.9)."""

    conservative: bool = False
    """Keep the best of θ, θ − lr·ĝ and θ + lr·ĝ on the step's batches, by three more forwards for each. For plain SGD."""

    anchor: float | None = None
    """λ >= 0 of anchored weight decay, θ ← θ − lr·ĝ − lr·λ·(θ − θ₀), which draws trained weights to those that the fit began
    with, so that the model forgets less; arXiv:2605.30148. Under any optimizer, as AdamW decays weights to 0. θ₀ is in a file
    as large as the trained weights, which each step reads and a resumed fit needs. None: no anchor."""

    backprop: Select | Backprop | None = None
    """Parameters that backprop trains in the same steps and no probe moves, as 'last:2', or a
    :class:`~zolightning.methods.backprop.Backprop`. A replay ledger cannot rebuild such a run; checkpoints are whole."""

    seed: int | None = None
    """Seed of the perturbations. None: PyTorch's (``seed_everything``)."""

    max_skips: int = 20
    """Stop with an error after this many steps in a row without a finite projected gradient, >= 1."""

    def __post_init__(self) -> None:
        one_of("estimator", self.estimator, ESTIMATORS, Estimator)
        one_of("noise", self.noise, DISTRIBUTIONS, Distribution)
        one_of("structure", self.structure, ("auto", *STRUCTURES), Structure)
        groups = self.structure == "groups" or isinstance(self.structure, Groups)
        if not groups and (self.num_queries == "weights" or isinstance(self.build_estimator(torch.float32), Coordinatewise)):
            raise ValueError(
                f"coordinate-wise estimation needs `structure='groups'` or a `Groups(...)`, got {self.structure!r}"
            )
        one_of("optimizer", self.optimizer, ("module", *OPTIMIZERS), Callable)  # type: ignore[arg-type]
        one_of("scales", self.scales, ("frozen", "absolute", "relative"))
        if isinstance(self.select, str) and self.select.startswith("scales") and self.scales == "frozen":
            raise ValueError(f"`select={self.select!r}` needs `scales='relative'` or `scales='absolute'`, got 'frozen'")
        if self.lr == "module":
            object.__setattr__(self, "lr", None)
        if isinstance(self.lr, str) and self.lr != "auto":
            raise ValueError(f"`lr={self.lr!r}` is unknown; allowed: 'auto', 'module' and numbers >= 0")
        if isinstance(self.lr, (int, float)):
            object.__setattr__(self, "lr", float(self.lr))
            if not 0 <= self.lr < math.inf:
                raise ValueError(f"`lr` must be a finite number >= 0, got {self.lr}")
        if self.anchor is not None and not (isinstance(self.anchor, (int, float)) and 0 <= self.anchor < math.inf):
            raise ValueError(f"`anchor` must be a finite number >= 0, or None, got {self.anchor!r}")
        if self.max_skips < 1:
            raise ValueError(f"`max_skips` must be >= 1, got {self.max_skips}")
        one_of("normalize", str(self.normalize), ("True", "False", "std", "rank"))
        estimator = self.build_estimator(torch.float32)  # the pieces check the rest
        self.build_shaping()
        if self.normalize in ("std", "rank") and estimator.num_queries < 2 and not estimator.per_example:
            raise ValueError(
                f"`normalize={self.normalize!r}` compares the directions of a step and needs `num_queries` >= 2, got 1"
            )

    def override(self, **changes: Any) -> ZOConfig:
        """This config with some fields changed; TypeError with the closest name for an unknown one."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise TypeError(f"`{name}` is not a setting of ZOStrategy{hint}")
        return replace(self, **changes)

    def build_estimator(self, dtype: torch.dtype) -> Estimator:
        """The estimator for forwards that run in ``dtype``."""
        if isinstance(self.estimator, Estimator):
            return self.estimator
        eps = EPS_BY_DTYPE[dtype] if self.eps is None else self.eps
        return ESTIMATORS[self.estimator](eps, 2 if self.num_queries == "weights" else self.num_queries)  # known later

    def build_distribution(self) -> Distribution:
        return self.noise if isinstance(self.noise, Distribution) else DISTRIBUTIONS[self.noise]()

    def build_shaping(self) -> Shaping:
        links: list[Shaping] = []
        if self.clip is not None:
            links.append(Clip(self.clip))
        if self.normalize == "std":
            links.append(Standardize())
        elif self.normalize == "rank":
            links.append(Ranks())
        elif self.normalize:
            links.append(Normalize(self.normalize_beta))
        return Chain(*links)

    @property
    def finds_lr(self) -> bool:
        """Whether the size of a step is found by the loss."""
        return self.lr == "auto" and self.normalize is True and self.scales == "frozen"

    @property
    def own_lr(self) -> float | None:
        """The learning rate, where it is a number."""
        return self.lr if isinstance(self.lr, float) else None

    @property
    def make_optimizer(self) -> MakeOptimizer | None:
        """The maker of the optimizer that replaces the module's; None: the module's own is used."""
        if isinstance(self.optimizer, str):
            return OPTIMIZERS.get(self.optimizer)
        return self.optimizer

    def to_dict(self) -> dict[str, object]:
        """Plain values, for loggers and checkpoints."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v if isinstance(v, (int, float, str, type(None))) else repr(v) for k, v in values.items()}


class Overrides(TypedDict, total=False):
    """The fields of :class:`ZOConfig` as keyword arguments; its documentation says more.

    Args:
        estimator: 'spsa', 'one_sided', 'coordinatewise', 'population', 'forward_gradient', 'per_example', or an Estimator.
        eps: Perturbation scale, > 0; null: from the dtype of the forward.
        num_queries: Directions per step, >= 1; 'weights': one for each weight that a step trains, with structure 'groups'.
        noise: 'rademacher', 'gaussian', or a Distribution.
        select: 'all', 'middle', 'first:K', 'last:K', 'blocks:I-J', 'dominant', 're:PATTERN', 'scales', 'scales:middle' and so
            on, or a function (name, parameter) -> bool.
        cycle: How blocks of the selection take turns; null: all at once.
        structure: 'dense', 'rank1', 'sparse', 'lowrank' or 'groups', or a Structure; 'auto': 'rank1' where it can run.
        scales: Scales of quantised layers: 'absolute' noise, 'relative' noise, or 'frozen'.
        one_batch: Both probes in one batch of twice the size, where the module allows it.
        cuda_graphs: Replay the forwards of zo_objective as CUDA graphs, one for each shape of batch.
        normalize: Divide g by its running RMS, so that lr is the RMS change per weight and step; 'std': by its standard
            deviation over the step's directions; 'rank': take its order among them.
        normalize_beta: Decay of that running RMS, in [0, 1).
        clip: Largest |g| before normalising, > 0; null: no clip.
        lr: Learning rate in place of the module's own; its schedule keeps its shape. 'auto': found by the loss; 'module': the
            module's.
        optimizer: 'module': as configure_optimizers says; 'sgd', 'momentum', 'sign', 'adam', or a function from parameter
            groups to an optimizer: instead of that, with its learning rates, weight decay and schedules.
        conservative: Keep the best of the weights, the step and the opposite step, by three more forwards.
        anchor: Decay towards the weights that the fit began with, per unit of the learning rate, >= 0; null: none.
        backprop: Parameters that backprop trains in the same steps, as 'last:2', or a Backprop; null: none.
        seed: Seed of the perturbations; null: PyTorch's.
        max_skips: Stop after this many steps in a row without a finite projected gradient, >= 1.
    """

    estimator: str | Estimator
    eps: float | None
    num_queries: int | Literal["weights"]
    noise: str | Distribution
    select: Select
    cycle: Cycle | None
    structure: str | Structure
    scales: Scales
    one_batch: bool
    cuda_graphs: bool
    normalize: bool | Literal["std", "rank"]
    normalize_beta: float
    clip: float | None
    lr: float | Literal["auto", "module"] | None
    optimizer: str | MakeOptimizer
    conservative: bool
    anchor: float | None
    backprop: Select | Backprop | None
    seed: int | None
    max_skips: int


def one_of(name: str, value: Any, allowed: Any, kind: type | tuple[()] = ()) -> None:
    """Refuse a setting whose value is neither of ``kind`` nor one of the allowed names; ValueError with the closest name."""
    if isinstance(value, kind) or (isinstance(value, str) and value in allowed):
        return
    hint = did_you_mean(str(value), allowed)
    raise ValueError(f"`{name}={value!r}` is unknown; allowed: {', '.join(map(repr, allowed))}{hint}")
