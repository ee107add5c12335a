"""MeZO as published, written plainly; the speed-ups are measured against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class ReferenceMeZO:
    r"""Algorithm 1 of MeZO, Malladi et al. 2023, arXiv:2305.17333: four sweeps over the weights and two forwards a step.

    .. math:: \theta \leftarrow \theta + \epsilon z, \quad \theta \leftarrow \theta - 2\epsilon z, \quad
              \theta \leftarrow \theta + \epsilon z, \quad \theta \leftarrow \theta - \mathrm{lr}\, g z, \qquad
              g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2\epsilon}

    Each sweep draws z again, tensor by tensor, from a generator reseeded with the step's seed. Rounding does not cancel
    over the cycle, so the weights drift even with lr 0.

    Args:
        parameters: The trained parameters; written in place.
        eps: perturbation scale.
        seed: The seed of the first step; every step adds 1.
    """

    def __init__(self, parameters: Iterable[Tensor], eps: float, seed: int = 0) -> None:
        self.parameters, self.eps, self.seed = list(parameters), eps, seed
        self._generator = torch.Generator(self.parameters[0].device)

    @torch.no_grad()
    def sweep(self, scale: float) -> None:
        """θ ← θ + scale · z of the current seed, in the weights' own dtype."""
        self._generator.manual_seed(self.seed)
        for p in self.parameters:
            z = torch.normal(0.0, 1.0, p.shape, generator=self._generator, dtype=p.dtype, device=p.device)
            p.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, loss: Callable[[], float], lr: float) -> float:
        """One step; returns the projected gradient g."""
        self.sweep(self.eps)
        plus = loss()
        self.sweep(-2 * self.eps)
        minus = loss()
        self.sweep(self.eps)
        g = (plus - minus) / (2 * self.eps)
        self.sweep(-lr * g)
        self.seed += 1
        return g
