"""The block that dominates zeroth-order training, found by its activations before training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .select import blocks

JUMP = 10.0
"""How many times the ratio of the block before it an outlier block's ratio is."""


@torch.no_grad()
def dominant_block(root: nn.Module, run: Callable[[], object]) -> str:
    r"""The selection ('blocks:I-I') of the first block after which activations have outliers.

    With :math:`r_i = \max|h_i| / \operatorname{median}|h_i|` of the output of block i, and :math:`r_{-1}` of the first one's
    input: the first block with :math:`r_i \ge 10\,r_{i-1}`, or the one with the largest :math:`r_i / r_{i-1}`
    where none is. After "Dominant-Layer ZO", arXiv:2606.05516.

    Args:
        root: the module.
        run: one forward pass on a calibration batch.

    Raises:
        ValueError: the module has no stack of blocks, or the forward does not run it.
    """
    name, length = blocks(root)
    if not length:
        raise ValueError("`select='dominant'` needs a stack of equal blocks (nn.ModuleList), and the module has none")
    stack = root.get_submodule(name)
    ratios: dict[int, float] = {}

    def note(place: int, values: Any) -> None:
        hidden = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        if hidden is not None:
            ratios.setdefault(place, _ratio(hidden))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(-1, (*args, *kwargs.values()))

    def after(place: int) -> Callable[[nn.Module, object, object], None]:
        return lambda _, args, out: note(place, out if isinstance(out, (list, tuple)) else (out,))

    members = list(stack.children())
    handles = [members[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after(place)) for place, block in enumerate(members)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if len(ratios) < length + 1:
        raise ValueError(f"`select='dominant'` saw {len(ratios)} of {length + 1} activations of {name!r} in the first batch")
    jumps = [ratios[i] / ratios[i - 1] for i in range(length)]
    found = next((i for i, jump in enumerate(jumps) if jump >= JUMP), max(range(length), key=jumps.__getitem__))
    return f"blocks:{found}-{found}"


def _ratio(hidden: Tensor) -> float:
    """max|h| / median|h|, of a sample where the tensor is large."""
    sizes = hidden.detach().float().abs().flatten()
    return float(sizes.max() / sizes.median().clamp(min=torch.finfo(torch.float32).tiny))
