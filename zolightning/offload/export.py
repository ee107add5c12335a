"""Whole weights of an offloaded model in files as Hugging Face's, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import DTYPES, OffloadError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@torch.no_grad()
def export(model: nn.Module, folder: str | Path, *, shard_bytes: int = 5 << 30) -> None:
    """Write the weights of now to safetensors files, and a Hugging Face model's configuration beside them.

    ``from_pretrained``, that of transformers and :func:`~zolightning.offload.from_pretrained`, read the folder. Tied weights
    are written once.

    Args:
        model: its weights may be offloaded, in memory, or both.
        folder: that holds no safetensors files yet; it is made.
        shard_bytes: of the largest file, if no single tensor is larger.

    Raises:
        OffloadError: there are weights in the folder already, or a dtype that the files do not know.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise OffloadError(f"{folder} holds weights already ({there[0]}); export to an empty folder")
    tensors = {id(value): (name, value) for name, value in reversed(model.state_dict(keep_vars=True).items())}
    named = dict(reversed(tensors.values()))
    if unknown := [f"{name} ({value.dtype})" for name, value in named.items() if value.dtype not in _NAMES]:
        raise OffloadError(f"safetensors files do not hold the dtype of {unknown[0]}")
    parts = _shards(named, shard_bytes)
    for number, names in enumerate(parts, 1):
        _write(folder / _file(number, len(parts)), {name: named[name] for name in names})
    if len(parts) > 1:
        where = {name: _file(number, len(parts)) for number, names in enumerate(parts, 1) for name in names}
        index = {"metadata": {"total_size": sum(value.nbytes for value in named.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for settings in ("config", "generation_config"):
        save = getattr(getattr(model, settings, None), "save_pretrained", None)
        if save is not None:
            save(folder)


def _file(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _shards(named: Mapping[str, Tensor], most: int) -> Sequence[Sequence[str]]:
    parts: list[list[str]] = [[]]
    size = 0
    for name, value in named.items():
        if parts[-1] and size + value.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += value.nbytes
    return parts


def _write(path: Path, named: Mapping[str, Tensor]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, value in named.items():
        places = [at, at := at + value.nbytes]
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": places}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in named.values():
            file.write(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
