"""The native kernels: native.cpp built by the machine's own C++ compiler, kept in the user's cache, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..cache import cache_dir, private
from ..types import Key, Term
from .backend import Backend
from .openmp import parallel_region
from .philox import philox_key, rounding_query, step_words

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # the codes of native.cpp
SOURCE = Path(__file__).with_name("native.cpp")
_TIMEOUT = 300.0  # seconds for one compiler run
_log = logging.getLogger(__name__)


class NativeUnavailableError(Exception):
    """Why there are no native kernels."""


class _Term(ctypes.Structure):
    _fields_ = [("k0", ctypes.c_uint32), ("k1", ctypes.c_uint32), ("query", ctypes.c_uint32), ("c", ctypes.c_float)]


class _Run(ctypes.Structure):
    _fields_ = [("leaf", ctypes.c_int64), ("start", ctypes.c_int64), ("length", ctypes.c_int64), ("data", ctypes.c_void_p)]


_I32, _I64, _U32, _F64, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_double, ctypes.c_void_p
_DIRECTIONS = (_I32, _P, _I64)  # kind, terms, count
_NOISE = (*_DIRECTIONS, _U32)  # and the leaf
_OUTER = (_P, _P, _I64, _I64, _I64)  # a, b, count, rows, columns
_RULE = (_U32, _U32, _U32, _F64, _F64, _I32)  # the rounding stream, learning rate, weight decay, fused
_SIGNATURES = {
    "zol_set_parallel": (_P,),
    "zol_noise": (*_NOISE, _P, _P, _I64, _I64, _P, _I32),
    "zol_perturb": (*_NOISE, _I64, _P, _I64, _I64, _I32, _P, _I32, _P, _I32),
    "zol_perturb_both": (*_NOISE, _I64, _I64, _I32, _P, _I32, _P, _P, _I32),
    "zol_round": (_U32, _U32, _U32, _U32, _I64, _I64, _P, _I32, _P, _I32),
    "zol_sgd": (*_DIRECTIONS, _P, _I64, *_RULE, _I32, _I32),
    "zol_outer_sum": (*_OUTER, _P, _I32),
    "zol_outer_sgd": (*_OUTER, _P, *_RULE, _I32, _I32),
    "zol_keep_large": (_I64, _F64, _I32, _P, _I32, _P, _I32),
    "zol_mixed_sum": (_P, _I64, _I64, _P, _I32),
}


Directions: TypeAlias = tuple[int, "ctypes.Array[_Term]", int]  # kind, terms, count


class NativeBackend(Backend):
    """The functions of native.cpp on contiguous tensors in main memory.

    Args:
        path: the shared library.

    Attributes:
        fused: whether ``torch.add(a, b, alpha=c)`` rounds once here; None if it does neither that nor round twice, and
            updates of wide types are therefore left to torch.
    """

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(os.fspath(path))  # calls release the interpreter's lock
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = arguments, None
        region = parallel_region()
        self._c.zol_set_parallel(region)
        self.fused: bool | None = None
        self.description = path.name if region else f"{path.name}, one thread: torch brings no OpenMP"

    dtypes = frozenset(DTYPES)

    def rounds(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    def updates(self, dtype: torch.dtype) -> bool:
        return self.fused is not None or dtype in (torch.bfloat16, torch.float16)

    def noise(
        self, kind: int, terms: Sequence[Term], leaf: int, starts: Tensor, length: int, queries: Tensor | None = None
    ) -> Tensor:
        starts = starts.to(torch.int64).contiguous()
        queries = None if queries is None else queries.to(torch.int64).expand(starts.shape).contiguous()
        out = torch.empty(starts.numel(), length, dtype=torch.float32)  # the default dtype is the user's
        pointer = None if queries is None else queries.data_ptr()
        self._c.zol_noise(
            *_directions(kind, terms), leaf, starts.data_ptr(), pointer, *out.shape, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def perturb(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int) -> None:
        self._perturb(out, source, _directions(kind, terms), leaf, start, None, 1, source.numel())

    def perturb_all(
        self, outs: Sequence[Tensor], sources: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int]
    ) -> None:
        directions = _directions(kind, terms)
        for out, source, leaf in zip(outs, sources, leaves, strict=True):
            self._perturb(out, source, directions, leaf, 0, None, 1, source.numel())

    def perturb_both(self, plus: Tensor, minus: Tensor, source: Tensor, kind: int, term: Term, leaf: int, start: int) -> None:
        data = (DTYPES[source.dtype], source.data_ptr(), DTYPES[plus.dtype], plus.data_ptr(), minus.data_ptr())
        self._c.zol_perturb_both(*_directions(kind, [term]), leaf, start, source.numel(), *data, torch.get_num_threads())
        _touch(plus)
        _touch(minus)

    def perturb_rows(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
        rows = rows.to(torch.int64).contiguous()
        self._perturb(out, source, _directions(kind, terms), leaf, 0, rows.data_ptr(), rows.numel(), source.shape[1])

    def _perturb(
        self,
        out: Tensor,
        source: Tensor,
        directions: Directions,
        leaf: int,
        start: int,
        rows: int | None,
        count: int,
        width: int,
    ) -> None:
        data = (DTYPES[source.dtype], source.data_ptr(), DTYPES[out.dtype], out.data_ptr())
        self._c.zol_perturb(*directions, leaf, start, rows, count, width, *data, torch.get_num_threads())
        _touch(out)

    def stochastic_round_(self, target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
        data = (value.data_ptr(), DTYPES[target.dtype], target.data_ptr())
        stream = (*philox_key(key), leaf, rounding_query(key))
        self._c.zol_round(*stream, start, target.numel(), *data, torch.get_num_threads())
        _touch(target)

    def sgd_(
        self, target: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int, lr: float, weight_decay: float, key: Key
    ) -> None:
        self._sgd([target], kind, terms, [leaf], start, lr, weight_decay, key)

    def sgd_all_(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        self._sgd(targets, kind, terms, leaves, 0, lr, weight_decay, key)

    def _sgd(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int], start: int,
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        runs = [_Run(leaf, start, target.numel(), target.data_ptr()) for target, leaf in zip(targets, leaves, strict=True)]
        data = (DTYPES[targets[0].dtype], torch.get_num_threads())
        rule = self._rule(lr, weight_decay, key)
        self._c.zol_sgd(*_directions(kind, terms), (_Run * len(runs))(*runs), len(runs), *rule, *data)
        for target in targets:
            _touch(target)

    def outer_sum(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty(a.shape[1], b.shape[1], dtype=torch.float32)
        shape = (a.shape[0], *out.shape)
        self._c.zol_outer_sum(a.data_ptr(), b.data_ptr(), *shape, out.data_ptr(), torch.get_num_threads())
        return out

    def outer_sgd_(self, target: Tensor, a: Tensor, b: Tensor, leaf: int, lr: float, weight_decay: float, key: Key) -> None:
        run = _Run(leaf, 0, target.numel(), target.data_ptr())
        data = (DTYPES[target.dtype], torch.get_num_threads())
        outer = (a.data_ptr(), b.data_ptr(), a.shape[0], *target.shape)
        self._c.zol_outer_sgd(*outer, ctypes.byref(run), *self._rule(lr, weight_decay, key), *data)
        _touch(target)

    def _rule(self, lr: float, weight_decay: float, key: Key) -> tuple[float, ...]:
        return (*philox_key(key), rounding_query(key), lr, weight_decay, bool(self.fused))

    def keep_large_(self, out: Tensor, stored: Tensor, limit: float) -> None:
        data = (DTYPES[stored.dtype], stored.data_ptr(), DTYPES[out.dtype], out.data_ptr())
        self._c.zol_keep_large(out.numel(), limit, *data, torch.get_num_threads())
        _touch(out)

    def mixed_sum(self, words: Tensor, first: int) -> int:
        total = ctypes.c_uint64()
        self._c.zol_mixed_sum(words.data_ptr(), words.numel(), first, ctypes.byref(total), torch.get_num_threads())
        return total.value


def _directions(kind: int, terms: Sequence[Term]) -> Directions:
    distinct = all(coefficient for _, coefficient in terms)  # 0.0 and -0.0 would be one to a cache
    return kind, (_array if distinct else _array.__wrapped__)(tuple(terms)), len(terms)


@lru_cache(maxsize=8)  # all leaves of a probe, and of an update, have the same terms
def _array(terms: tuple[Term, ...]) -> ctypes.Array[_Term]:
    return (_Term * len(terms))(*[_Term(*step_words(key.seed, key.step), key.query, c) for key, c in terms])


def _touch(tensor: Tensor) -> None:
    """Tell autograd of the write, as an in-place operation of torch would."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def load(verify: Callable[[NativeBackend], str], extra_flags: Sequence[str] = ()) -> NativeBackend:
    """The native library, from the cache if it is there, built if not.

    Args:
        verify: names the fault of a library; "": there is none.
        extra_flags: for the compiler, behind ours.

    Raises:
        NativeUnavailableError: with the reason, a failed ``verify`` being one.
    """
    if os.name != "posix":
        raise NativeUnavailableError(f"not built on {sys.platform}")
    compiler = _compiler()
    flags = (*_flags(), *extra_flags)
    identity = "\0".join((SOURCE.read_text(), *compiler, *flags, _version(compiler), _cpu()))
    name = f"noise-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    directory, temporary = _directory()
    try:
        for cached in sorted(directory.glob(f"{name}-*.so")):
            if private(cached) and cached.stem.endswith(_digest(cached)):
                return _verified(cached, verify)
            _log.info("%s is damaged or not ours: building it anew", cached.name)
            cached.unlink(missing_ok=True)
        return _verified(_build(directory, name, compiler, flags), verify)
    except OSError as error:
        raise NativeUnavailableError(str(error)) from error
    finally:
        if temporary:
            shutil.rmtree(directory, ignore_errors=True)


def _verified(path: Path, verify: Callable[[NativeBackend], str]) -> NativeBackend:
    try:
        library = NativeBackend(path)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path.name} does not load: {error}") from error
    if wrong := verify(library):
        raise NativeUnavailableError(wrong)
    return library


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        words = shlex.split(named)
        if words and shutil.which(words[0]):
            return words
        raise NativeUnavailableError(f"$CXX is {named!r}, which is no program here")
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise NativeUnavailableError("no C++ compiler ($CXX, g++, clang++)")


def _flags() -> tuple[str, ...]:
    exact = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")  # the last two change no value
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    machine = ("-march=native", "-mprefer-vector-width=512") if x86 else ("-mcpu=native",)
    return ("-std=c++17", "-O3", *machine, *exact, "-fPIC", "-shared")


def _version(compiler: list[str]) -> str:
    result = _call([*compiler, "--version"])
    if result.returncode:
        raise NativeUnavailableError(f"{compiler[0]} --version fails: {_last_line(result.stderr)}")
    return result.stdout


def _cpu() -> str:
    """The properties of a machine that -march=native depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))


def _build(directory: Path, name: str, compiler: list[str], flags: Sequence[str]) -> Path:
    """Compile beside the final place and move there, so that no other process ever sees half a library."""
    handle, made = tempfile.mkstemp(prefix=".build-", suffix=".so", dir=directory)
    os.close(handle)
    part = Path(made)
    try:
        _log.info("building the noise kernels with %s, once", compiler[0])
        result = _call([*compiler, *flags, os.fspath(SOURCE), "-o", made])
        if result.returncode:
            raise NativeUnavailableError(f"{compiler[0]} fails: {_last_line(result.stderr)}")
        part.chmod(0o700)
        final = directory / f"{name}-{_digest(part)}.so"
        os.replace(part, final)
        return final
    finally:
        part.unlink(missing_ok=True)


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} fails: {error}") from error


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["no message"]
    return errors[0].strip()


def _digest(path: Path) -> str:
    """Part of the file's name, so that a damaged library is seen before it is mapped."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _directory() -> tuple[Path, bool]:
    """Where libraries are kept, and whether it is a throw-away place because the cache is not ours alone to write."""
    directory = cache_dir() / "kernels"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if private(directory) and os.access(directory, os.W_OK):
            return directory.resolve(), False
        reason = "others may write to it"
    except OSError as error:
        reason = str(error)
    _log.info("noise kernels are not kept in %s: %s", directory, reason)
    temporary = Path(tempfile.mkdtemp(prefix="zolightning-")).resolve()
    if not private(temporary):
        temporary.rmdir()
        raise NativeUnavailableError(
            f"others may write to {directory} and to {temporary.parent}; set ZOLIGHTNING_CACHE or TMPDIR"
        )
    return temporary, True
