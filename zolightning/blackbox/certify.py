"""How far an input may move before a smoothed classifier can change its answer, with a stated confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ABSTAINS = -1


@dataclass(frozen=True)
class Certificates:
    """The result of :func:`certify`, one entry for each example."""

    sigma: float
    """Standard deviation of the noise."""

    labels: Tensor
    """(N,), the true classes."""

    classes: Tensor
    """(N,), the smoothed classifier's; −1 where it abstains."""

    radii: Tensor
    """(N,), float64: in this L2 distance around the example the class stays."""

    def accuracy(self, radius: float = 0.0) -> float:
        """Share of examples whose class is right and stays so within the radius."""
        return float(((self.classes == self.labels) & (self.radii >= radius)).double().mean())

    def picture(self, path: str | Path) -> None:
        """The certified accuracy over the radius, as an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        most = max(float(self.radii.max()), self.sigma)
        radii = torch.linspace(0, 1.05 * most, 400).tolist()
        axes.plot(radii, [100 * self.accuracy(radius) for radius in radii])
        axes.set(xlabel="L2 radius", ylabel="certified accuracy, %", ylim=(0, 100), xlim=(0, radii[-1]))
        axes.set_title(f"randomised smoothing, σ = {self.sigma:g}, {len(self.labels)} examples")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


@torch.no_grad()
def certify(
    model: Callable[[Tensor], Tensor],
    data: Iterable[tuple[Tensor, Tensor] | Sequence[Tensor]],
    sigma: float,
    *,
    samples: int = 1000,
    guesses: int = 100,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int = 0,
) -> Certificates:
    r"""The radius in which the class of :math:`x + \delta`, :math:`\delta \sim N(0, \sigma^2)`, that is most likely stays so:

    .. math:: R = \sigma\,\Phi^{-1}(\underline{p}), \qquad
              \underline{p} = \text{Clopper–Pearson's lower bound of } P(f(x + \delta) = c)

    Randomised smoothing, Cohen et al. 2019, arXiv:1902.02918. The class c is guessed from other samples than those that are
    counted; where :math:`\underline{p} \le 1/2` it abstains, with radius 0. Only answers of the model are needed.

    Args:
        model: (B, …) → (B, classes) scores.
        data: (inputs, labels) batches.
        sigma: σ > 0, standard deviation of the noise.
        samples: The number of samples that are counted for each example, >= 1.
        guesses: The number of samples for the guess of the class, >= 1.
        alpha: The probability with which a radius may be wrong, in (0, 1).
        batch_size: The number of noisy inputs in one call of the model.
        seed: The seed of the noise.

    Raises:
        ValueError: a setting out of range, no data, or another number of answers than of inputs.
    """
    from scipy.stats import binomtest, norm

    for name, value, fine in (
        ("sigma", sigma, 0 < sigma < float("inf")), ("alpha", alpha, 0 < alpha < 1), ("samples", samples, samples >= 1),
        ("guesses", guesses, guesses >= 1), ("batch_size", batch_size, batch_size >= 1),
    ):  # fmt: skip
        if not fine:
            raise ValueError(f"`certify({name}=...)` is out of range: {value}")
    smoothed = _Smoothed(model, sigma, batch_size, torch.Generator().manual_seed(seed))
    labels, classes, radii = [], [], []
    for inputs, targets in data:
        for x, y in zip(inputs, targets, strict=True):
            guess = int(smoothed.counts(x, guesses).argmax())
            hits = int(smoothed.counts(x, samples)[guess])
            low = binomtest(hits, samples, alternative="greater").proportion_ci(1 - alpha, "exact").low
            labels.append(int(y))
            classes.append(guess if low > 0.5 else ABSTAINS)
            radii.append(sigma * float(norm.ppf(low)) if low > 0.5 else 0.0)
    if not labels:
        raise ValueError("`certify(data=...)` holds no examples")
    return Certificates(sigma, torch.tensor(labels), torch.tensor(classes), torch.tensor(radii, dtype=torch.float64))


class _Smoothed(NamedTuple):
    """A classifier of inputs with noise."""

    model: Callable[[Tensor], Tensor]
    sigma: float
    batch_size: int
    generator: torch.Generator

    def counts(self, x: Tensor, samples: int) -> Tensor:
        """(classes,), the number of noisy copies of ``x`` that each class is the answer to."""
        total = torch.zeros(0, dtype=torch.int64)
        for first in range(0, samples, self.batch_size):
            size = min(self.batch_size, samples - first)
            noise = torch.randn(size, *x.shape, generator=self.generator).to(x)
            scores = self.model(x + self.sigma * noise)
            if scores.dim() != 2 or len(scores) != size:
                raise ValueError(f"the model must give scores ({size}, classes), got shape {tuple(scores.shape)}")
            found = scores.argmax(1).cpu().bincount(minlength=scores.shape[1])
            total = total + found if len(total) else found
        return total
