"""The sweeps over a leaf's elements: ``W + Σ c z``, ``Σ c z``, the update, stochastic rounding.

Each runs on the fastest backend that can take the tensors (see :mod:`zolightning.noise.backends`) and gives the bits of
:mod:`zolightning.noise.reference` on any of them. Tensors may have any dtype of float32, bfloat16, float16, float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..types import Key, Term
from . import backends, reference
from .backend import Backend
from .distributions import Distribution, elements


def sample(dist: Distribution, key: Key, leaf: int, starts: Tensor, length: int, queries: Tensor | None = None) -> Tensor:
    """Elements ``start … start + length`` of a leaf's noise for each start.

    Args:
        dist: the distribution.
        key: which direction.
        leaf: the leaf's index.
        starts: int64 of shape (n,), on the device where the noise is wanted.
        length: elements in each run.
        queries: int64 of shape (n,): one query a run, in place of the key's.

    Returns:
        float32 of shape (n, length).
    """
    backend = backends.backend_on(starts.device, dist.native)
    if backend is not None and dist.native is not None:
        return backend.noise(dist.native, [Term(key, 1.0)], leaf, starts, length, queries)
    return elements(dist, key, leaf, starts, length, key.query if queries is None else queries[:, None])


def noise_sum(dist: Distribution, terms: Sequence[Term], leaf: int, start: int, length: int, device: torch.device) -> Tensor:
    """Σ_k c_k z_k over elements ``start … start + length``: float32 of shape (length,), summed in the terms' order."""
    backend = backends.backend_on(device, dist.native)
    if backend is None or dist.native is None:
        return reference.noise_sum(dist, terms, leaf, start, length, device)
    return backend.noise(dist.native, terms, leaf, torch.full((1,), start, device=device), length)[0]


def perturb(out: Tensor, source: Tensor, dist: Distribution, terms: Sequence[Term], leaf: int, start: int = 0) -> None:
    """``out[i] = source[i] + Σ_k c_k z_k(start + i)``, added in the source's working dtype and then rounded to nearest.

    Args:
        out: where the perturbed weights go: any dtype, the source's shape; may be the source itself.
        source: the weights.
        dist: the distribution of the directions.
        terms: the directions and how far to go along each.
        leaf: the leaf's index.
        start: index of the source's first element in the leaf.
    """
    if out.shape != source.shape:
        raise ValueError(f"perturb: out is {tuple(out.shape)}, source is {tuple(source.shape)}")
    backend = _backend_for(out, source, kind=dist.native)
    if backend is None or dist.native is None:
        reference.perturb(out, source, dist, terms, leaf, start)
    else:
        backend.perturb(out, source, dist.native, terms, leaf, start)


def perturb_all(
    outs: Sequence[Tensor], sources: Sequence[Tensor], dist: Distribution, terms: Sequence[Term], leaves: Sequence[int]
) -> None:
    """:func:`perturb` of several whole leaves: on a GPU one launch for those of a dtype.

    Args:
        outs: of the sources' shapes and dtypes.
        sources: the weights.
        dist: the distribution of the directions.
        terms: the directions and how far to go along each.
        leaves: the leaves' indices.
    """
    for backend, places in _together(sources, outs, kind=dist.native):
        if backend is None or dist.native is None:
            for i in places:
                perturb(outs[i], sources[i], dist, terms, leaves[i])
        else:
            some = [sources[i] for i in places]
            backend.perturb_all([outs[i] for i in places], some, dist.native, terms, [leaves[i] for i in places])


def perturb_both(
    plus: Tensor, minus: Tensor, source: Tensor, dist: Distribution, term: Term, leaf: int, start: int = 0
) -> None:
    """``plus = source + c z`` and ``minus = source - c z``: two calls of :func:`perturb` that make the noise once.

    Args:
        plus: any dtype, the source's shape; not the source itself.
        minus: likewise, of the same dtype.
        source: the weights.
        dist: the distribution of the direction.
        term: the direction and how far to go along it, either way.
        leaf: the leaf's index.
        start: index of the source's first element in the leaf.
    """
    backend = _backend_for(plus, minus, source, kind=dist.native)
    if backend is None or dist.native is None:
        for out, side in ((plus, 1.0), (minus, -1.0)):
            perturb(out, source, dist, [Term(term.key, side * term.coefficient)], leaf, start)
    else:
        backend.perturb_both(plus, minus, source, dist.native, term, leaf, start)


def perturb_rows(out: Tensor, source: Tensor, dist: Distribution, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
    """``out[j, :] = source[j, :] + Σ_k c_k z_k(r * columns + …)`` for ``r = rows[j]``: an embedding's rows in use.

    Args:
        out: (n, columns), any dtype; may be the source itself.
        source: these rows of the leaf, (n, columns).
        dist: the distribution of the directions.
        terms: the directions and how far to go along each.
        leaf: the leaf's index.
        rows: int64 (n,), the rows' numbers in the leaf.
    """
    if not out.shape == source.shape == (rows.numel(), *source.shape[1:]):
        raise ValueError(f"perturb_rows: {rows.numel()} rows, out is {tuple(out.shape)}, source is {tuple(source.shape)}")
    backend = _backend_for(out, source, kind=dist.native)
    if backend is None or dist.native is None:
        reference.perturb_rows(out, source, dist, terms, leaf, rows)
    else:
        backend.perturb_rows(out, source, dist.native, terms, leaf, rows)


def stochastic_round_(target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
    """Store ``value`` so that its expectation is kept: up or down with odds given by the distance to each neighbour.

    Values that the target's type can hold are stored as they are; beyond its largest finite number the value is rounded to
    nearest. The odds are exact, but for float16 below 2**-14, where they are within 2**-17.

    Args:
        target: the stored piece, bfloat16 or float16; wider types take the value as it is.
        value: float32 of the same shape.
        key: the step's key; the bits are a pure function of it, so a replay rounds alike.
        leaf: the leaf's index.
        start: index of the piece's first element.
    """
    backend = _backend_for(target, value)
    if backend is None or not backend.rounds(target.dtype) or value.dtype != torch.float32:
        reference.stochastic_round_(target, value, key, leaf, start)
    else:
        backend.stochastic_round_(target, value, key, leaf, start)


def sgd_(
    target: Tensor,
    dist: Distribution,
    terms: Sequence[Term],
    leaf: int,
    start: int,
    lr: float,
    weight_decay: float,
    key: Key,
) -> None:
    r"""One plain SGD step, :math:`w \leftarrow w - \mathrm{lr}\,(\sum_k c_k z_k + \mathrm{wd}\, w)`, in one pass.

    float32 and float64 weights get the bits of ``torch.optim.SGD`` without momentum; bfloat16 and float16 weights are
    updated in float32, each operation rounded by itself, and stored by :func:`stochastic_round_`. To maximise, negate
    the coefficients.

    Args:
        target: the weights, updated in place.
        dist: the distribution of the directions.
        terms: the estimated gradient.
        leaf: the leaf's index.
        start: index of the target's first element in the leaf.
        lr: learning rate.
        weight_decay: the L2 penalty's factor.
        key: names the rounding bits.
    """
    backend = _backend_for(target, kind=dist.native)
    if backend is None or dist.native is None or not backend.updates(target.dtype):
        reference.sgd_(target, dist, terms, leaf, start, lr, weight_decay, key, noise_sum)
    else:
        backend.sgd_(target, dist.native, terms, leaf, start, lr, weight_decay, key)


def sgd_all_(
    targets: Sequence[Tensor],
    dist: Distribution,
    terms: Sequence[Term],
    leaves: Sequence[int],
    lr: float,
    weight_decay: float,
    key: Key,
) -> None:
    """:func:`sgd_` on several whole leaves: one call of a backend for those of a dtype.

    Args:
        targets: the weights, updated in place.
        dist: the distribution of the directions.
        terms: the estimated gradient.
        leaves: the leaves' indices.
        lr: learning rate.
        weight_decay: the L2 penalty's factor.
        key: names the rounding bits.
    """
    for backend, places in _together(targets, kind=dist.native):
        some, numbers = [targets[i] for i in places], [leaves[i] for i in places]
        if backend is None or dist.native is None or not backend.updates(some[0].dtype):
            for target, leaf in zip(some, numbers, strict=True):
                sgd_(target, dist, terms, leaf, 0, lr, weight_decay, key)
        else:
            backend.sgd_all_(some, dist.native, terms, numbers, lr, weight_decay, key)


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """``Σ_k a_k b_kᵀ``, summed in the order of k, each product and sum rounded by itself.

    A matrix product sums in an order of its own on every device and thread count.

    Args:
        a: (n, rows), float32 or float64.
        b: (n, columns), of the same dtype.
    """
    backend = _backend_for(a, b)
    if backend is None or a.dtype != torch.float32:
        return reference.outer_sum(a, b)
    return backend.outer_sum(a, b)


def outer_run(a: Tensor, b: Tensor, start: int, length: int) -> Tensor:
    """Elements ``start … start + length`` of :func:`outer_sum`, row-major."""
    return reference.outer_run(a, b, start, length, outer_sum)


def outer_sgd_(target: Tensor, a: Tensor, b: Tensor, leaf: int, lr: float, weight_decay: float, key: Key) -> None:
    r"""One plain SGD step on a whole leaf, :math:`w \leftarrow w - \mathrm{lr}\,(\sum_k a_k b_k^\top + \mathrm{wd}\, w)`.

    The sum is that of :func:`outer_sum`, rounding that of :func:`sgd_`.

    Args:
        target: (rows, columns), updated in place.
        a: (n, rows), in the target's working dtype.
        b: (n, columns), likewise.
        leaf: the leaf's index.
        lr: learning rate.
        weight_decay: the L2 penalty's factor.
        key: names the rounding bits.
    """
    backend = _backend_for(target, a, b)
    if backend is None or a.dtype != torch.float32 or not backend.updates(target.dtype):
        reference.outer_sgd_(target, a, b, leaf, lr, weight_decay, key, outer_sum)
    else:
        backend.outer_sgd_(target, a, b, leaf, lr, weight_decay, key)


def keep_large_(out: Tensor, stored: Tensor, limit: float) -> None:
    """``out[i] = stored[i]`` where ``|stored[i]| > limit``: weights that a perturbation or an update must not change.

    Args:
        out: any dtype, the stored one's shape.
        stored: the weights before.
        limit: >= 0, a number that the stored dtype holds.
    """
    if out.shape != stored.shape:
        raise ValueError(f"keep_large_: out is {tuple(out.shape)}, stored is {tuple(stored.shape)}")
    backend = _backend_for(out, stored)
    if backend is None:
        reference.keep_large_(out, stored, limit)
    else:
        backend.keep_large_(out, stored, limit)


def mixed_sum(words: Tensor, first: int = 0) -> int:
    """Σ_i mix(word_i, first + i) modulo 2^64, where mix is one-to-one in the word: fingerprints of weights are made of it.

    Args:
        words: int64 of shape (n,), contiguous.
        first: number of the first word, >= 0.
    """
    backend = backends.backend_on(words.device)
    return reference.mixed_sum(words, first) if backend is None else backend.mixed_sum(words, first)


def _backend_for(*tensors: Tensor, kind: int | None = None) -> Backend | None:
    """The backend, with kernels of that kind of noise, of plain tensors of one device that it takes, or None."""
    device = tensors[0].device
    backend = backends.backend_on(device, kind)
    if backend is None:
        return None
    for t in tensors:
        if t.device != device or t.dtype not in backend.dtypes or type(t) not in (Tensor, Parameter) or not t.is_contiguous():
            return None
    return backend


def _together(*tensors: Sequence[Tensor], kind: int | None) -> list[tuple[Backend | None, list[int]]]:
    """Places of the tensors that one call of a backend can take, by device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors[0]):
        alike.setdefault((tensor.device, tensor.dtype), []).append(place)
    groups: list[tuple[Backend | None, list[int]]] = []
    for places in alike.values():
        backend = _backend_for(*[each[p] for p in places for each in tensors], kind=kind)
        if backend is not None:
            groups.append((backend, places))
        else:
            groups += [(_backend_for(*[each[p] for each in tensors], kind=kind), [p]) for p in places]
    return groups
