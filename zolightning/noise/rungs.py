"""Which kernels run: ``native`` (C++, tensors in main memory) where they can be had, else ``torch``. Same bits on both."""

from __future__ import annotations

import logging
import os
import threading
from typing import Literal, cast, get_args

from .native import Library, NativeUnavailableError, load

Rung = Literal["torch", "native"]
Mode = Literal["auto", "native", "torch"]
ENV = "ZOLIGHTNING_KERNELS"

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_settled = False
_library: Library | None = None


def library() -> Library | None:
    """The native kernels, built and tested on the first call, or None on the torch rung."""
    if not _settled:
        with _lock:
            if not _settled:
                _settle(_mode_from_environment())
    return _library


def active_rung() -> Rung:
    """The rung that takes contiguous tensors in main memory; every other tensor is for ``torch``."""
    return "torch" if library() is None else "native"


def set_rung(mode: Mode) -> None:
    """Choose the rung from here on, in place of the environment's ``ZOLIGHTNING_KERNELS``.

    Raises:
        RuntimeError: ``native`` was asked for and cannot be had; the message says why.
    """
    with _lock:
        _settle(mode)


def _mode_from_environment() -> Mode:
    mode = os.environ.get(ENV, "auto").strip().lower() or "auto"
    if mode not in get_args(Mode):
        raise ValueError(f"{ENV}={mode!r}: one of {', '.join(get_args(Mode))}")
    return cast(Mode, mode)


def _settle(mode: Mode) -> None:
    global _library, _settled
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
