"""Named methods: each a value composed of the pieces, with its paper and the paper's hyperparameters."""

from __future__ import annotations

from ..space import Cycle, Epochs, Groups, LowRank, Sparse
from .config import ZOConfig, one_of

DEFAULT = ZOConfig(lr="auto")
"""Rank-1 directions per example on the middle blocks, normalised steps: the best on the demo task.

A step whose examples have no losses of their own gets dense two-point SPSA on the same blocks. Of the module's learning rate
only the shape of its schedule counts; ``lr="module"`` takes it as it is.
"""

SPSA = ZOConfig(estimator="spsa", structure="dense")
"""Dense two-point SPSA with ±1 noise on the middle blocks, normalised steps: :data:`DEFAULT` becomes this where
examples have no losses of their own."""

MEZO = ZOConfig(
    estimator="spsa",
    eps=1e-3,
    noise="gaussian",
    select="all",
    structure="dense",
    normalize=False,
    lr=1e-6,
    optimizer="sgd",
)
"""MeZO, Malladi et al. 2023, arXiv:2305.17333: θ ← θ − lr·g·z with Gaussian z on all weights.

Hyperparameters of its OPT experiments: eps 1e-3, lr 1e-6 (or 1e-7) constant, batch 16, no momentum.
"""

MEZO_LORA = MEZO.override(eps=1e-2, lr=1e-4)
"""MeZO on LoRA adapters (:func:`zolightning.adapt.peft.lora`), arXiv:2305.17333: rank 8, α 16, eps 1e-2, lr 1e-4 or 5e-5."""

MEZO_PREFIX = MEZO.override(eps=1e-1, lr=1e-2)
"""MeZO on a prefix (:func:`zolightning.adapt.peft.prefix`), arXiv:2305.17333: 5 tokens, begun as real ones; eps 1e-1, lr 1e-2
or 1e-3."""

SPARSE_MEZO = MEZO.override(structure=Sparse(0.75))
"""Sparse-MeZO, Liu et al. 2024, arXiv:2402.15751: MeZO on only the weights with |θ| ≤ h, h a quantile of each parameter.

Sparsity 0.75 or 0.8, by task: the share of weights that is not trained. eps and lr are MeZO's; the paper tunes larger ones too.
"""

LOZO = MEZO.override(structure=LowRank(rank=1, hold=100))
"""LOZO, Chen et al. 2024, arXiv:2410.07698: z = U Vᵀ on matrices, V the same for ν = ``hold`` steps; Gaussian z on vectors.

Hyperparameters of its OPT experiments: rank 1 or 2, ν 50 or 100, eps 1e-3, lr 1e-6 or 1e-7. With rank r here z = U Vᵀ/√r, so
its eps is ours divided by √r, and its published code, which leaves the 1/r of its estimator out, has our lr divided by r.
"""

CYCLIC = MEZO.override(cycle=Cycle())
"""MeZO on one block after another: block-wise ZO, Zhang et al. 2024, arXiv:2402.11592; MeZO-BCD, arXiv:2501.19099."""

DOMINANT = MEZO.override(select="dominant")
"""MeZO on one block only, the first whose activations have outliers: Dominant-Layer ZO, Yu et al. 2026, arXiv:2606.05516."""

MEAZO = MEZO.override(normalize=True, normalize_beta=0.99, lr=1e-4)
"""MEAZO, Dbouk et al. 2026, arXiv:2605.03869: θ ← θ − lr·g·z/√v̂, with v a running mean of g², one number of state.

The equation is the paper's; β and lr are ours.
"""

FZOO = ZOConfig(
    estimator="one_sided",
    eps=1e-4,
    num_queries=8,
    select="all",
    structure="dense",
    normalize="std",
    lr=5e-5,
    optimizer="sgd",
)
"""FZOO, Dang et al. 2025, arXiv:2506.09034: θ ← θ − lr·Σ_i (ℓ_i − ℓ_0) z_i / (N·std(ℓ)), z of ±1, N + 1 forwards.

Hyperparameters: N 8, eps 1e-4, lr 5e-5, for this form: where the equation is written with 1/eps, lr would be 1e4 times
smaller. The paper runs its N forwards side by side on a GPU; here they run one after another.
"""

ES = ZOConfig(
    estimator="population",
    eps=1e-3,
    num_queries=30,
    noise="gaussian",
    select="all",
    structure="dense",
    normalize="std",
    lr=5e-4,
    optimizer="sgd",
)
"""Evolution strategies, Qiu et al. 2025, arXiv:2509.24372: θ ← θ + lr·mean_n R_n z_n, where R_n is the z-score of the
reward −L(θ + eps·z_n).

Hyperparameters: N 30, eps (their σ) 1e-3, lr (their α) 5e-4. The z-score takes the standard deviation with N − 1, which
makes the step of the published code 1.7 % shorter.
"""

ZO_MOMENTUM = MEZO.override(optimizer="momentum", lr=1e-7)
"""ZO-SGD with momentum 0.9, in ZO-Bench, Zhang et al. 2024, arXiv:2402.11592: one float32 number for each trained weight.

ZO-Bench searches lr in 1e-5 … 1e-8 and eps in 1e-3 … 1e-5. Its ZO-SGD is :data:`MEZO`.
"""

ZO_SIGN = MEZO.override(optimizer="sign")
"""ZO-signSGD, Liu et al., ICLR 2019, in ZO-Bench, arXiv:2402.11592: θ ← θ − lr·sign(g·z), element by element.

ZO-Bench searches lr in 1e-4 … 1e-8; here each weight moves by lr in each step.
"""

ZO_ADAM = MEZO.override(optimizer="adam")
"""ZO-Adam, in ZO-Bench, arXiv:2402.11592: Adam on the estimate g·z, with two float32 numbers for each trained weight.

ZO-Bench searches lr in 1e-4 … 1e-8 and eps in 1e-3 … 1e-5.
"""

ZO_CONSERVATIVE = MEZO.override(conservative=True)
"""Conservative ZO-SGD, in ZO-Bench, arXiv:2402.11592: the best of θ, θ − lr·g·z and θ + lr·g·z, by 3 more forwards.

ZO-Bench searches lr in 1e-5 … 1e-8 and eps in 1e-2 … 1e-4.
"""

FORWARD_GRADIENT = MEZO.override(estimator="forward_gradient", eps=None, lr=5e-7)
"""Forward gradient, Baydin et al. 2022, arXiv:2202.08587, in ZO-Bench, arXiv:2402.11592: θ ← θ − lr·(z·∇L)·z, exactly.

lr is ZO-Bench's for OPT-1.3B on SST-2. One forward, with a tangent for every activation.
"""

REFT = ZOConfig(eps=0.2, lr=4e-2, num_queries=2)
"""Vectors at the last positions of a frozen language model, see :func:`~zolightning.adapt.interventions.intervene`: per-example
directions, normalised steps. ReFT, Wu et al. 2024, arXiv:2404.03592, trained by forwards.

The unit of eps and lr is the size of the hidden states. Where the module encodes the text before them in ``zo_prepare``,
a probe costs a few positions instead of a whole prompt, hence the two queries for each example.
"""

QZO = ZOConfig(estimator="per_example", select="scales", scales="relative", eps=2e-2, clip=100.0)
"""QZO with relative noise, a direction for every example and normalised steps: Δ ← Δ·(1 − lr·ĝz). The learning rate is the
relative change of a scale a step; 2e-2 trains the demo task.

The directions act on activations: one factor for each output and one for each group of inputs, see
:class:`~zolightning.space.RowScaleLeaf`. Where examples have no losses of their own, or a library stores its scales in another
order, it is two-point SPSA with a number for each scale, as ``ZOStrategy("qzo", estimator="spsa", structure="dense")`` is.

On its NF4 model the projected gradients with bfloat16 products correlate with float32's by 0.95 at eps 1e-2 and 0.99 at
3e-2; with the paper's absolute noise by 0.22 at 1e-3 and 0.89 at 3e-3.
"""

QZO_PAPER = ZOConfig(
    estimator="spsa",
    eps=1e-3,
    noise="gaussian",
    select="scales",
    structure="dense",
    scales="absolute",
    clip=100.0,
    normalize=False,
    lr=1e-5,
    optimizer="sgd",
)
"""QZO, Shang et al. 2025, arXiv:2505.13430: Δ ← max(Δ − lr·clip(g, ±100)·z, 1e-7) on the scales of quantised layers.

Hyperparameters of its scripts: eps 1e-3, lr 1e-5 (1e-7 for OPT-6.7B) constant, batch 16. Their scales are steps between
codes; bitsandbytes' are the largest magnitude of a block, 7 times that at 4 bits.
"""

ZEROQAT = ZOConfig(estimator="per_example", select="middle", eps=1e-2)
"""After ZeroQAT, arXiv:2509.00031: training through the rounding of :mod:`zolightning.adapt.fakequant`.

As :data:`DEFAULT`, straight through: a direction for every example acts on the activations of the rounded layer, and moves the
weights before the rounding. The paper's way, where probes are rounded too, also trains clipping and smoothing:
``ZOStrategy("zeroqat", estimator="spsa", structure="dense", select="all")``. It needs the larger eps: a probe then moves a
weight by a whole grid step or not at all, and the share that moves is eps over that step.

At 3 bits and fewer train the scales of the codes instead, ``ZOStrategy("qzo")`` after
:func:`~zolightning.adapt.fakequant.export_quantized`: a step of 8e-3 in weights of size 0.2 leaves their rounding errors
correlated by 0.75 with those before it, so that a few steps draw all of them anew, and a step of the scales keeps them.
"""

DEEPZERO = ZOConfig(
    estimator="coordinatewise",
    eps=5e-3,
    num_queries="weights",
    select="all",
    structure=Groups(sparsity=0.9, ratios="grasp", redraw=Epochs(5)),
    normalize=False,
    lr=0.1,
    optimizer="momentum",
)
"""DeepZero, Chen et al. 2024, arXiv:2310.02025: coordinate-wise differences of a tenth of the weights, for small models.

A forward for each weight that a step trains, so that a step of ResNet-20 takes 27,000; masks by ZO-GraSP's ratios, drawn anew
every 5 epochs, and feature reuse. Hyperparameters of its CIFAR-10 experiments: eps (their μ) 5e-3, sparsity 0.9, lr 0.1 with
cosine decay, momentum 0.9, weight decay 5e-4, batch 256; schedule and weight decay are the module's. Fewer forwards:
``ZOStrategy("deepzero", num_queries=192, structure=Groups("gradient"))``.
"""

RECIPES: dict[str, ZOConfig] = {
    "default": DEFAULT,
    "spsa": SPSA,
    "mezo": MEZO,
    "mezo-lora": MEZO_LORA,
    "mezo-prefix": MEZO_PREFIX,
    "sparse-mezo": SPARSE_MEZO,
    "lozo": LOZO,
    "cyclic": CYCLIC,
    "dominant": DOMINANT,
    "meazo": MEAZO,
    "fzoo": FZOO,
    "es": ES,
    "zo-momentum": ZO_MOMENTUM,
    "zo-sign": ZO_SIGN,
    "zo-adam": ZO_ADAM,
    "zo-conservative": ZO_CONSERVATIVE,
    "forward-gradient": FORWARD_GRADIENT,
    "reft": REFT,
    "qzo": QZO,
    "qzo-paper": QZO_PAPER,
    "zeroqat": ZEROQAT,
    "deepzero": DEEPZERO,
}


def recipe(name: str) -> ZOConfig:
    """The recipe of that name; ValueError with the closest name for an unknown one."""
    one_of("recipe", name, RECIPES)
    return RECIPES[name]


def name_of(config: ZOConfig) -> str:
    """The recipe's name, or 'custom' for other settings."""
    return next((name for name, known in RECIPES.items() if known == config), "custom")
