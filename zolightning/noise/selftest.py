"""Do the native and the Triton kernels give the reference's bits on this machine? A few thousand elements of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from ..types import Key, Term
from . import reference
from .backend import Backend
from .distributions import DISTRIBUTIONS, Distribution, elements
from .native import DTYPES, NativeBackend

_KEY = Key(seed=0x5EED, step=7, query=2)
_TERMS = (Term(_KEY, 1e-2), Term(Key(1, 2, 3), -0.37), Term(Key(2**63, 2**40, 0), 3.0))
_LEAF = 11
_LENGTH = 2 * 1024 + 77
_WHOLE = 1 << 35  # beyond 32-bit block numbers even of Rademacher noise, at the beginning of a block
_START = _WHOLE + 1000  # in the middle of one


def verify(backend: NativeBackend) -> str:
    """The difference that was found, in words; "" when there is none. Settles how the backend's wide updates round, too."""
    for dist in (each() for each in DISTRIBUTIONS.values()):
        for name, check in _CHECKS.items():
            if not check(backend, dist):
                return f"{name} of {dist.name} noise differs from the reference"
    return ""


def verify_triton(backend: Backend, device: torch.device, kind: int | None) -> str:
    """The difference between Triton's kernels and torch's on this device, in words; "" when there is none.

    Args:
        backend: the kernels.
        device: where they run.
        kind: a distribution's ``native``; None for the kernels that make none of its noise.
    """
    narrow, wide = (specimens(dtype).to(device) for dtype in (torch.bfloat16, torch.float32))
    if kind is None:
        return _verify_rounding(backend, narrow, wide)
    (dist,) = (each() for each in DISTRIBUTIONS.values() if each.native == kind)
    return _verify_noise(backend, dist, narrow, wide)


def _verify_noise(backend: Backend, dist: Distribution, narrow: Tensor, wide: Tensor) -> str:
    assert dist.native is not None
    device = wide.device
    for (source, dtype), start in product(
        ((narrow, torch.bfloat16), (wide, torch.bfloat16), (wide, torch.float32)), (_START, _WHOLE)
    ):
        if not all(_perturbs(backend, source, dtype, dist, terms, start) for terms in (_TERMS, _TERMS[:1])):
            return f"the perturbation of {source.dtype} into {dtype} by {dist.name} noise differs from the reference"
        if not _perturbs_both(backend, source, dtype, dist, start):
            return f"{source.dtype} moved both ways into {dtype} by {dist.name} noise differs from the reference"
    starts, queries = torch.tensor([[0, 5, _START], [1, 0, 2**31 - 1]], device=device)
    ours = backend.noise(dist.native, [Term(_KEY, 1.0)], _LEAF, starts, _LENGTH, queries)
    if not same_bits(ours, elements(dist, _KEY, _LEAF, starts, _LENGTH, queries[:, None])):
        return f"the sample of {dist.name} noise differs from the reference"
    ours = backend.noise(dist.native, _TERMS, _LEAF, starts[2:], _LENGTH)[0]
    if not same_bits(ours, reference.noise_sum(dist, _TERMS, _LEAF, _START, _LENGTH, device)):
        return f"the sum of {dist.name} noise differs from the reference"
    table, rows = wide[: 90 * 22].view(90, 22), torch.arange(0, 90, 7, device=device).flip(0)
    ours, expected = torch.empty(2, len(rows), 22, dtype=torch.float32, device=device)
    backend.perturb_rows(ours, table[rows], dist.native, _TERMS, _LEAF, rows)
    reference.perturb_rows(expected, table[rows], dist, _TERMS, _LEAF, rows)
    if not same_bits(ours, expected):
        return f"the perturbation of rows by {dist.name} noise differs from the reference"
    for decay, start, terms in product((0.0, 0.1), (_START, _WHOLE), (_TERMS, _TERMS[:1])):
        ours, expected = narrow.clone(), narrow.clone()
        backend.sgd_(ours, dist.native, terms, _LEAF, start, 0.3, decay, _KEY)
        reference.sgd_(expected, dist, terms, _LEAF, start, 0.3, decay, _KEY)
        if not same_bits(ours, expected):
            return f"the update by {dist.name} noise differs from the reference"
    if not _takes_many(backend, dist, narrow, wide):
        return f"perturbing or updating several leaves by {dist.name} noise differs from the reference"
    return ""


def _verify_rounding(backend: Backend, narrow: Tensor, wide: Tensor) -> str:
    device = wide.device
    for start in (_START, _WHOLE):
        ours, expected = narrow.clone(), narrow.clone()
        backend.stochastic_round_(ours, wide, _KEY, _LEAF, start)
        reference.stochastic_round_(expected, wide, _KEY, _LEAF, start)
        if not same_bits(ours, expected):
            return "stochastic rounding differs from the reference"
    for source in (narrow, wide):
        ours, expected = torch.ones(2, _LENGTH, dtype=torch.bfloat16, device=device)
        backend.keep_large_(ours, source, 0.5)
        reference.keep_large_(expected, source, 0.5)
        if not same_bits(ours, expected):
            return "the kept weights differ from the reference"
    a, b = wide[: 3 * 37].view(3, 37), torch.linspace(-1, 1, 3 * 301, dtype=torch.float32, device=device).view(3, 301)
    if not same_bits(backend.outer_sum(a, b), reference.outer_sum(a, b)):
        return "the outer sum differs from the reference"
    for (height, columns), decay in product(((37, 51), (21, 96)), (0.0, 0.1)):  # an odd width, and one that 8 divides
        a, b = (wide[-4 * n :].view(4, n).clamp(-9, 9) for n in (height, columns))
        ours = narrow[9 : 9 + height * columns].clone().view(height, columns)
        expected = ours.clone()
        backend.outer_sgd_(ours, a, b, _LEAF, 0.3, decay, _KEY)
        reference.outer_sgd_(expected, a, b, _LEAF, 0.3, decay, _KEY)
        if not same_bits(ours, expected):
            return "the update by outer products differs from the reference"
    return ""


def _perturbs(
    backend: Backend, source: Tensor, dtype: torch.dtype, dist: Distribution, terms: Sequence[Term], start: int
) -> bool:
    assert dist.native is not None
    ours, expected = torch.empty(2, _LENGTH, dtype=dtype, device=source.device)
    backend.perturb(ours, source, dist.native, terms, _LEAF, start)
    reference.perturb(expected, source, dist, terms, _LEAF, start)
    return same_bits(ours, expected)


def _perturbs_both(backend: Backend, source: Tensor, dtype: torch.dtype, dist: Distribution, start: int = _START) -> bool:
    """Each way as a perturbation by itself."""
    assert dist.native is not None
    plus, minus, expected = torch.empty(3, _LENGTH, dtype=dtype, device=source.device)
    backend.perturb_both(plus, minus, source, dist.native, Term(_KEY, 0.37), _LEAF, start)
    agree = True
    for ours, side in ((plus, 0.37), (minus, -0.37)):
        reference.perturb(expected, source, dist, [Term(_KEY, side)], _LEAF, start)
        agree &= same_bits(ours, expected)
    return agree


def _takes_many(backend: Backend, dist: Distribution, narrow: Tensor, wide: Tensor) -> bool:
    """As one after another: leaves of several sizes, one of more than a piece, one at an odd address."""
    assert dist.native is not None
    agree = True
    for whole in (narrow, wide):
        for sources in ([whole[:5], whole[7:], whole.repeat(17)[1:]], [whole[:1600].clone(), whole.repeat(16)]):
            outs, expected = [torch.empty_like(s) for s in sources], [torch.empty_like(s) for s in sources]
            leaves = [3, 4, 9][: len(sources)]
            backend.perturb_all(outs, sources, dist.native, _TERMS, leaves)
            for leaf, out, source in zip(leaves, expected, sources, strict=True):
                reference.perturb(out, source, dist, _TERMS, leaf, 0)
            agree &= all(map(same_bits, outs, expected))
    for targets in ([narrow.repeat(16), narrow[:2048].clone()], [narrow.repeat(2)[1:]]):
        updated, expected = [t.clone() for t in targets], [t.clone() for t in targets]
        backend.sgd_all_(updated, dist.native, _TERMS, [3, 4][: len(targets)], 0.3, 0.0, _KEY)
        for leaf, target in zip((3, 4), expected, strict=False):
            reference.sgd_(target, dist, _TERMS, leaf, 0, 0.3, 0.0, _KEY)
        agree &= all(map(same_bits, updated, expected))
    return agree


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, signs of zeros included; one NaN is as good as another."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())


def specimens(dtype: torch.dtype) -> Tensor:
    """Numbers of every size in ``dtype``, with the zeros, infinities, NaN, subnormals and largest numbers."""
    spread = torch.linspace(-1, 1, _LENGTH, dtype=torch.float64)
    values = spread.sign() * torch.exp2(spread.abs() * 40 - 30 + torch.arange(_LENGTH, dtype=torch.float32) * 1e-3)
    limits = torch.finfo(dtype)
    special = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), limits.max, -limits.max, limits.tiny / 3, 65519.0)
    values[: len(special)] = torch.tensor(special, dtype=torch.float64)
    return values.to(dtype)


def _samples(backend: NativeBackend, dist: Distribution) -> bool:
    starts = torch.tensor([0, 5, _START])
    queries = torch.tensor([1, 0, 2**31 - 1])
    native = backend.noise(_kind(dist), [Term(_KEY, 1.0)], _LEAF, starts, _LENGTH, queries)
    return same_bits(native, elements(dist, _KEY, _LEAF, starts, _LENGTH, queries[:, None]))


def _perturbs_each_dtype(backend: NativeBackend, dist: Distribution) -> bool:
    agree = True
    for source in map(specimens, DTYPES):
        for dtype in DTYPES:
            agree &= _perturbs(backend, source, dtype, dist, _TERMS, _START) and _perturbs_both(backend, source, dtype, dist)
    return agree


def _perturbs_rows(backend: NativeBackend, dist: Distribution) -> bool:
    rows = torch.arange(0, 90, 7).flip(0)
    source = torch.linspace(-2, 2, len(rows) * 77, dtype=torch.float32).view(-1, 77)
    native, expected = torch.empty(2, len(rows), 77, dtype=torch.float32)
    backend.perturb_rows(native, source, _kind(dist), _TERMS[:1], _LEAF, rows)
    reference.perturb_rows(expected, source, dist, _TERMS[:1], _LEAF, rows)
    return same_bits(native, expected)


def _rounds_stochastically(backend: NativeBackend, _: Distribution) -> bool:
    agree = True
    for dtype in (torch.bfloat16, torch.float16):
        native, expected = torch.empty(2, _LENGTH, dtype=dtype)
        backend.stochastic_round_(native, specimens(torch.float32), _KEY, _LEAF, _START)
        reference.stochastic_round_(expected, specimens(torch.float32), _KEY, _LEAF, _START)
        agree &= same_bits(native, expected)
    return agree


def _updates(backend: NativeBackend, dist: Distribution, dtypes: Sequence[torch.dtype]) -> bool:
    agree = True
    for dtype, decay in product(dtypes, (0.0, 0.1)):
        native = torch.linspace(-1, 1, _LENGTH, dtype=torch.float64).to(dtype)
        expected = native.clone()
        backend.sgd_(native, _kind(dist), _TERMS, _LEAF, _START, 0.3, decay, _KEY)
        reference.sgd_(expected, dist, _TERMS, _LEAF, _START, 0.3, decay, _KEY)
        agree &= same_bits(native, expected)
    return agree


def _updates_narrow(backend: NativeBackend, dist: Distribution) -> bool:
    return _updates(backend, dist, (torch.bfloat16, torch.float16))


def _updates_wide(backend: NativeBackend, dist: Distribution) -> bool:
    """Whether torch.add fuses its product depends on the machine: take the way that matches, or neither."""
    for fused in (True, False):
        backend.fused = fused
        if _updates(backend, dist, (torch.float32, torch.float64)):
            return True
    backend.fused = None
    return True


def _sums_outer_products(backend: NativeBackend, _: Distribution) -> bool:
    a, b = specimens(torch.float32)[: 3 * 37].view(3, 37), torch.linspace(-1, 1, 3 * 301, dtype=torch.float32).view(3, 301)
    return same_bits(backend.outer_sum(a, b), reference.outer_sum(a, b))


def _updates_by_outer_products(backend: NativeBackend, _: Distribution) -> bool:
    agree = True
    dtypes = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if backend.updates(dtype)]
    for dtype, (height, columns), decay in product(dtypes, ((37, 51), (21, 96), (4, 520)), (0.0, 0.1)):
        a, b = (specimens(torch.float32)[-4 * n :].view(4, n).clamp(-9, 9).contiguous() for n in (height, columns))
        native = specimens(dtype)[9 : 9 + height * columns].clone().view(height, columns)
        expected = native.clone()
        backend.outer_sgd_(native, a, b, _LEAF, 0.3, decay, _KEY)
        reference.outer_sgd_(expected, a, b, _LEAF, 0.3, decay, _KEY)
        agree &= same_bits(native, expected)
    return agree


def _keeps_large(backend: NativeBackend, _: Distribution) -> bool:
    agree = True
    for stored in map(specimens, DTYPES):
        for dtype in DTYPES:
            native, expected = torch.ones(2, _LENGTH, dtype=dtype)
            backend.keep_large_(native, stored, 0.5)
            reference.keep_large_(expected, stored, 0.5)
            agree &= same_bits(native, expected)
    return agree


def _sums_fingerprints(backend: NativeBackend, _: Distribution) -> bool:
    words = specimens(torch.float64).view(torch.int64)
    return backend.mixed_sum(words, _START) == reference.mixed_sum(words, _START)


def _kind(dist: Distribution) -> int:
    assert dist.native is not None
    return dist.native


_CHECKS: dict[str, Callable[[NativeBackend, Distribution], bool]] = {
    "the sample": _samples,
    "the perturbation": _perturbs_each_dtype,
    "the perturbation of rows": _perturbs_rows,
    "stochastic rounding": _rounds_stochastically,
    "the update": _updates_narrow,
    "the wide update": _updates_wide,
    "the sum of outer products": _sums_outer_products,
    "the update by outer products": _updates_by_outer_products,
    "the kept weights": _keeps_large,
    "the sum for fingerprints": _sums_fingerprints,
}
