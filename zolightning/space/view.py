"""The space that is searched: the leaves, and the probes along their directions."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..types import Key, PerExample, Point, Shared, Tangent, Term
from .behind import hiding
from .group_leaf import GroupLeaf
from .leaf import Leaf, Scratch
from .probe import Both, Probe, Unread, Watch
from .together import Vectors


class _Active(threading.local):
    """The probe of each thread, as function modes are of a thread. A copy has none."""

    probe: Probe | None = None

    def __reduce__(self) -> tuple[type[_Active], tuple[()]]:
        return _Active, ()


class View:
    """Some parameters of a module, perturbed together.

    Args:
        root: the module whose code runs in the probes.
        leaves: the weights that are perturbed and trained.
        compiled: ``root`` itself runs as compiled code, which no function mode can see into.
    """

    def __init__(self, root: nn.Module, leaves: Sequence[Leaf], *, compiled: bool = False) -> None:
        if not leaves:
            raise ValueError("nothing to train: the view is empty; give at least one parameter with requires_grad=True")
        self.root, self.leaves = root, tuple(leaves)
        self._owners = [_owner(root, leaf) for leaf in leaves]
        self._scratch = Scratch(sum(leaf.parameter.numel() for leaf in leaves))
        self._vectors = Vectors(leaves)
        self._compiled_root = compiled
        self.grouped = any(isinstance(leaf, GroupLeaf) for leaf in leaves)
        """Some directions leave some of the leaves as they are."""
        self._active = _Active()
        self.read: set[int] = set()
        """Ids of the parameters that probes have read since somebody cleared it."""
        self.behind: tuple[Leaf, ...] = ()
        """Leaves that are read where no function mode sees it, in addition to those of compiled code."""
        self.refresh()

    def refresh(self) -> None:
        """Look again which submodules run as compiled code."""
        self._regions = [] if self._compiled_root else compiled_regions(self.root)
        inside = {id(p) for region in self._regions for p in region.parameters()} | {id(leaf.parameter) for leaf in self.behind}
        self._swapped = [leaf for leaf in self.leaves if self._compiled_root or id(leaf.parameter) in inside]
        swapped = set(map(id, self._swapped))
        self._seen = [leaf for leaf in self.leaves if id(leaf) not in swapped]  # a probe that saw a swapped one moved it twice
        self.per_example = not swapped and all(leaf.per_example for leaf in self.leaves)
        """Whether every example of a batch can have a direction of its own."""

    def swap(self, leaves: Iterable[Leaf]) -> None:
        """From now on perturb these by swapping their memory: they are read where no function mode sees it."""
        self.behind = (*self.behind, *leaves)
        self.refresh()

    @property
    def numel(self) -> int:
        """Trained weights."""
        return sum(leaf.parameter.numel() for leaf in self.leaves)

    @contextmanager
    def at(self, point: Point | Both, watch: Watch | None = None, side: int = 0) -> Iterator[None]:
        """Every read of a leaf that is active in the step of the point's key gives its value at the point.

        Args:
            point: where.
            watch: makes the calls of some functions, where function modes see all that is read.
            side: another number for each of several threads that are in a probe at a time.

        Raises:
            ValueError: a tangent, where part of the module runs as compiled code, which none gets through.
        """
        with ExitStack() as stack:
            if isinstance(point, Shared):
                if point.terms and self._swapped:
                    stack.enter_context(self._swap(point.terms))
                if not point.terms or self._compiled_root:
                    yield
                    return
            elif isinstance(point, Tangent):
                if self.compiled:
                    raise ValueError("a forward derivative does not pass through compiled code; leave torch.compile out")
                if self.behind:
                    raise ValueError(
                        f"a forward derivative does not reach {self.behind[0].name!r}, which is read in a scripted function, "
                        "in another thread or by code that is not PyTorch's; use estimator='spsa', or freeze it"
                    )
                stack.enter_context(fwAD.dual_level())
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no forward derivative
            elif isinstance(point, PerExample):
                device = self.leaves[0].parameter.device  # once: a copy in each layer would make a GPU wait there
                point = point._replace(queries=point.queries.to(device), offsets=point.offsets.to(device))
            stack.enter_context(self.probe(point, watch, side))
            yield

    def along(self, key: Key, offset: float) -> AbstractContextManager[None]:
        """:meth:`at` θ + offset · z(key)."""
        return self.at(Shared((Term(key, offset),)))

    @property
    def compiled(self) -> bool:
        """Whether part of the module runs as compiled code."""
        return self._compiled_root or bool(self._regions)

    @property
    def opaque(self) -> bool:
        """Whether function modes do not see all that reads a leaf."""
        return self.compiled or bool(self.behind)

    def visible(self) -> tuple[Leaf, ...]:
        """Leaves that are read where function modes see it, as far as is known; offloaded ones are NaN to all other code."""
        return tuple(leaf for leaf in self._seen if type(leaf.parameter) is nn.Parameter)

    @contextmanager
    def hiding(self, leaves: Iterable[Leaf]) -> Iterator[None]:
        """Context in which a read of these leaves gives their weights if a function mode sees it, and NaN if none does."""
        with ExitStack() as stack:
            for region in self._regions:
                stack.enter_context(_without_modes(region))
            stack.enter_context(hiding({leaf.name: leaf.parameter for leaf in leaves}))
            yield

    def refusing_reads(self) -> Unread:
        """Context in which no leaf may be read."""
        return Unread({id(leaf.parameter): leaf for leaf in self.leaves})

    @contextmanager
    def probe(self, point: Point | Both, watch: Watch | None = None, side: int = 0) -> Iterator[None]:
        """:meth:`at` for the reads that function modes see, with the point's tensors on the device."""
        active = {id(leaf.parameter): leaf for leaf in self._seen if leaf.turn is None or leaf.active(point.key)}
        if self.grouped and isinstance(point, Shared):  # an operation gets the other Parameters themselves
            active = {key: leaf for key, leaf in active.items() if moves(leaf, point.terms)}
        outer = self._probe
        if outer is not None:
            outer.resting = True
        try:
            self._active.probe = probe = Probe(active, point, self._scratch, self._vectors, self.read, side, watch)
            probe.fill()
            with ExitStack() as stack:
                for region in self._regions:
                    stack.enter_context(_without_modes(region))
                stack.enter_context(probe)
                yield
        finally:
            self._active.probe = outer
            if outer is not None:
                outer.fill()
                outer.resting = False

    @property
    def _probe(self) -> Probe | None:
        """Of this thread."""
        return self._active.probe

    @property
    def point(self) -> Point | Both | None:
        """Where the probe is that runs now."""
        return None if self._probe is None else self._probe.point

    @contextmanager
    def _swap(self, terms: Sequence[Term]) -> Iterator[None]:
        """Compiled code reads ``.data``: point it at perturbed copies, and back, whatever happens."""
        active = [leaf for leaf in self._swapped if leaf.active(terms[0].key)]
        stored = [leaf.parameter.data for leaf in active]
        torch.clear_autocast_cache()  # which knows a weight by its Parameter object
        try:
            for leaf in active:
                leaf.parameter.data = leaf.perturbed(terms)
            yield
        finally:
            for leaf, data in zip(active, stored, strict=True):
                leaf.parameter.data = data
            torch.clear_autocast_cache()

    def check(self) -> None:
        """Raise RuntimeError when a parameter was replaced since the view was made."""
        for leaf, (owner, attribute) in zip(self.leaves, self._owners, strict=True):
            if getattr(owner, attribute, None) is not leaf.parameter:
                raise RuntimeError(
                    f"the parameter {leaf.name!r} was replaced or re-parameterised after training started; ZO would go on "
                    "updating the old tensor. Change the module in `configure_model` or `setup`, before `fit` builds "
                    "the optimizer."
                )

    def unread(self, key: Key) -> tuple[int, ...]:
        """Places of the leaves that are active in the key's step and that no probe has read.

        Compiled code is taken to read all of its own.
        """
        known = self.read | {id(leaf.parameter) for leaf in self._swapped}
        unread = [i for i, leaf in enumerate(self.leaves) if id(leaf.parameter) not in known and not still(leaf)]
        return tuple(i for i in unread if self.leaves[i].active(key))

    def buffers(self) -> list[Tensor]:
        """The scratch memory that probes use now."""
        return [self._scratch.buffer, *self._vectors.buffers]

    def release(self) -> None:
        """Give scratch memory back."""
        self._scratch.release()
        self._vectors.release()

    def __repr__(self) -> str:
        return f"View({len(self.leaves)} leaves, {self.numel:,} weights)"


def moves(leaf: Leaf, terms: Sequence[Term]) -> bool:
    """Whether Σ_k c_k z_k reaches the leaf."""
    return not isinstance(leaf, GroupLeaf) or leaf.moved(terms)


def still(leaf: Leaf) -> bool:
    """Whether no direction reaches the leaf."""
    return isinstance(leaf, GroupLeaf) and leaf.still


def compiled_regions(root: nn.Module) -> list[nn.Module]:
    """The outermost submodules that run as compiled code: torch.compile(module), module.compile(), TorchScript."""
    regions: list[nn.Module] = []
    inside: set[int] = set()
    for module in root.modules():
        opaque = (
            isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule))
            or getattr(module, "_compiled_call_impl", None) is not None
        )
        if opaque and id(module) not in inside:
            regions.append(module)
            inside.update(id(m) for m in module.modules())
    return regions


@contextmanager
def _without_modes(region: nn.Module) -> Iterator[None]:
    """Call the region with function modes off: its weights are swapped, and a compiler must not trace the probe."""
    attribute = "_compiled_call_impl" if getattr(region, "_compiled_call_impl", None) is not None else "forward"
    original = getattr(region, attribute)

    def plain(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return original(*args, **kwargs)

    had_own = attribute in region.__dict__
    object.__setattr__(region, attribute, plain)
    try:
        yield
    finally:
        if had_own:
            object.__setattr__(region, attribute, original)
        else:
            object.__delattr__(region, attribute)


def _owner(root: nn.Module, leaf: Leaf) -> tuple[nn.Module, str]:
    path, _, attribute = leaf.name.rpartition(".")
    return root.get_submodule(path), attribute
