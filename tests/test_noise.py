"""The statistical contract of the noise, and what stochastic rounding and the sweeps promise, on the active backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zolightning import noise
from zolightning.noise import Distribution, Gaussian, Rademacher, sample
from zolightning.noise.distributions import elements, rounding_bits
from zolightning.noise.philox import philox4x32, philox_key
from zolightning.types import Key, Term

N = 1 << 18
CPU = torch.device("cpu")
DISTRIBUTIONS = [Rademacher(), Gaussian()]
RECORDED = {"rademacher": -89047556947968, "gaussian": -95781200308149}
Sampler = Callable[[Key, int, int, int], Tensor]  # key, leaf, start, length -> noise


def sampler(dist: Distribution) -> Sampler:
    return lambda key, leaf, start, length: sample(dist, key, leaf, torch.tensor([start]), length)[0].double()


# Each statistic below is about standard normal for good noise: 5 is passed by chance once in two million.
LIMIT = 5.0


def moment_scores(z: Tensor, dist: Distribution) -> dict[str, float]:
    """How far the first four moments are off, in standard errors."""
    if isinstance(dist, Rademacher):  # the higher moments are those of the first two
        return {"mean": z.mean().item() * math.sqrt(len(z)), "square": (z.square() - 1).abs().max().item() * 1e9}
    expected = (0.0, 1.0, 0.0, 3.0)
    spread = (1.0, 2.0, 15.0, 96.0)  # variances of z, z^2, z^3, z^4
    return {f"moment {k + 1}": ((z ** (k + 1)).mean().item() - expected[k]) * math.sqrt(len(z) / spread[k]) for k in range(4)}


def shape_scores(z: Tensor, dist: Distribution) -> dict[str, float]:
    """Distance from the whole distribution: runs of eight signs for Rademacher, 256 equally likely bins for Gaussian."""
    if isinstance(dist, Rademacher):
        cells = ((z.view(-1, 8) > 0).long() << torch.arange(8)).sum(1)
    else:
        cells = (torch.special.ndtr(z) * 256).long().clamp(0, 255)
    counts = torch.bincount(cells, minlength=256).double()
    expected = len(cells) / 256
    chi2 = ((counts - expected).square() / expected).sum().item()
    scores = {"chi-square": (chi2 - 255) / math.sqrt(2 * 255)}
    if isinstance(dist, Gaussian):
        uniform = torch.special.ndtr(z).sort().values
        gap = (uniform - (torch.arange(len(z)) + 0.5) / len(z)).abs().max().item() * math.sqrt(len(z))
        scores["Kolmogorov-Smirnov"] = gap * LIMIT / 2.7  # P(gap > 2.7) = 2 exp(-2 * 2.7^2), about 1e-6
    return scores


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).mean()) * math.sqrt(len(a))


def worst_shift(a: Tensor, b: Tensor) -> float:
    """The largest correlation over all shifts of one stream against another (by Fourier transform)."""
    spectrum = torch.fft.rfft(a, 2 * len(a)).conj() * torch.fft.rfft(b, 2 * len(a))
    scores = torch.fft.irfft(spectrum).abs() / math.sqrt(len(a))
    return float(scores.max()) * LIMIT / 7  # half a million tries: 7 is passed by chance once in a million


def correlation_scores(sample: Sampler) -> dict[str, float]:
    """Along one stream at several lags, and between streams that differ in one part of their name."""
    here, leaf = Key(3, 5, 0), 2
    z = sample(here, leaf, 0, N + 65536)
    scores = {f"lag {lag}": correlation(z[:N], z[lag : N + lag]) for lag in (1, 2, 3, 4, 7, 32, 128, 1024, 65536)}
    half = N // 2
    scores["worst shift"] = worst_shift(z[:half], z[half : 2 * half])
    others: dict[str, tuple[Key, int]] = {}
    for d in (1, 2, 64):
        others |= {
            f"seed +{d}": (here._replace(seed=here.seed + d), leaf),
            f"step +{d}": (here._replace(step=here.step + d), leaf),
            f"query +{d}": (here._replace(query=d), leaf),
            f"leaf +{d}": (here, leaf + d),
        }
    others["seed and step swapped"] = (Key(5, 3, 0), leaf)
    for name, (key, other) in others.items():
        w = sample(key, other, 0, N)
        scores[name] = correlation(z[:N], w)
        scores[f"{name}, worst shift"] = worst_shift(z[:N], w)
        scores[f"{name}, squares"] = correlation(z[:N] ** 2 - (z[:N] ** 2).mean(), w**2 - (w**2).mean()) / 2
    return scores


def battery(sample: Sampler, dist: Distribution) -> dict[str, float]:
    """The scores beyond the limit: empty for good noise."""
    z = sample(Key(1, 2, 3), 4, 0, N)
    # a direction's scalar products with any fixed vector must vary from step to step as chance has it
    fixed = torch.linspace(0.1, 1, 4096, dtype=torch.float64)
    products = torch.stack([sample(Key(1, step), 0, 0, 4096) @ fixed for step in range(400)]) / fixed.norm()
    scores = moment_scores(z, dist) | shape_scores(z, dist) | correlation_scores(sample)
    scores["mean over steps"] = products.mean().item() * math.sqrt(400)
    scores["variance over steps"] = (products.square().mean().item() - 1) * math.sqrt(400 / 2)
    return {name: score for name, score in scores.items() if not abs(score) < LIMIT}


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=repr)
def test_noise_passes_the_battery(dist: Distribution) -> None:
    assert battery(sampler(dist), dist) == {}


def single_finaliser(key: Key, leaf: int, start: int, length: int) -> Tensor:
    """One murmur3 finaliser over the raw index, seed added: weak, as published code has it."""
    x = (torch.arange(start, start + length) + key.seed * 31 + key.step * 7 + key.query + leaf * 131) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return 1.0 - 2.0 * ((x ^ (x >> 16)) & 1).double()


def reused_pool(key: Key, leaf: int, start: int, length: int) -> Tensor:
    """A pool of good noise read from an offset that depends on the key."""
    pool = elements(Rademacher(), Key(0, 0), 0, torch.tensor([0]), 1 << 16, 0)[0].double()
    offset = (key.seed * 7919 + key.step * 104729 + key.query * 31 + leaf * 17) % len(pool)
    return pool[(torch.arange(start, start + length) + offset) % len(pool)]


@pytest.mark.parametrize("bad", [single_finaliser, reused_pool])
def test_bad_generators_fail_the_battery(bad: Sampler) -> None:
    assert len(battery(bad, Rademacher())) >= 3


def test_philox_known_answers() -> None:
    """The vectors of the Random123 distribution for philox4x32-10."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones, ones, ones, ones), (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for (c0, c1, leaf, query), key, expected in cases:
        block = c0 | c1 << 32
        words = philox4x32(torch.tensor([block - (1 << 64) if block >> 63 else block]), leaf, query, key)[0]
        assert " ".join(f"{word:08x}" for word in words.tolist()) == expected


def test_every_bit_of_a_word_is_balanced() -> None:
    words = philox4x32(torch.arange(1 << 15), 1, 2, philox_key(Key(3, 4))).flatten()
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() * 2 * math.sqrt(len(words)) < LIMIT


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=repr)
class TestElements:
    """Noise is a pure function of the element."""

    def test_chunks_change_nothing(self, dist: Distribution) -> None:
        whole = noise.noise_sum(dist, [Term(Key(1, 2), 1.0)], 3, 0, 5000, CPU)
        for start, stop in ((0, 1), (1, 130), (127, 129), (1023, 1025), (999, 5000), (5000, 5000)):
            part = noise.noise_sum(dist, [Term(Key(1, 2), 1.0)], 3, start, stop - start, CPU)
            assert torch.equal(part, whole[start:stop])

    def test_huge_indices(self, dist: Distribution) -> None:
        start = (1 << 40) + 77
        far = sample(dist, Key(1, 2), 3, torch.tensor([start, start + 5]), 2000)
        assert torch.equal(far[0, 5:], far[1, :-5])
        near = sample(dist, Key(1, 2), 3, torch.tensor([77, start & 0xFFFFFFFF]), 2000)
        assert all(abs(correlation(far[0], row)) < LIMIT for row in near)

    def test_equal_shapes_differ(self, dist: Distribution) -> None:
        a, b = (noise.noise_sum(dist, [Term(Key(1, 2), 1.0)], leaf, 0, 1024, CPU) for leaf in (0, 1))
        assert abs(correlation(a, b)) < LIMIT

    def test_queries_of_one_call_are_those_of_many(self, dist: Distribution) -> None:
        starts, queries = torch.tensor([0, 7, 0]), torch.tensor([4, 0, 9])
        together = sample(dist, Key(1, 2, 5), 3, starts, 100, queries)
        for row, start, query in zip(together, starts.tolist(), queries.tolist(), strict=True):
            assert torch.equal(row, sample(dist, Key(1, 2, query), 3, torch.tensor([start]), 100)[0])

    def test_recorded_values(self, dist: Distribution) -> None:
        """A ledger written today must replay with every later version."""
        z = sample(dist, Key(2**63 + 11, 12345, 6), 7, torch.tensor([1000]), 4096)[0]
        digest = int((z.view(torch.int32).long() * torch.arange(1, 4097)).sum())
        assert digest == RECORDED[dist.name]


def test_gaussian_polynomials() -> None:
    """All 2**16 radii and all 2**16 angles against double precision."""
    half = torch.arange(1 << 16)
    radius = (-2 * ((2 * half.double() + 1) / 2**17).log()).sqrt()
    part = ((half & 0x1FFF).double() + 0.5) / 2**13 * math.pi / 4
    swap, flip_cos, flip_sin = ((half >> bit & 1).bool() for bit in (13, 15, 14))
    cos, sin = torch.where(swap, part.sin(), part.cos()), torch.where(swap, part.cos(), part.sin())
    angles = torch.stack((torch.where(flip_cos, -cos, cos), torch.where(flip_sin, -sin, sin)), -1)
    assert (Gaussian().from_words(half << 16).view(-1, 2) - radius[0] * angles).abs().max() < 6e-6
    z = Gaussian().from_words(half | 0x0FFF << 16).view(-1, 2).double()  # every radius, one angle
    assert (z.square().sum(1).sqrt() - radius).abs().max() < 4e-6
    assert radius.max() < 4.86


def test_a_distribution_of_ones_own_runs() -> None:
    """A new distribution needs one method, and inherits no native code from what it overrides."""

    class Half(Rademacher):
        def from_words(self, words: Tensor) -> Tensor:
            return super().from_words(words) * 0.5

    terms = [Term(Key(1, 2), 1.0)]
    mine, theirs = (noise.noise_sum(d, terms, 0, 3, 500, CPU) for d in (Half(), Rademacher()))
    assert torch.equal(mine, theirs / 2)


class TestStochasticRounding:
    KEY = Key(9, 8, 7)

    def rounded(self, value: Tensor, dtype: torch.dtype, key: Key | None = None) -> Tensor:
        target = torch.empty_like(value, dtype=dtype)
        noise.stochastic_round_(target, value, key or self.KEY, 1, 0)
        return target

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_the_type_holds_stays(self, dtype: torch.dtype) -> None:
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        result = self.rounded(every.float(), dtype)
        numbers = ~every.isnan()
        assert torch.equal(result.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
        assert result[~numbers].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [1.001, -1.001, 0.02003, -3.3e-5, 5e-7, -2e-8, 300.1])
    def test_the_expectation_is_kept(self, dtype: torch.dtype, value: float) -> None:
        stored = torch.full((N,), value)
        result = self.rounded(stored, dtype).double()
        low, high = result.min().item(), result.max().item()
        exact = stored[0].item()
        assert low < exact < high
        assert len(set(result.tolist())) == 2
        odds = (exact - low) / (high - low)
        error = (result.mean().item() - exact) / ((high - low) * math.sqrt(odds * (1 - odds) / N))
        assert abs(error) < LIMIT

    def test_small_updates_arrive(self) -> None:
        """Updates of a hundredth of an ulp, lost altogether by rounding to nearest."""
        w = torch.full((N,), 0.02, dtype=torch.bfloat16)
        before = w.double().mean()
        steps, update = 20, 1e-6
        for step in range(steps):
            noise.stochastic_round_(w, w.float() - update, Key(1, step), 0, 0)
        moved = (before - w.double().mean()).item()
        ulp = 2.0**-13
        assert abs(moved - steps * update) < LIMIT * math.sqrt(steps * update * ulp / N)

    def test_beyond_the_largest_number_it_rounds_to_nearest(self) -> None:
        value = torch.tensor([65505.0, 65519.9, 65520.0, -1e30, math.inf, -math.inf]).repeat(500)
        assert torch.equal(self.rounded(value, torch.float16), value.half())
        value = torch.tensor([3.3961e38, -3.4e38]).repeat(500)
        assert torch.equal(self.rounded(value, torch.bfloat16), value.bfloat16())

    def test_bits_are_uniform_and_no_direction(self) -> None:
        random = rounding_bits(self.KEY, 1, 0, N, CPU)
        chi2 = (torch.bincount(random >> 8, minlength=256) - N / 256).square().sum().item() / (N / 256)
        assert abs(chi2 - 255) / math.sqrt(510) < LIMIT
        centred = (random.double() + 0.5) / 65536 - 0.5
        z = sampler(Gaussian())(self.KEY, 1, 0, N)
        assert abs(correlation(centred * math.sqrt(12), z)) < LIMIT

    def test_wide_types_take_the_value(self) -> None:
        value = torch.randn(100)
        assert torch.equal(self.rounded(value, torch.float32), value)
        assert torch.equal(self.rounded(value, torch.float64), value.double())


class TestSweeps:
    TERMS = (Term(Key(1, 2, 0), 0.3), Term(Key(1, 2, 1), -0.7))

    @pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=repr)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_perturb_is_the_sum(self, dist: Distribution, dtype: torch.dtype) -> None:
        w = torch.randn(3000).to(dtype)
        out = torch.empty(3000, dtype=dtype)
        noise.perturb(out, w, dist, self.TERMS, 5, start=700)
        z = noise.noise_sum(dist, self.TERMS, 5, 700, 3000, CPU)
        assert torch.equal(out, (w.to(noise.working_dtype(dtype)) + z).to(dtype))
        noise.perturb(w, w, dist, self.TERMS, 5, start=700)
        assert torch.equal(w, out)

    def test_any_layout(self) -> None:
        w = torch.randn(37, 53)
        expected = w.clone()
        noise.perturb(expected, expected, Gaussian(), self.TERMS, 1)
        out = torch.empty(53, 37).t()
        noise.perturb(out, w.t().contiguous().t(), Gaussian(), self.TERMS, 1)
        assert torch.equal(out, expected)

    def test_rows_are_those_of_the_leaf(self) -> None:
        w = torch.randn(50, 77)
        whole = torch.empty_like(w)
        noise.perturb(whole, w, Gaussian(), self.TERMS, 4)
        rows = torch.tensor([49, 0, 3, 3])
        out = torch.empty(4, 77)
        noise.perturb_rows(out, w[rows], Gaussian(), self.TERMS, 4, rows)
        assert torch.equal(out, whole[rows])

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(ValueError, match="out is"):
            noise.perturb(torch.empty(3), torch.empty(4), Gaussian(), self.TERMS, 0)
        for out, source in ((torch.empty(3, 2), torch.zeros(1, 2)), (torch.empty(1, 2), torch.zeros(5, 2))):
            with pytest.raises(ValueError, match="1 rows, out is"):
                noise.perturb_rows(out, source, Gaussian(), self.TERMS, 0, torch.tensor([1]))

    @pytest.mark.parametrize("maximize", [False, True])
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sgd_is_that_of_torch(self, dtype: torch.dtype, decay: float, maximize: bool) -> None:
        w = torch.nn.Parameter(torch.randn(70_001, dtype=dtype))
        mine = w.detach().clone()
        for step in range(3):
            terms = [Term(Key(1, step), 0.3), Term(Key(1, step, 1), -0.2)]
            w.grad = noise.noise_sum(Gaussian(), terms, 0, 0, w.numel(), CPU).to(dtype)
            torch.optim.SGD([w], lr=0.01, weight_decay=decay, maximize=maximize).step()
            sign = -1 if maximize else 1
            shaped = [Term(key, sign * c) for key, c in terms]
            noise.sgd_(mine, Gaussian(), shaped, 0, 0, 0.01, decay, Key(1, step))
        assert torch.equal(mine, w.detach())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sgd_keeps_low_precision_updates(self, dtype: torch.dtype) -> None:
        w = torch.full((N,), 0.02, dtype=dtype)
        z = noise.noise_sum(Rademacher(), [Term(Key(1, 0), 1.0)], 0, 0, N, CPU).double()
        before = w.double()
        noise.sgd_(w, Rademacher(), [Term(Key(1, 0), 1.0)], 0, 0, 1e-6, 0.0, Key(1, 0))
        moved = ((w.double() - before) * z).mean().item()
        ulp = 2.0**-13 if dtype == torch.bfloat16 else 2.0**-16
        assert abs(moved + 1e-6) < LIMIT * math.sqrt(1e-6 * ulp / N)

    def test_nothing_to_add_and_nothing_to_add_to(self) -> None:
        w = torch.randn(10)
        out = torch.empty(10)
        noise.perturb(out, w, Gaussian(), [], 0)
        assert torch.equal(out, w)
        noise.perturb(torch.empty(0), torch.empty(0), Gaussian(), self.TERMS, 0)
        noise.perturb_rows(torch.empty(0, 5), torch.ones(0, 5), Gaussian(), self.TERMS, 0, torch.tensor([], dtype=torch.long))
        assert noise.noise_sum(Gaussian(), self.TERMS, 0, 0, 0, CPU).shape == (0,)

    def test_autograd_sees_the_write(self) -> None:
        w = torch.nn.Parameter(torch.randn(8))
        loss = (w * w).sum()
        noise.sgd_(w, Gaussian(), self.TERMS, 0, 0, 0.1, 0.0, Key(0, 0))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=repr)
def test_noise_does_not_depend_on_the_default_dtype(dist: Distribution, default: torch.dtype, backend: Any) -> None:
    """Lightning's "bf16-true" changes it around the user's step, which is where a probe draws its noise."""
    terms = [Term(Key(1, 2, 3), 0.37), Term(Key(1, 2, 4), -1.3)]
    source, rows = torch.linspace(-1, 1, 90).view(9, 10), torch.tensor([3, 0, 8])

    def sweeps() -> list[Tensor]:
        out, some = torch.empty_like(source), torch.empty(3, 10, dtype=torch.float32)
        noise.perturb(out, source, dist, terms, 5)
        noise.perturb_rows(some, source[rows], dist, terms, 5, rows)
        total = noise.noise_sum(dist, terms, 5, 7, 1000, CPU)
        return [out, some, total, sample(dist, Key(1, 2), 5, torch.tensor([3, 8]), 100)]

    try:
        noise.set_backend(backend)
        expected = sweeps()
        torch.set_default_dtype(default)
        noise.set_backend(backend)  # the native kernels' self-test, too
        for value, wanted in zip(sweeps(), expected, strict=True):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted)
    finally:
        torch.set_default_dtype(torch.float32)
        noise.set_backend("auto")
