"""The native kernels give the reference's bits, and where there are none the torch backend takes over."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zolightning import cache as cache_module
from zolightning import noise
from zolightning.noise import Distribution, Gaussian, Rademacher, backends, kernels, native, reference, sample, selftest
from zolightning.noise.distributions import elements
from zolightning.types import Key, Term

FLOATS = list(native.DTYPES)
DISTRIBUTIONS = [Rademacher(), Gaussian()]
same_bits, specimens = selftest.same_bits, selftest.specimens


def unavailable() -> str:
    try:
        noise.set_backend("native")
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        noise.set_backend("auto")


needs_native = pytest.mark.skipif(bool(reason := unavailable()), reason=reason)


@pytest.fixture
def library() -> native.NativeBackend:
    found = backends.native_backend()
    assert found is not None
    return found


@pytest.fixture
def backend_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()  # first: it may have hidden the compiler
    noise.set_backend("auto")
    assert (noise.active_backend() == "torch") == bool(reason)


keys = st.builds(Key, st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.integers(0, 2**31 - 1))
terms = st.lists(st.builds(Term, keys, st.floats(-4, 4, width=32)), min_size=0, max_size=4)
starts = st.integers(0, 3000) | st.integers(2**33, 2**44)
lengths = st.integers(0, 2500)
leaves = st.integers(0, 2**32 - 1)
distributions = st.sampled_from(DISTRIBUTIONS)
floats = st.sampled_from(FLOATS)


def specimen(dtype: torch.dtype, length: int) -> Tensor:
    return specimens(dtype).repeat(2)[:length]


@needs_native
class TestSameBits:
    """Every operation, dtype, distribution, start, length and number of terms."""

    @settings(max_examples=60)
    @given(distributions, terms, leaves, starts, lengths)
    def test_noise_sum(self, dist: Distribution, terms: list[Term], leaf: int, start: int, length: int) -> None:
        expected = reference.noise_sum(dist, terms, leaf, start, length, torch.device("cpu"))
        assert same_bits(noise.noise_sum(dist, terms, leaf, start, length, torch.device("cpu")), expected)

    @settings(max_examples=40)
    @given(distributions, keys, leaves, st.lists(starts, min_size=1, max_size=5), lengths, st.booleans())
    def test_sample(self, dist: Distribution, key: Key, leaf: int, begins: list[int], length: int, own_queries: bool) -> None:
        begin = torch.tensor(begins)
        queries = torch.arange(len(begins)) * 1000 if own_queries else None
        expected = elements(dist, key, leaf, begin, length, key.query if queries is None else queries[:, None])
        assert same_bits(sample(dist, key, leaf, begin, length, queries), expected)

    @settings(max_examples=80)
    @given(distributions, terms, leaves, starts, lengths, floats, floats)
    def test_perturb(
        self,
        dist: Distribution,
        terms: list[Term],
        leaf: int,
        start: int,
        length: int,
        source: torch.dtype,
        out: torch.dtype,
    ) -> None:
        w = specimen(source, length)
        mine, expected = torch.empty(2, length, dtype=out)
        noise.perturb(mine, w, dist, terms, leaf, start)
        reference.perturb(expected, w, dist, terms, leaf, start)
        assert same_bits(mine, expected)
        noise.perturb(w, w, dist, terms, leaf, start)  # in place
        assert source != out or same_bits(w, expected)

    def test_zero_and_minus_zero_are_two_coefficients(self) -> None:
        w = torch.tensor([0.0, -0.0] * 40)
        for coefficient in (0.0, -0.0, 0.0):
            mine, expected = torch.empty(2, 80)
            noise.perturb(mine, w, Rademacher(), [Term(Key(1, 2, 3), coefficient)], 5, 0)
            reference.perturb(expected, w, Rademacher(), [Term(Key(1, 2, 3), coefficient)], 5, 0)
            assert same_bits(mine, expected)

    @settings(max_examples=40)
    @given(distributions, keys, st.floats(-4, 4, width=32), starts, lengths, floats, floats)
    def test_perturb_both(
        self, dist: Distribution, key: Key, offset: float, start: int, length: int, source: torch.dtype, out: torch.dtype
    ) -> None:
        w = specimen(source, length)
        plus, minus, expected = torch.empty(3, length, dtype=out)
        noise.perturb_both(plus, minus, w, dist, Term(key, offset), 7, start)
        for mine, side in ((plus, offset), (minus, -offset)):
            reference.perturb(expected, w, dist, [Term(key, side)], 7, start)
            assert same_bits(mine, expected)

    @pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
    def test_several_leaves(self, dist: Distribution) -> None:
        """Of several dtypes, one of them no contiguous tensor."""
        some, lots = [Term(Key(3, 1, 0), 0.3), Term(Key(3, 1, 1), -0.7)], [2, 9, 5, 1]
        sources = [specimen(dtype, 300) for dtype in FLOATS[:3]] + [specimen(torch.float32, 300)[::2]]
        moved, expected = [[torch.empty_like(s) for s in sources] for _ in range(2)]
        noise.perturb_all(moved, sources, dist, some, lots)
        updated, after = [[s.clone() for s in sources] for _ in range(2)]
        noise.sgd_all_(updated, dist, some, lots, 0.3, 0.1, some[0].key)
        for leaf, source, out, w in zip(lots, sources, expected, after, strict=True):
            reference.perturb(out, source, dist, some, leaf, 0)
            reference.sgd_(w, dist, some, leaf, 0, 0.3, 0.1, some[0].key)
        assert all(map(same_bits, moved + updated, expected + after))

    @settings(max_examples=40)
    @given(distributions, terms, leaves, st.lists(st.integers(0, 19), max_size=9), st.integers(1, 130), floats, floats)
    def test_perturb_rows(
        self,
        dist: Distribution,
        terms: list[Term],
        leaf: int,
        rows: list[int],
        width: int,
        source: torch.dtype,
        out: torch.dtype,
    ) -> None:
        w = specimen(source, 20 * width).reshape(20, width)
        mine, expected = torch.empty(2, len(rows), width, dtype=out)
        index = torch.tensor(rows, dtype=torch.long)
        noise.perturb_rows(mine, w[index], dist, terms, leaf, index)
        reference.perturb_rows(expected, w[index], dist, terms, leaf, index)
        assert same_bits(mine, expected)

    @settings(max_examples=40)
    @given(keys, leaves, starts, lengths, st.sampled_from([torch.bfloat16, torch.float16]))
    def test_stochastic_round(self, key: Key, leaf: int, start: int, length: int, dtype: torch.dtype) -> None:
        mine, expected = torch.empty(2, length, dtype=dtype)
        noise.stochastic_round_(mine, specimen(torch.float32, length), key, leaf, start)
        reference.stochastic_round_(expected, specimen(torch.float32, length), key, leaf, start)
        assert same_bits(mine, expected)

    @settings(max_examples=60)
    @given(distributions, terms, leaves, starts, lengths, floats, st.sampled_from([0.0, 0.1, 1e-3]), keys)
    def test_sgd(
        self,
        dist: Distribution,
        terms: list[Term],
        leaf: int,
        start: int,
        length: int,
        dtype: torch.dtype,
        decay: float,
        key: Key,
    ) -> None:
        mine = specimen(dtype, length)
        expected = mine.clone()
        noise.sgd_(mine, dist, terms, leaf, start, 0.37, decay, key)
        reference.sgd_(expected, dist, terms, leaf, start, 0.37, decay, key)
        assert same_bits(mine, expected)

    @pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=repr)
    def test_threads_and_chunks(self, dist: Distribution) -> None:
        """Long enough for several batches of each thread and for several chunks of the reference."""
        length = reference.CHUNK + 12_345
        terms = [Term(Key(1, 2, q), 0.1 * (q + 1)) for q in range(2)]
        w = torch.randn(length)
        rows = torch.arange(0, length // 345, 2)
        table = w[: length // 345 * 345].view(-1, 345)

        def results(backend: ModuleType, threads: int, step: int) -> list[Tensor]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                out, updated = torch.empty(length, dtype=torch.bfloat16), w.bfloat16()
                some = torch.empty(len(rows), 345)
                backend.perturb_rows(some, table[rows], dist, terms, 3, rows)
                for at in range(0, length, step):
                    piece = slice(at, at + step)
                    backend.perturb(out[piece], w[piece], dist, terms, 3, 1001 + at)
                    backend.sgd_(updated[piece], dist, terms, 3, 1001 + at, 1e-3, 0.1, Key(4, 5))
                return [out, updated, some]
            finally:
                torch.set_num_threads(before)

        expected = results(reference, 1, length)
        for threads, step in ((1, length), (2, length), (2, 99_999)):
            assert all(map(same_bits, results(kernels, threads, step), expected))

    def test_many_words(self) -> None:
        """Four million elements: a quarter of all radii and angles that a word can name."""
        for part in range(4):
            terms = [Term(Key(77, part), 1.0)]
            expected = reference.noise_sum(Gaussian(), terms, 0, 0, 1 << 20, torch.device("cpu"))
            assert same_bits(noise.noise_sum(Gaussian(), terms, 0, 0, 1 << 20, torch.device("cpu")), expected)


@pytest.mark.integration
@needs_native
@pytest.mark.parametrize("machine", ["x86-64", "haswell"])
def test_narrower_vectors(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2" not in flags:
        pytest.skip("needs an x86-64 processor with AVX2")
    monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
    checked: list[native.NativeBackend] = []

    def verify(backend: native.NativeBackend) -> str:
        checked.append(backend)
        return selftest.verify(backend)  # or what is wrong, and then it raises

    assert native.load(verify, [f"-march={machine}", "-O2"]) is checked[0]


@needs_native
def test_one_openmp_runtime(library: native.NativeBackend) -> None:
    """The threads are torch's own: no second pool spins beside it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a = torch.randn(1 << 20)
        torch.add(a, a)
        count = len(os.listdir("/proc/self/task"))
        noise.perturb(a, a, Rademacher(), [Term(Key(1, 2), 1.0)], 0)
        assert len(os.listdir("/proc/self/task")) == count
    finally:
        torch.set_num_threads(before)
    assert "one thread" not in library.description


@needs_native
def test_tensors_the_library_cannot_take(library: native.NativeBackend) -> None:
    class Odd(Tensor):
        pass

    terms = [Term(Key(1, 2), 1.0)]
    w = torch.randn(6, 4)
    expected = w.clone()
    noise.perturb(expected, expected, Gaussian(), terms, 0)
    for out in (w.clone().t().contiguous().t(), w.clone().as_subclass(Odd)):
        noise.perturb(out, out, Gaussian(), terms, 0)
        assert torch.equal(out.as_subclass(Tensor), expected)
    noise.perturb(torch.empty(3, device="meta"), torch.empty(3, device="meta"), Gaussian(), terms, 0)
    with torch.inference_mode():
        inference = w.clone()
        noise.perturb(inference, inference, Gaussian(), terms, 0)
        assert torch.equal(inference, expected)


class TestLadder:
    def test_torch_on_request(self, backend_restored: None) -> None:
        noise.set_backend("torch")
        assert noise.active_backend() == "torch"
        z = noise.noise_sum(Gaussian(), [Term(Key(1, 2), 1.0)], 0, 5, 1000, torch.device("cpu"))
        noise.set_backend("auto")
        assert same_bits(z, noise.noise_sum(Gaussian(), [Term(Key(1, 2), 1.0)], 0, 5, 1000, torch.device("cpu")))

    def test_no_compiler(
        self,
        backend_restored: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("CXX", "/nonexistent")
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
        with caplog.at_level(logging.WARNING, "zolightning"):
            noise.set_backend("auto")
        assert noise.active_backend() == "torch"
        assert [r.message for r in caplog.records if "/nonexistent" in r.message]
        assert noise.noise_sum(Gaussian(), [Term(Key(1, 2), 1.0)], 0, 0, 9, torch.device("cpu")).shape == (9,)
        with pytest.raises(RuntimeError, match="/nonexistent"):
            noise.set_backend("native")

    def test_compiler_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "cxx"
        broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "error: no room" >&2; exit 1\n')
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
        with pytest.raises(native.NativeUnavailableError, match="no room"):
            native.load(selftest.verify)
        assert not list((tmp_path / "cache" / "kernels").iterdir())

    @pytest.mark.parametrize("mode", ["torch", "auto"])
    def test_environment(self, mode: str, backend_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_settled", False)
        backends.backend_on.cache_clear()
        monkeypatch.setenv("ZOLIGHTNING_KERNELS", mode)
        assert noise.active_backend() == ("torch" if mode == "torch" or reason else "native")

    def test_environment_with_an_unknown_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_settled", False)
        backends.backend_on.cache_clear()
        monkeypatch.setenv("ZOLIGHTNING_KERNELS", "fastest")
        with pytest.raises(ValueError, match="one of auto, native, torch"):
            noise.active_backend()

    def test_a_wrong_library_is_refused(self, backend_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
        if reason:
            pytest.skip(reason)
        monkeypatch.setattr(selftest, "verify", lambda library: "the sample differs")
        noise.set_backend("auto")
        assert noise.active_backend() == "torch"


_COMPILES_ONCE = """#!/bin/sh
for last; do :; done
if [ "$last" = --version ]; then exec {compiler} --version; fi
[ -e {made} ] || {compiler} "$@" -o {made}
cp {made} "$last"
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiles at the first call, and gives the same library at all others."""
    script = tmp_path_factory.mktemp("compiler") / "cxx"
    script.write_text(_COMPILES_ONCE.format(compiler=shlex.join(native._compiler()), made=script.with_suffix(".so")))
    script.chmod(0o700)
    return str(script)


@pytest.mark.integration
@needs_native
class TestCache:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> Path:
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
        monkeypatch.setattr(native, "_flags", lambda: ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"))
        return tmp_path / "kernels"

    def load(self) -> Path:
        native.load(lambda library: "")
        return native.cache_dir() / "kernels"

    def test_built_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (first,) = self.load().iterdir()
        built = first.stat().st_mtime_ns
        (again,) = self.load().iterdir()
        assert again == first
        assert again.stat().st_mtime_ns == built

    def test_damage_is_repaired(self) -> None:
        (path,) = self.load().iterdir()
        content = path.read_bytes()
        path.unlink()  # this process has it mapped
        path.write_bytes(content[: len(content) // 2])
        path.chmod(0o700)
        (again,) = self.load().iterdir()
        assert len(again.read_bytes()) >= len(content)

    def test_others_cannot_plant_a_library(self, cache: Path) -> None:
        (path,) = self.load().iterdir()
        path.chmod(0o777)  # anyone may have written it since
        before = path.stat().st_ino
        (again,) = self.load().iterdir()
        assert again.stat().st_ino != before
        assert not again.stat().st_mode & 0o022
        cache.chmod(0o777)
        before = again.stat().st_ino
        self.load()  # from a throw-away directory
        assert not [p for p in cache.iterdir() if p.stat().st_ino != before]

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777], ids=oct)
    @pytest.mark.parametrize("level", [0, 1], ids=["kernels", "cache"])
    def test_cache_that_others_may_write_is_not_used(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, mode: int, level: int
    ) -> None:
        """Neither for reading nor for writing; a sticky folder above it is safe, as /tmp is."""
        monkeypatch.setattr(cache_module, "_own_group", lambda number: False)
        cache.mkdir()
        (cache, cache.parent)[level].chmod(mode)
        native.load(lambda library: "")
        safe = mode == 0o1777 and level == 1
        assert bool(list(cache.iterdir())) == safe

    def test_nowhere_private(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.mkdir()
        (cache.parent / "tmp").mkdir()
        for place in (cache, cache.parent / "tmp"):
            place.chmod(0o777)
        monkeypatch.setattr(tempfile, "tempdir", str(cache.parent / "tmp"))
        with pytest.raises(native.NativeUnavailableError, match=r"others may write to .*; set ZOLIGHTNING_CACHE or TMPDIR"):
            native.load(lambda library: "")
        assert not list((cache.parent / "tmp").iterdir())
