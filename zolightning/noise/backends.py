"""Which kernels run: ``native`` (C++, main memory), ``triton`` (GPU) where they can be had, else ``torch``: the same bits."""

from __future__ import annotations

import logging
import os
import threading
from functools import cache
from typing import Literal, cast, get_args

import torch

from .backend import Backend
from .native import NativeBackend, NativeUnavailableError, load

Active = Literal["torch", "native", "triton"]
Mode = Literal["auto", "native", "torch"]
ENV = "ZOLIGHTNING_KERNELS"

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_settled = False
_native: NativeBackend | None = None
_mode: Mode = "auto"
_on_gpu: dict[tuple[torch.device, int | None], Backend | None] = {}


@cache  # each call of a kernel asks
def backend_on(device: torch.device, kind: int | None = None) -> Backend | None:
    """The kernels for tensors there, or None on the torch backend.

    Args:
        device: where the tensors are.
        kind: a distribution's ``native``; None for the kernels that make none of its noise.
    """
    if device.type == "cpu":
        return native_backend()
    return gpu_backend(device, kind) if device.type == "cuda" else None


def native_backend() -> NativeBackend | None:
    """The native kernels, built and tested on the first call, or None on the torch backend."""
    if not _settled:
        with _lock:
            if not _settled:
                _settle(_mode_from_environment())
    return _native


def gpu_backend(device: torch.device, kind: int | None = None) -> Backend | None:
    """Triton's kernels, or None on the torch backend.

    Those of a kind of noise are compiled and tested on this GPU when it is first asked for: a run seldom needs both.
    """
    native_backend()  # settles the mode
    place = device, kind
    if place not in _on_gpu:
        with _lock:
            if place not in _on_gpu:
                _on_gpu[place] = None if _mode == "torch" else _try_triton(device, kind)
    return _on_gpu[place]


def _try_triton(device: torch.device, kind: int | None) -> Backend | None:
    from .selftest import verify_triton

    try:
        from .triton_backend import TritonBackend  # Triton comes with PyTorch's CUDA builds

        found = TritonBackend()
        wrong = verify_triton(found, device, kind)
    except Exception as error:  # a compiler of its own, a driver's version: whatever it is, torch works
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _log.warning("noise kernels on %s: torch, slower than Triton: %s", device, wrong)
        return None
    _log.info("noise kernels on %s: %s", device, found.description)
    return found


def active_backend(device: torch.device | None = None) -> Active:
    """The backend that takes contiguous tensors there, in main memory if no device is given; others are for ``torch``."""
    device = device or torch.device("cpu")
    if backend_on(device) is None:
        return "torch"
    return "native" if device.type == "cpu" else "triton"


def set_backend(mode: Mode) -> None:
    """Choose the backend from here on, in place of the environment's ``ZOLIGHTNING_KERNELS``.

    Raises:
        RuntimeError: ``native`` was asked for and cannot be had; the message says why.
    """
    with _lock:
        _on_gpu.clear()
        _settle(mode)
        backend_on.cache_clear()


def _mode_from_environment() -> Mode:
    mode = os.environ.get(ENV, "auto").strip().lower() or "auto"
    if mode not in get_args(Mode):
        raise ValueError(f"{ENV}={mode!r}: one of {', '.join(get_args(Mode))}")
    return cast(Mode, mode)


def _settle(mode: Mode) -> None:
    global _native, _mode, _settled
    _mode = mode
    if mode == "torch":
        _native, _settled = None, True
        _log.info("noise kernels: torch, as asked for")
        return
    from .selftest import verify  # it compares with the reference, which itself needs this module

    try:
        _native = load(verify)
        _log.info("noise kernels: native (%s)", _native.description)
    except NativeUnavailableError as error:
        if mode == "native":
            raise RuntimeError(f"native noise kernels were asked for: {error}") from error
        _native = None
        _log.warning("noise kernels: torch, about 20 times slower than native: %s", error)
    _settled = True
