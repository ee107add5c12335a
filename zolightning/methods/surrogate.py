"""Projected gradients from a Gaussian process over the losses seen so far: few forwards a step, for few weights."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .._answers import needs
from ..noise import sample
from ..space import DenseLeaf, Leaf
from ..types import Answer, Estimate, Key, Point, Shared, Term
from .estimators import FiniteDifference

_FLOOR = 1e-12
_RANK = 1e-4  # some square matrices of ±1 are singular


class Surrogate(FiniteDifference):
    r"""The gradient of a Gaussian process's mean, as projected gradients along the step's directions:

    .. math:: \hat g = -\frac{5}{3 l^2} \sum_i \alpha_i (1 + r_i) e^{-r_i} (\theta - x_i), \qquad
              r_i = \sqrt 5\, \lVert \theta - x_i \rVert / l, \qquad \alpha = (K + \sigma^2 I)^{-1} y

    with the Matérn-5/2 kernel over the nearest losses of the past; :math:`\hat g` then travels and is recorded as its
    least-squares coefficients along ``num_queries`` directions, exactly where there are as many as weights. A step asks for
    the loss at the weights and at ``probes`` points, where the process is least certain. For up to a few thousand weights:
    adapters, vectors, prompts. FZooS, arXiv:2308.04077, whose kernel and active queries these are; it measures uncertainty by
    the gradient's variance, this by the loss's. :meth:`bind` it to the trained leaves before the first step; a federation's
    client does.

    Args:
        eps: how far along a direction of ±1 a probe goes, > 0.
        num_queries: directions of a step, of which few are probed, > ``probes``.
        probes: points of a step in addition to the weights themselves, >= 1.
        candidates: directions that the probes are chosen from, >= ``probes``.
        nearest: losses that the process is fitted to, >= 2.
        noise: σ² of the losses, once they are scaled to variance 1, > 0.
        refit: steps between fits of the length scale l, >= 1.
        correction: γ >= 0: local step t of a federation's client goes along ĝ + γ/(t + 1)·(the clients' mean − its own), both
            at the start of the round before; the paper's correction by random features has them at the weights of now.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        eps: float,
        num_queries: int,
        *,
        probes: int = 5,
        candidates: int = 50,
        nearest: int = 150,
        noise: float = 1e-6,
        refit: int = 10,
        correction: float = 0.0,
    ) -> None:
        super().__init__(eps, num_queries)
        if not 1 <= probes <= candidates <= num_queries or nearest < 2 or refit < 1 or not noise > 0:
            raise ValueError(
                "`Surrogate` needs 1 <= probes <= candidates <= num_queries, nearest >= 2, refit >= 1 and noise > 0, got "
                f"{probes}, {candidates}, {num_queries}, {nearest}, {refit} and {noise}"
            )
        self.probes, self.candidates, self.nearest, self.noise, self.refit = probes, candidates, nearest, noise, refit
        if not 0 <= correction < math.inf:
            raise ValueError(f"`Surrogate(correction=...)` must be >= 0, got {correction}")
        self.correction = correction
        self.length = 1.0
        """The length scale, as fitted last."""
        self._leaves: Sequence[Leaf] = ()
        self._seen: deque[tuple[Tensor, float]] = deque(maxlen=20 * nearest)
        self._steps = self._local = 0
        self._own: tuple[int, Tensor] | None = None  # the first local step, and the gradient there
        self._union: tuple[Term, ...] = ()
        self._shift: Tensor | None = None
        self._asked: tuple[Key, Tensor, Tensor] | None = None  # the directions, and where the loss is wanted

    def bind(self, leaves: Sequence[Leaf]) -> None:
        """Say what is trained: the positions of past probes are kept."""
        self._leaves = tuple(leaves)

    def begin_round(self) -> None:
        """A client's first local step comes next."""
        self._local = 0
        if self._union and self._own is not None:
            terms = self._union
            mean = self._directions([z for z, _ in terms]) @ torch.tensor([c for _, c in terms], dtype=torch.float64)
            self._shift = mean - self._own[1]
        self._union, self._own = (), None

    def hear(self, step: int, terms: Sequence[Term]) -> None:
        """All clients' step, of which the own was a part."""
        if self.correction and self._own is not None and self._own[0] == step:
            self._union = tuple(terms)

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        keys, chosen = self.directions(key), list(range(self.probes))
        if self._leaves:
            here, basis = self._position(), self._directions(keys)
            if len(self._seen) >= 2:
                points = here + self.eps * basis[:, : self.candidates].T
                spread = torch.from_numpy(self._fit(here, points)[1])
                chosen = sorted(spread.argsort(descending=True, stable=True)[: self.probes].tolist())
            places = torch.cat((here[None], here + self.eps * basis[:, chosen].T))
            self._asked = key, basis, places
        return [Shared(), *(Shared((Term(keys[i], self.eps),)) for i in chosen)]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        if not self._leaves or self._asked is None or self._asked[0] != key:
            raise ValueError("`Surrogate` must know what is trained: call bind(session.view().leaves) before the first step")
        _, basis, places = self._asked
        here = places[0]
        for place, answer in zip(places, answers, strict=True):
            if math.isfinite(answer.loss):
                self._seen.append((place, answer.loss))
        self._steps += 1
        directions = self.directions(key)
        gradient = self._fit(here)[0] if len(self._seen) >= 2 else torch.zeros_like(here)
        if self._local == 0:
            self._own = key.step, gradient
        if self.correction and self._shift is not None:
            gradient = gradient + self.correction / (self._local + 1) * self._shift
        self._local += 1
        found = torch.linalg.lstsq(basis, gradient[:, None], rcond=_RANK, driver="gelsy").solution[:, 0] * len(directions)
        return Estimate.of(map(Term, directions, found.tolist()), answers)

    def _fit(self, here: Tensor, points: Tensor | None = None) -> tuple[Tensor, Any]:
        """The gradient of the mean here, and the standard deviations at some points."""
        every = torch.stack([place for place, _ in self._seen])
        near = (every - here).norm(dim=1).argsort(stable=True)[: self.nearest]
        x, losses = every[near], torch.tensor([value for _, value in self._seen], dtype=torch.float64)[near]
        scale = max(float(losses.std(correction=0)), _FLOOR)
        gaussian, kernels = _sklearn("gaussian_process"), _sklearn("gaussian_process.kernels")
        distance = float((x - here).norm(dim=1).median()) or 1.0
        fits = points is None and self._steps % self.refit in (0, 1)
        start = min(max(self.length, distance), 100 * distance) if self._steps > 1 else 3 * distance
        kernel = kernels.Matern(length_scale=start, length_scale_bounds=(distance, 100 * distance), nu=2.5)
        process = gaussian.GaussianProcessRegressor(kernel, alpha=self.noise, optimizer="fmin_l_bfgs_b" if fits else None)
        with warnings.catch_warnings():  # a length at its bound is as good as any
            warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)
            process.fit((x - here).numpy(), ((losses - losses.mean()) / scale).numpy())
        self.length = float(process.kernel_.length_scale)
        if points is not None:
            return here, process.predict((points - here).numpy(), return_std=True)[1]
        r = math.sqrt(5) * (x - here).norm(dim=1) / self.length
        weights = -5 / (3 * self.length**2) * torch.from_numpy(process.alpha_) * (1 + r) * torch.exp(-r)
        return weights @ (here - x) * scale, None

    def _position(self) -> Tensor:
        return torch.cat([leaf.parameter.detach().double().flatten() for leaf in self._leaves]).cpu()

    def _directions(self, keys: Sequence[Key]) -> Tensor:
        """A column for each key, which are of one step."""
        queries = torch.tensor([key.query for key in keys])
        columns = []
        for leaf in self._leaves:
            if type(leaf) is DenseLeaf:  # all at once
                starts, numel = torch.zeros_like(queries), leaf.parameter.numel()
                columns.append(sample(leaf.distribution, keys[0], leaf.index, starts, numel, queries))
            else:
                columns.append(torch.stack([leaf.gradient([Term(key, 1.0)]).flatten().cpu() for key in keys]))
        return torch.cat(columns, 1).double().T


def _sklearn(name: str) -> Any:
    with needs("sklearn", "`Surrogate`", "scikit-learn>=1.4"):
        return import_module(f"sklearn.{name}")
