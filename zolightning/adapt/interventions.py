"""Train a few vectors where a language model answers: ReFT's interventions, of which zeroth-order training needs few probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..space import blocks


class Intervention(nn.Module):
    r"""Moves the last hidden states that a block puts out, one trained vector for each of W positions:

    .. math:: h_t \leftarrow h_t + s\,v_t, \qquad t = T - W, \dots, T - 1

    ReFT, Wu et al. 2024, arXiv:2404.03592, with only the bias of its edit. A forward hook of the block.

    Args:
        width: of a hidden state.
        positions: W >= 1, counted from the end; batches are padded on the left.
        scale: s > 0, so that v is of order 1.
    """

    def __init__(self, width: int, positions: int, scale: float) -> None:
        super().__init__()
        self.positions, self.scale = positions, scale
        self.vectors = nn.Parameter(torch.zeros(positions * width))  # flat: each example can read a vector of its own
        self.idle = False

    def forward(self, block: nn.Module, args: Any, out: Any) -> Any:
        if self.idle:
            return None  # the block's own output stays
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        if hidden.shape[1] < self.positions:
            raise ValueError(
                f"the prompt has {hidden.shape[1]} positions, and interventions are made at its last {self.positions}"
            )
        before, tail = hidden[:, : -self.positions], hidden[:, -self.positions :]
        moved = torch.add(tail.flatten(1), self.vectors, alpha=self.scale).view_as(tail)
        hidden = torch.cat((before, moved.to(tail.dtype)), 1)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def get_extra_state(self) -> dict[str, float]:
        return {"positions": self.positions, "scale": self.scale}

    def set_extra_state(self, state: Mapping[str, float]) -> None:
        self.positions, self.scale = int(state["positions"]), float(state["scale"])


def intervene(model: nn.Module, positions: int, calibration: Mapping[str, object]) -> list[Intervention]:
    """Freeze the model and put an :class:`Intervention` behind each of its blocks; its vectors are all that is trained.

    The scale of each is the RMS of the hidden states at these positions. The vectors are float32, whatever the model is, and
    begin at zero: nothing changes yet.

    Args:
        model: a language model with a stack of blocks.
        positions: W >= 1: those of the prompt's fixed end are a good choice, see
            :func:`~zolightning.data.common_ending`.
        calibration: arguments of a forward of the model, on some left-padded prompts.

    Raises:
        ValueError: W < 1, no stack of blocks, or interventions are there already.
    """
    if positions < 1:
        raise ValueError(f"`intervene(positions=...)` must be >= 1, got {positions}")
    if interventions(model):
        raise ValueError("the model has interventions already; train them, or load the model again")
    stack = _stack(model)
    return insert(model, positions, _sizes(model, stack, positions, calibration))


def insert(model: nn.Module, positions: int, sizes: Sequence[tuple[int, float]]) -> list[Intervention]:
    """:func:`intervene` with (width, scale) of each block given."""
    model.requires_grad_(False)
    made = []
    for block, (width, scale) in zip(_stack(model), sizes, strict=True):
        block.intervention = Intervention(width, positions, scale).to(next(block.parameters()).device)
        block.register_forward_hook(block.intervention)  # a module, so that copies of the model have hooks of their own
        made.append(block.intervention)
    return made


def interventions(model: nn.Module) -> list[Intervention]:
    """Those of the model, in its order; [] when it has none."""
    return [module for module in model.modules() if isinstance(module, Intervention)]


@contextmanager
def idle(made: Sequence[Intervention]) -> Iterator[None]:
    """The model as it is without them."""
    for one in made:
        one.idle = True
    try:
        yield
    finally:
        for one in made:
            one.idle = False


@contextmanager
def at_prompts(model: nn.Module) -> Iterator[None]:
    """For one call of ``model.generate``: they move the end of the prompts, and do not touch the tokens of the answers."""
    made = interventions(model)
    with ExitStack() as stack:

        def rest(*_: object) -> None:  # after the first forward, which is that of the prompts
            handle.remove()
            stack.enter_context(idle(made))

        handle = model.register_forward_hook(rest)
        stack.callback(handle.remove)
        yield


def _stack(model: nn.Module) -> list[nn.Module]:
    name, length = blocks(model)
    if not length:
        raise ValueError("`intervene` needs a stack of equal blocks (nn.ModuleList), and the model has none")
    return list(model.get_submodule(name).children())


@torch.no_grad()
def _sizes(
    model: nn.Module, stack: Sequence[nn.Module], positions: int, calibration: Mapping[str, Any]
) -> list[tuple[int, float]]:
    """(width, RMS at the last positions) of each block's output."""
    found: list[tuple[int, float]] = []

    def note(block: nn.Module, args: Any, out: Any) -> None:
        states = (out[0] if isinstance(out, tuple) else out)[:, -positions:].float()
        found.append((states.shape[-1], float(states.square().mean().sqrt().clamp(min=1e-6))))

    handles = [block.register_forward_hook(note) for block in stack]
    try:
        model(**calibration)
    finally:
        for handle in handles:
            handle.remove()
    return found
