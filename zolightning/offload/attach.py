"""From a module to a store of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..space.together import SMALL
from ..space.view import compiled_regions
from .disk import DiskTier
from .files import OffloadError
from .options import Offload
from .parts import entries_of, rows_together
from .residency import StoredParameter, bind, move, stored
from .store import Store
from .tiers import HostTier, Tier


def attach(module: nn.Module, options: Offload, device: torch.device, folder: Path) -> Store:
    """Move the module's matrices to where the options say; those of :func:`from_pretrained` are there already.

    The codes of bitsandbytes' 4-bit layers go too, and are only read. Vectors and other parameters of at most 65,536 weights
    stay in memory.

    Args:
        module: not on its device yet: its matrices never all are.
        options: the user's.
        device: where operations read the weights.
        folder: of the work files.

    Raises:
        OffloadError: the module cannot be streamed in this way; nothing has been moved then.
    """
    if compiled_regions(module):
        raise OffloadError(
            "offload does not stream weights into compiled code yet; leave torch.compile out, or train without offload"
        )
    large = {name: p for name, p in module.named_parameters() if p.numel() > SMALL}
    before = {p.store for p in stored(large.values())}
    if len(before) > 1:
        raise OffloadError("the module holds parts of several offloaded models; give from_pretrained the whole one")
    store = before.pop() if before else Store(_tier(options, device, folder))
    tier = store.tier
    if isinstance(tier, DiskTier) != (options.tier == "disk"):
        raise OffloadError(
            f"the weights are offloaded by {type(tier).__name__} already, and offload={options.tier!r} was asked for"
        )
    store.configure(pool=options.pool, prefetch=options.prefetch, write_every=options.write_every, lockstep=options.lockstep)
    if isinstance(tier, DiskTier):
        if tier.folder is None:
            tier.folder, tier.numbered = folder, options.folder is None
        tier.check_space(
            sum(p.nbytes for p in large.values() if p.requires_grad and type(p) in (nn.Parameter, StoredParameter))
        )
    rows = rows_together(module)
    for name, parameter in large.items():
        if type(parameter) is nn.Parameter or _are_codes(parameter):
            entries = entries_of(name, parameter, device, rows.get(name))
            for entry, weights in zip(entries, torch.split(parameter.detach(), entries[0].shape[0]), strict=True):
                tier.keep(entry.name, weights)
                store.add(entry)
            bind(parameter, entries, store)
    move(module.parameters(), device)
    if not store.vectors:
        here = {name: p for name, p in module.named_parameters() if name not in large}
        store.vectors = {name: p.detach().clone() for name, p in here.items()}
    return store


def _tier(options: Offload, device: torch.device, folder: Path) -> Tier:
    return HostTier(device) if options.tier == "cpu" else DiskTier(folder=folder, numbered=options.folder is None)


def _are_codes(parameter: nn.Parameter) -> bool:
    """Of bitsandbytes' 4-bit layers, which read them by PyTorch's operations."""
    kind = type(parameter)
    named = (kind.__module__.partition(".")[0], kind.__name__) == ("bitsandbytes", "Params4bit")
    return named and parameter.dtype == torch.uint8 and not parameter.requires_grad


def left_in_memory(module: nn.Module) -> dict[str, int]:
    """Type → bytes of large parameters that offload does not move: codes of quantised layers, tensor subclasses."""
    found: dict[str, int] = {}
    for parameter in module.parameters():
        if parameter.numel() > SMALL and type(parameter) not in (nn.Parameter, StoredParameter):
            kind = type(parameter).__name__
            found[kind] = found.get(kind, 0) + parameter.nbytes
    return found
