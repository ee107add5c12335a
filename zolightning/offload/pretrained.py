"""Hugging Face models whose weights stay in their files."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..space.together import SMALL
from .codes import refuse_other_codes, take_codes, without_states
from .disk import DiskTier
from .entry import Entry
from .files import Extent, OffloadError, Source, extents
from .fused import sources
from .parts import entries_of, rows_together
from .residency import bind
from .store import Store

_CPU = torch.device("cpu")


def from_pretrained(model_class: Any, source: str | Path, *, dtype: torch.dtype | None = None, **config: Any) -> Any:
    """A model as ``model_class.from_pretrained(source)`` makes it, but its matrices stay in the files that hold them.

    The files are only read. Parameters of at most 65,536 weights, buffers, the scales of bitsandbytes' 4-bit codes, and
    parameters that the files lack are in memory.
    The experts of a mixture are computed one by one (transformers' ``experts_implementation="eager"``), so that those to which
    no token goes are not read.

    Args:
        model_class: an Auto class of transformers (``AutoModelForCausalLM``), or a model's own.
        source: a folder with ``config.json`` and safetensors files, or a name that the hub knows.
        dtype: of the weights in memory and in training; None: as stored.
        **config: changes of the configuration.

    Raises:
        OffloadError: the files do not fit the model, are damaged, or store weights in a form that is not streamed.
    """
    transformers = sys.modules[model_class.__module__.partition(".")[0]]  # whose class it is
    folder = Path(source) if Path(source).is_dir() else snapshot(str(source))
    settings = transformers.AutoConfig.from_pretrained(folder, **{"experts_implementation": "eager", **config})
    refuse_other_codes(settings, source)
    files = shards(folder)
    dtype = dtype or _stored_dtype(without_states(files))
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with _hollow(), _Large():
        model = make(settings, dtype=dtype)
    if any(buffer.is_meta for buffer in model.buffers()):  # a large one that begins as an empty tensor
        with _hollow():
            model = make(settings, dtype=dtype)
    model.tie_weights()
    found = sources(model, files, transformers)
    take_codes(model, found, transformers)
    found = without_states(found)
    places, missing = _places(model, found, source)
    _initialise(model, missing)
    rows = rows_together(model)
    entries = {name: entries_of(name, model.get_parameter(name), _CPU, rows.get(name)) for name in places}
    parts = {part.name: places[name].part(part.first, tuple(part.shape)) for name in places for part in entries[name]}
    tier = DiskTier(parts, {part.name: part.dtype for some in entries.values() for part in some})
    store = Store(tier)
    for name, some in entries.items():
        _fill(model, name, some, tier, store)
    _load_buffers(model, found)
    model.name_or_path = str(source)
    return model.eval()


def shards(folder: Path) -> dict[str, Extent]:
    """Where the tensors of a model's folder are, by their names in it.

    Raises:
        OffloadError: a file is missing or damaged, or lacks a tensor that the index says it has.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise OffloadError(f"{folder} has no safetensors file; save the model with `save_pretrained` first")
        return extents(single)
    listed = json.loads(index.read_text())["weight_map"]
    if absent := sorted({file for file in listed.values() if not (folder / file).exists()}):
        raise OffloadError(f"{folder} lacks {', '.join(absent)}, which its index names; fetch the model again")
    found = {file: extents(folder / file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in found[file]:
            raise OffloadError(f"{folder / file} lacks {name!r}, which the index says it has; fetch the file again")
    return {name: found[file][name] for name, file in listed.items()}


@contextmanager
def _hollow() -> Iterator[None]:
    """Parameters of modules made inside take no memory; buffers are made as always."""
    register = nn.Module.register_parameter

    def hollow(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Large(TorchFunctionMode):
    """Large empty tensors take no memory from the beginning: freed at once, they would still leave the heap's holes behind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            hollow = torch.empty(*args, **{**kwargs, "device": "meta"})
            if hollow.numel() > SMALL:
                return hollow
        return func(*args, **kwargs)


def _places(model: Any, files: Mapping[str, Source], source: str | Path) -> tuple[dict[str, Source], list[str]]:
    """Parameter → its bytes, and the parameters that have none."""
    prefix = f"{model.base_model_prefix}."
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    places, missing, used = {}, [], set()
    for name, parameter in model.named_parameters():
        keys = [k for alias in aliases[id(parameter)] for k in (alias, alias.removeprefix(prefix), prefix + alias)]
        key = next((key for key in keys if key in files), None)
        if key is None:
            missing.append(name)
            continue
        used.update(keys)
        if files[key].shape != tuple(parameter.shape):
            raise OffloadError(
                f"{key!r} is {list(files[key].shape)} in {files[key].runs[0].file}, but the model's {name!r} is "
                f"{list(parameter.shape)}: these are another model's weights"
            )
        places[name] = files[key]
    used |= {k for name, _ in model.named_buffers() for k in (name, name.removeprefix(prefix), prefix + name)}
    left = sorted(files.keys() - used)
    renamed = [n for n in missing if any(files[key].shape == tuple(model.get_parameter(n).shape) for key in left)]
    if left and (strange := [n for n in missing if n.startswith(prefix) or n in renamed]):  # a new head is no riddle
        raise OffloadError(
            f"{source} stores its weights in another form than the model has them ({left[0]!r}, no {strange[0]!r}), which "
            "offload does not convert yet; load the model without offload and save it in the form that it has"
        )
    return places, missing


def _initialise(model: Any, missing: list[str]) -> None:
    """Parameters that the files lack begin as the model's class has new ones begin."""
    if not missing:
        return
    for name in missing:
        hollow = model.get_parameter(name)
        _replace(model, name, nn.Parameter(torch.empty(hollow.shape, dtype=hollow.dtype), hollow.requires_grad))
    for owner in {name.rpartition(".")[0] for name in missing}:
        model._init_weights(model.get_submodule(owner))
    warnings.warn(f"new weights, which the files lack: {', '.join(missing)}; train them", stacklevel=3)


def _fill(model: nn.Module, name: str, entries: Sequence[Entry], tier: DiskTier, store: Store) -> None:
    parameter = model.get_parameter(name)
    if parameter.numel() > SMALL:
        for entry in entries:
            store.add(entry)
        bind(parameter, entries, store)
    elif parameter.is_meta:
        _replace(model, name, nn.Parameter(tier.read(name).clone(), parameter.requires_grad))
    else:  # few codes
        parameter.data = tier.read(name).clone()


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """In every module that has it."""
    before = model.get_parameter(name)
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is before:
                module._parameters[key] = parameter


def _load_buffers(model: Any, files: Mapping[str, Source]) -> None:
    prefix = f"{model.base_model_prefix}."
    for name, buffer in model.named_buffers():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in files), None)
        if key is not None:
            buffer.copy_(DiskTier({key: files[key]}).read(key))


def _stored_dtype(files: Mapping[str, Extent]) -> torch.dtype:
    floats = [extent.dtype for extent in files.values() if extent.dtype.is_floating_point]
    return max(set(floats), key=floats.count, default=torch.float32)


def snapshot(name: str, *, offline: bool = False) -> Path:
    """The local folder of a model of the hub, downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], local_files_only=offline))
