"""Transforms of the projected gradients before the update: pure functions of (values, state)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

State = dict[str, float]


class Shaped(NamedTuple):
    """A step's projected gradients after a transform.

    Args:
        values: the shaped values.
        state: the transform's state after them.
        limited: which of the values it cut off; () when it never does.
    """

    values: list[float]
    state: State
    limited: Sequence[bool] = ()


class Shaping(ABC):
    """A transform of a step's projected gradients. The state is a flat dict of numbers, so a checkpoint can hold it."""

    def init(self) -> State:
        """State before the first step."""
        return {}

    @abstractmethod
    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        """Shaped values, and the state after them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Clip(Shaping):
    """g ← min(max(g, −limit), limit), as QZO does (arXiv:2505.13430).

    Args:
        limit: largest |g|, > 0.
    """

    def __init__(self, limit: float) -> None:
        if not limit > 0:
            raise ValueError(f"`Clip(limit=...)` must be > 0, got {limit}")
        self.limit = float(limit)

    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        cut = [min(max(v, -self.limit), self.limit) for v in values]
        return Shaped(cut, state, [a != b for a, b in zip(values, cut, strict=True)])


class Normalize(Shaping):
    r"""Divides g by its running root mean square, so that lr is the RMS change per weight and step:

    .. math:: v \leftarrow \beta v + (1-\beta)\,\tfrac1n\textstyle\sum_k g_k^2, \qquad
              c_k = \sqrt n\, g_k / \sqrt{v / (1 - \beta^t)}

    With unit-variance noise the mean of :math:`c_k z_k` then has RMS about 1, whatever the loss's scale, the number of
    weights or of queries. One scalar of optimizer state, as in MEAZO, arXiv:2605.03869, which it equals for one direction;
    for more of them MEAZO squares their mean, a noisier measure of the same. A step of nothing but ties (all g = 0) says
    nothing of the scale of g and leaves v as it is: with a coarse objective the steps that count keep their size.

    Args:
        beta: decay of the second moment, in [0, 1).
        floor: smallest RMS to divide by, in units of g, >= 0: bounds the step where most losses tie.
    """

    def __init__(self, beta: float = 0.9, floor: float = 0.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"`Normalize(beta=...)` must be in [0, 1), got {beta}")
        if not floor >= 0:
            raise ValueError(f"`Normalize(floor=...)` must be >= 0, got {floor}")
        self.beta, self.floor = float(beta), float(floor)

    def init(self) -> State:
        return {"second_moment": 0.0, "decay": 1.0}

    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        n = len(values)
        if not any(values):
            return Shaped([0.0] * n, state)
        mean_square = math.fsum(v * v for v in values) / n
        second = self.beta * state["second_moment"] + (1 - self.beta) * mean_square
        decay = self.beta * state["decay"]
        rms = max(math.sqrt(second / (1 - decay)), self.floor)
        scale = math.sqrt(n) / rms if rms > 0 else 0.0  # the squares of the tiniest vanish
        return Shaped([v * scale for v in values], {"second_moment": second, "decay": decay})


class Standardize(Shaping):
    r"""Divides g by its standard deviation over the step's directions, so that lr does not depend on the loss's scale:

    .. math:: c_k = g_k / \mathrm{std}(g), \qquad \mathrm{std}(g)^2 = \tfrac{1}{n-1}\textstyle\sum_k (g_k - \bar g)^2

    FZOO, arXiv:2506.09034, where :math:`g_k \epsilon` is a loss minus that of the unperturbed weights; ES's z-score,
    arXiv:2509.24372, where it is a loss minus their mean. When all g are equal there is nothing to tell the directions
    apart by, and all become 0. A step of one direction, as a last batch of one example gives, has no deviation of its own and
    takes that of the step before.

    Args:
        floor: smallest standard deviation to divide by, in units of g, > 0: bounds the step where losses hardly differ.
    """

    def __init__(self, floor: float = 1e-8) -> None:
        if not floor > 0:
            raise ValueError(f"`Standardize(floor=...)` must be > 0, got {floor}")
        self.floor = float(floor)

    def init(self) -> State:
        return {"std": 0.0}

    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        n = len(values)
        if n > 1 and min(values) == max(values):
            return Shaped([0.0] * n, state)
        if n > 1:
            mean = math.fsum(values) / n
            state = {"std": max(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)), self.floor)}
        elif not state["std"]:
            raise ValueError(
                f"normalize='std' compares the directions of a step and needs 2 or more, got {n}; raise num_queries"
            )
        return Shaped([v / state["std"] for v in values], state)


class Ranks(Shaping):
    r"""Puts the order of the projected gradients in the place of their values, equal ones sharing the mean of their places:

    .. math:: c_k = \sqrt n\, \frac{2 r_k - n + 1}{\sqrt{(n^2 - 1)/3}}, \qquad r_k = 0, \dots, n - 1 \text{ from the smallest}

    With the estimators that probe once in each direction ('population', 'one_sided') a step then depends on the order of the
    losses only: any increasing transform of them leaves it as it is. The RMS change per weight is at most lr, as with
    :class:`Normalize`. Fitness shaping, Wierstra et al., arXiv:1106.4487.
    """

    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        n = len(values)
        if n < 2:
            raise ValueError(f"normalize='rank' compares the directions of a step and needs 2 or more, got {n}")
        unit = math.sqrt(n / ((n * n - 1) / 3))
        below = [sum(v < own for v in values) for own in values]
        above = [sum(v > own for v in values) for own in values]
        return Shaped([unit * (b - a) for b, a in zip(below, above, strict=True)], state)


class Chain(Shaping):
    """Transforms one after another.

    Args:
        links: the transforms, first to last.
    """

    def __init__(self, *links: Shaping) -> None:
        self.links = links

    def init(self) -> State:
        return {f"{i}.{k}": v for i, link in enumerate(self.links) for k, v in link.init().items()}

    def __call__(self, values: Sequence[float], state: State) -> Shaped:
        shaped, after, limited = list(values), dict(state), [False] * len(values)
        for i, link in enumerate(self.links):
            own = {k.removeprefix(f"{i}."): v for k, v in after.items() if k.startswith(f"{i}.")}
            shaped, own, cut = link(shaped, own)
            after.update({f"{i}.{k}": v for k, v in own.items()})
            limited = [a or b for a, b in zip(limited, cut, strict=True)] if cut else limited
        return Shaped(shaped, after, limited)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.links))})"


def state_from(saved: dict[str, Any], shaping: Shaping) -> State:
    """A checkpoint's state for ``shaping``; ValueError when it was written by another one."""
    expected = shaping.init()
    if set(saved) != set(expected):
        raise ValueError(
            f"the checkpoint holds shaping state {sorted(saved)}, but {shaping!r} needs {sorted(expected)}; resume with "
            "the recipe that wrote it"
        )
    return {k: float(v) for k, v in saved.items()}
