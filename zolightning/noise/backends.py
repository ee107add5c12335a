"""Which kernels run: ``native`` (C++, main memory), ``triton`` (GPU) where they can be had, else ``torch``: the same bits."""

from __future__ import annotations

import logging
import os
import threading
from typing import Literal, cast, get_args

import torch

from .backend import Library
from .native import NativeLibrary, NativeUnavailableError, load

Rung = Literal["torch", "native", "triton"]
Mode = Literal["auto", "native", "torch"]
ENV = "ZOLIGHTNING_KERNELS"

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_settled = False
_library: NativeLibrary | None = None
_mode: Mode = "auto"
_on_gpu: dict[tuple[torch.device, int | None], Library | None] = {}


def library_on(device: torch.device, kind: int | None = None) -> Library | None:
    """The kernels for tensors there, or None on the torch rung.

    Args:
        device: where the tensors are.
        kind: a distribution's ``native``; None for the kernels that make none of its noise.
    """
    if device.type == "cpu":
        return library()
    return gpu_library(device, kind) if device.type == "cuda" else None


def library() -> NativeLibrary | None:
    """The native kernels, built and tested on the first call, or None on the torch rung."""
    if not _settled:
        with _lock:
            if not _settled:
                _settle(_mode_from_environment())
    return _library


def gpu_library(device: torch.device, kind: int | None = None) -> Library | None:
    """Triton's kernels, or None on the torch rung.

    Those of a kind of noise are compiled and tested on this GPU when it is first asked for: a run seldom needs both.
    """
    library()  # settles the mode
    place = device, kind
    if place not in _on_gpu:
        with _lock:
            if place not in _on_gpu:
                _on_gpu[place] = None if _mode == "torch" else _try_triton(device, kind)
    return _on_gpu[place]


def _try_triton(device: torch.device, kind: int | None) -> Library | None:
    from .selftest import verify_triton

    try:
        from .triton_backend import TritonLibrary  # Triton comes with PyTorch's CUDA builds

        found = TritonLibrary()
        wrong = verify_triton(found, device, kind)
    except Exception as error:  # a compiler of its own, a driver's version: whatever it is, torch works
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _log.warning("noise kernels on %s: torch, slower than Triton: %s", device, wrong)
        return None
    _log.info("noise kernels on %s: %s", device, found.description)
    return found


def active_rung(device: torch.device | None = None) -> Rung:
    """The rung that takes contiguous tensors there, in main memory if no device is given; others are for ``torch``."""
    device = device or torch.device("cpu")
    if library_on(device) is None:
        return "torch"
    return "native" if device.type == "cpu" else "triton"


def set_rung(mode: Mode) -> None:
    """Choose the rung from here on, in place of the environment's ``ZOLIGHTNING_KERNELS``.

    Raises:
        RuntimeError: ``native`` was asked for and cannot be had; the message says why.
    """
    with _lock:
        _on_gpu.clear()
        _settle(mode)


def _mode_from_environment() -> Mode:
    mode = os.environ.get(ENV, "auto").strip().lower() or "auto"
    if mode not in get_args(Mode):
        raise ValueError(f"{ENV}={mode!r}: one of {', '.join(get_args(Mode))}")
    return cast(Mode, mode)


def _settle(mode: Mode) -> None:
    global _library, _mode, _settled
    _mode = mode
    if mode == "torch":
        _library, _settled = None, True
        _log.info("noise kernels: torch, as asked for")
        return
    from .selftest import verify  # it compares with the reference, which itself needs this module

    try:
        _library = load(verify)
        _log.info("noise kernels: native (%s)", _library.description)
    except NativeUnavailableError as error:
        if mode == "native":
            raise RuntimeError(f"native noise kernels were asked for: {error}") from error
        _library = None
        _log.warning("noise kernels: torch, about 20 times slower than native: %s", error)
    _settled = True
