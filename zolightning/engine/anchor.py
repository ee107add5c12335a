"""The weights that a fit began with, in a file, and drawing the trained ones back to them: anchored weight decay."""

from __future__ import annotations

import hashlib
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..methods.config import ZOConfig
from ..noise import pieces, stochastic_round_, working_dtype
from ..space import Leaf
from ..types import Key, StateDict
from .updates import Apply, apply_update


class StartingWeights:
    """Copies of some tensors in a file, read piece by piece, so that they take no memory.

    Args:
        path: the file; where it has bytes already, they are the copies.
        tensors: the tensors, whose shapes and dtypes stay the same.

    Raises:
        ValueError: the file is of other tensors.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self.path, self.tensors = path, tensors
        *self._starts, size = accumulate((t.numel() * t.element_size() for t in tensors), initial=0)
        if not path.stat().st_size:
            with path.open("wb") as file:
                for tensor in tensors:
                    for _, piece in pieces(tensor.detach()):
                        file.write(piece.cpu().contiguous().view(torch.uint8).numpy().data)
        elif path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but the trained weights have {size:,}")

    def beside(self, place: int, tensor: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index of the first element, piece of the tensor as it is, the same piece as it began, on the CPU) of all pieces.

        Args:
            place: of the tensor among those of the file.
            tensor: the tensor, or another one that holds the same weights now.
        """
        with self.path.open("rb") as file:
            file.seek(self._starts[place])
            for start, piece in pieces(tensor.detach()):
                raw = bytearray(file.read(piece.numel() * piece.element_size()))
                yield start, piece, torch.frombuffer(raw, dtype=piece.dtype).view(piece.shape)

    def digest(self) -> str:
        """Of the file, hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    def drift(self) -> float:
        r""":math:`\lVert\theta - \theta_0\rVert / \lVert\theta_0\rVert`, in float64; nan where all weights began at zero."""
        moved = began = 0.0
        for place, tensor in enumerate(self.tensors):
            for _, piece, first in self.beside(place, tensor):
                before = first.double()
                moved += float((piece.cpu().double() - before).square().sum())
                began += float(before.square().sum())
        return math.sqrt(moved / began) if began else math.nan


class Anchor:
    r"""Draws trained weights back to those that the fit began with, before the optimizer's step: anchored weight decay.

    .. math:: \theta \leftarrow \theta - \mathrm{lr}\,\lambda\,(\theta - \theta_0)

    AdamW's weight decay with :math:`\theta_0` in place of 0, for any optimizer; 2605.30148. No weight is drawn beyond
    :math:`\theta_0`: lr·λ counts as 1 where it is larger. Low-precision weights are drawn in float32 and rounded
    stochastically, by other bits than the step's. The first weights are in files, which are deleted with this object unless
    :meth:`state_dict` named them.

    Args:
        decay: λ, >= 0; with 0 there are no files.
        folder: where the files go. None: the system's folder for temporary files.
    """

    def __init__(self, decay: float, folder: str | None = None) -> None:
        self.decay, self._folder = decay, Path(folder or tempfile.gettempdir()).absolute()
        self._since: int | None = None
        self._files: list[dict[str, Any]] = []
        self._places: dict[str, tuple[StartingWeights, int]] = {}
        self._unnamed: list[weakref.finalize[..., Anchor]] = []

    def begin(self, leaves: Sequence[Leaf], step: int) -> tuple[float, int]:
        """Note the weights of new leaves as those that the fit began with; :attr:`~zolightning.types.StepRecord.anchor`."""
        if new := {leaf.name: leaf.parameter for leaf in leaves if leaf.name not in self._places}:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="first-weights-", suffix=".bin", delete=False) as file:
                path = Path(file.name)
            self._unnamed.append(weakref.finalize(self, path.unlink, missing_ok=True))
            self._hold(StartingWeights(path, list(new.values())), list(new))
        self._since = step if self._since is None else self._since
        return self.decay, self._since

    def pull_(self, leaves: Sequence[Leaf], lr: float, key: Key) -> None:
        """Draw the leaves back, except for their fixed elements; ``key`` is the step's.

        The small weights of a :class:`~zolightning.space.SparseLeaf` stay small, since both ends of their ways are.
        """
        rate = min(lr * self.decay, 1.0)
        for leaf in leaves if rate else ():
            weights, place = self._places[leaf.name]
            for start, piece, first in weights.beside(place, leaf.parameter):
                exact = piece.to(working_dtype(piece.dtype))  # the piece itself where that is its dtype
                way = exact.sub(first.to(exact)).mul_(rate)  # each operation rounded by itself, on every device alike
                if (fixed := leaf.fixed(start, piece.numel())) is not None:
                    way.masked_fill_(fixed.view(way.shape), 0.0)
                exact.sub_(way)
                if exact.dtype != piece.dtype:
                    stochastic_round_(piece, exact, key._replace(query=key.query + 1), leaf.index, start)

    def state_dict(self) -> StateDict:
        """Where the first weights are; the files stay from now on."""
        while self._unnamed:
            self._unnamed.pop().detach()
        return {"since": self._since, "files": list(self._files)} if self._files else {}

    def load_state_dict(self, state: StateDict, named: Mapping[str, Tensor], inform: Callable[[str], None]) -> None:
        """Draw to the same weights as the session whose state this is.

        Args:
            state: the session's.
            named: the module's parameters by name.
            inform: gets a line where that session drew to none, so that the weights of now are the first.

        Raises:
            ValueError: the first weights are not there any more.
        """
        if not self.decay:
            return
        saved = state.get("anchor") or {"since": None, "files": []}
        if state["zo_step"] and not saved["files"]:
            inform(f"the checkpoint has no first weights: `anchor={self.decay:g}` draws to those of the checkpoint")
        self._since, self._files, self._places = saved["since"], [], {}
        for entry in saved["files"]:
            self._hold(self._found(Path(entry["path"]), entry["names"], named), entry["names"])
            if self._files[-1]["digest"] != entry["digest"]:
                self._refuse(f"{self._files[-1]['path']} has others")

    def _hold(self, weights: StartingWeights, names: Sequence[str]) -> None:
        self._files.append({"path": str(weights.path), "digest": weights.digest(), "names": list(names)})
        self._places.update({name: (weights, place) for place, name in enumerate(names)})

    def _found(self, path: Path, names: Sequence[str], named: Mapping[str, Tensor]) -> StartingWeights:
        """The file, where it was or in the folder of this fit."""
        there = next((each for each in (path, self._folder / path.name) if each.is_file()), None)
        if there is None:
            self._refuse(f"{path}, which has them, is not there")
        if lost := [name for name in names if name not in named]:
            self._refuse(f"the module has no {lost[0]!r}, which was trained")
        size = sum(named[name].numel() * named[name].element_size() for name in names)
        if there.stat().st_size != size:
            self._refuse(f"{there} has {there.stat().st_size:,} bytes in place of {size:,}")
        return StartingWeights(there, [named[name] for name in names])

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(
            f"`anchor={self.decay:g}` draws to the weights that the fit began with, but {reason}. Put their file back where it "
            f"was, or into {self._folder}; or leave `anchor` out; or load the checkpoint's weights into the module and begin a "
            "new fit, without `ckpt_path`, which draws to those"
        )


def anchor_of(config: ZOConfig, apply: Apply, folder: str | None) -> Anchor:
    """The anchor of a fit with these settings.

    Raises:
        ValueError: its steps reach the weights in a way that knows no anchor.
    """
    if config.anchor and apply is not apply_update:
        raise ValueError("`anchor=...` with offloaded weights, or an `apply` of your own, is not there; leave one of them out")
    return Anchor(config.anchor or 0.0, folder)
