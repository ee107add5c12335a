"""The weights that a ledger starts from, in a file beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from .._answers import needs
from .format import LedgerError

_PURPOSE = "keeping the weights that a ledger starts from"


def base_path(folder: Path, fingerprint: str) -> Path:
    """Named after its content, so that the ledgers of resumed runs share it."""
    return folder / f"base-{fingerprint}.safetensors"


def save_base(folder: Path, fingerprint: str, parameters: Mapping[str, Tensor]) -> Path:
    """Write the weights, once, and bring them to the disk; a file that is there already stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    path = base_path(folder, fingerprint)
    if not path.exists():
        with needs("safetensors", _PURPOSE, "safetensors"):
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        tensors: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, parameter in parameters.items():
            tensor = parameter.detach().contiguous()
            tensors[name] = tensor.clone() if tensor.data_ptr() in places else tensor  # the file takes no memory twice
            places.add(tensor.data_ptr())
        try:
            _put(path, lambda part: save_file(tensors, part, {"format": "pt"}))
        except SafetensorError as error:
            raise OSError(f"the weights that the run starts from cannot be kept in {path}: {error}") from error
    return path


def share_base(source: Path, folder: Path, fingerprint: str) -> None:
    """Bring a base to the folder of the ledger that goes on from it: as a link where the file system can."""
    there, here = base_path(source, fingerprint), base_path(folder, fingerprint)
    if here.exists() or not there.exists():
        return
    try:
        os.link(there, here)
    except OSError:
        _put(here, lambda part: shutil.copyfile(there, part))


def load_base(path: Path) -> dict[str, nn.Parameter]:
    """The parameters in a safetensors file.

    Raises:
        LedgerError: it is none, or not a whole one.
        OSError: it cannot be read.
    """
    with needs("safetensors", _PURPOSE, "safetensors"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            return {name: nn.Parameter(file.get_tensor(name), requires_grad=False) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LedgerError(f"{path} is not a whole safetensors file: {error}") from error


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """A whole file or none, also when the disk is full or the power goes."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names of new files to the disk, where the system can be asked to."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
