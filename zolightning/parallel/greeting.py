"""Whether ranks belong to one run: each says how it is built before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..noise import Distribution, sample
from ..space.fingerprint import fingerprint
from ..types import Key
from .exchange import RanksError

_SAMPLE = 4096  # elements of noise


class Greeting(NamedTuple):
    """All that must be equal, and the device.

    Args:
        version: zolightning's.
        mode: of sharing a step.
        settings: the method's.
        tensors: name → dtype and shape of each parameter and buffer.
        distribution: the noise's name.
        noise: a fingerprint of some of it, made on the device.
        device: its type.
    """

    version: str
    mode: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    distribution: str
    noise: str
    device: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], mode: str, noise: Distribution, settings: Mapping[str, Any]) -> Greeting:
        """This rank's, with the device of its first tensor."""
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        starts = torch.zeros(1, dtype=torch.int64, device=device)
        made = sample(noise, Key(0, 0), 0, starts, _SAMPLE).cpu()
        described = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        return cls(__version__, mode, dict(settings), described, noise.name, fingerprint([("", made)]), device.type)


def refuse_strangers(found: Sequence[Greeting]) -> None:
    """Raise RanksError where a rank differs from rank 0 in more than its device, or its noise may differ.

    ±1 noise has the same bits on all devices, Gaussian noise may differ in the last one.
    """
    first = found[0]
    for rank, other in enumerate(found):
        if other.device != first.device and first.distribution != "rademacher":
            raise RanksError(
                f"rank 0 runs on {first.device} and rank {rank} on {other.device}, whose {first.distribution} noise may differ "
                "in the last bits; use noise='rademacher', which has the same bits everywhere"
            )
        for topic, mine, its in zip(Greeting._fields, first, other, strict=True):
            if topic != "device" and mine != its:
                raise RanksError(f"rank {rank} does not belong to this run: {_difference(topic, mine, its)}")


def _difference(topic: str, mine: object, its: object) -> str:
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        name = next(name for name in (*mine, *its) if mine.get(name) != its.get(name))
        return f"{name!r} of its {topic} is {its.get(name, 'missing')}, and {mine.get(name, 'missing')} on rank 0"
    return f"its {topic} is {its}, and {mine} on rank 0"
