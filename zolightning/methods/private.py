"""Differential privacy by noise on clipped projected gradients, with the accountant of the package ``dp-accounting``."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .._answers import needs
from ..types import Answer, Estimate, Key, PerExample, Point, Term
from .estimators import SPSA


class PrivateSPSA(SPSA):
    r"""Two-point SPSA along shared directions, each example's part clipped, and Gaussian noise on their sum:

    .. math:: c = \frac1B \Big( \sum_i g_i \min\big(1, C / \lVert g_i \rVert\big) + 2 C \sigma\, n \Big), \qquad
              n \sim N(0, I_q), \quad g_{ik} = \frac{\ell_i(\theta + \epsilon z_k) - \ell_i(\theta - \epsilon z_k)}{2\epsilon}

    Another example in the place of one moves the sum by at most 2C, so each step is a Gaussian mechanism of noise multiplier σ.
    The number of examples B is public, and no loss is told. DP-ZO, arXiv:2401.04343, with its clip on the step's directions
    together. The noise comes from the operating system, so that nobody can make it again, and a run differs from the next.
    Its doubles are rounded: not proof against attacks on floating-point noise.

    Args:
        eps: perturbation scale, > 0.
        num_queries: directions per step, >= 1.
        clip: C > 0, the largest norm of an example's projected gradients.
        noise: σ >= 0; 0 gives no privacy. :func:`noise_for` finds it for a budget.

    Raises:
        ValueError: a value is out of range.
    """

    per_example = True

    def __init__(self, eps: float, num_queries: int = 1, *, clip: float, noise: float) -> None:
        super().__init__(eps, num_queries)
        if not 0 < clip < math.inf or not 0 <= noise < math.inf:
            raise ValueError(f"`PrivateSPSA(clip=..., noise=...)` must be > 0 and >= 0, got {clip} and {noise}")
        self.clip, self.noise = float(clip), float(noise)

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        if examples is None:
            return super().ask(key)
        queries = [torch.full((examples,), z.query) for z in self.directions(key)]
        offset = torch.full((examples,), self.eps, dtype=torch.float32)
        return [PerExample(key, each, side * offset) for side in (1, -1) for each in queries]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        losses = [answer.losses for answer in answers if answer.losses is not None]
        if not losses:
            raise ValueError(
                "`PrivateSPSA` clips each example's part of a step: the module must give a loss for each example by "
                "`zo_objective`, on weights that each example can read for itself (linear layers and vectors)"
            )
        plus, minus = torch.stack(losses[: self.num_queries]), torch.stack(losses[self.num_queries :])
        g = ((plus - minus) / (2 * self.eps)).nan_to_num(0.0, 0.0, 0.0)  # (q, B): nobody learns whose loss was not finite
        clipped = g * (self.clip / g.norm(dim=0).clamp(min=self.clip))
        draw = secrets.SystemRandom()
        noisy = [value + draw.gauss(0.0, 2 * self.clip * self.noise) for value in clipped.sum(1).tolist()]
        terms = tuple(Term(z, value / g.shape[1]) for z, value in zip(self.directions(key), noisy, strict=True))
        return Estimate(terms, (), len(answers))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, clip={self.clip}, noise={self.noise})"


def spent(noise: float, steps: int, delta: float = 1e-5) -> float:
    """The ε of (ε, δ)-differential privacy, for a client's example, after so many steps of :class:`PrivateSPSA` on all of them.

    Args:
        noise: σ.
        steps: of the client, each on all of its examples; batches drawn at random leak less, which is not counted.
        delta: δ.

    Raises:
        ImportError: dp-accounting is not installed.
    """
    if noise == 0:
        return math.inf
    accounting = _accounting()
    accountant = accounting.rdp.RdpAccountant()
    accountant.compose(accounting.GaussianDpEvent(noise), steps)
    return float(accountant.get_epsilon(delta))


def noise_for(epsilon: float, steps: int, delta: float = 1e-5) -> float:
    """The σ at which so many steps cost ε; see :func:`spent`."""
    accounting = _accounting()
    make = accounting.rdp.RdpAccountant
    return float(
        accounting.calibrate_dp_mechanism(
            make, lambda noise: accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(noise), steps), epsilon, delta
        )
    )


def _accounting() -> Any:
    with needs("dp_accounting", "the accountant of privacy", "zolightning[private]"):
        import_module("dp_accounting.rdp")
        return import_module("dp_accounting")
