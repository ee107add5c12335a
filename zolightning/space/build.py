"""From a module to the view that is searched."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from ..noise import Distribution
from .cycle import Cycle, Turn
from .leaf import Leaf
from .scale_leaf import AbsoluteScaleLeaf, RelativeScaleLeaf, RowScaleLeaf
from .scales import refuse_codes, scaled_layers
from .select import Select, blocks, select
from .structure import Place, Rank1, Structure, structure_of
from .view import View

Scales = Literal["frozen", "absolute", "relative"]


def build_view(
    root: nn.Module,
    parameters: Iterable[nn.Parameter],
    distribution: Distribution,
    *,
    select_spec: Select = "all",
    structure: str | Structure = "dense",
    scales: Scales = "frozen",
    compiled: bool = False,
    before: Mapping[str, Mapping[str, float]] | None = None,
) -> View:
    """The view of ``parameters`` that ``select_spec`` names, each the leaf that the structure makes of it.

    Args:
        root: the module that owns the parameters; its order of all parameters numbers the leaves.
        parameters: the optimizer's; those with requires_grad=False are left out.
        distribution: noise of every leaf.
        select_spec: see :func:`zolightning.space.select.select`.
        structure: the form of z: a :class:`~zolightning.space.Structure`, or its name in STRUCTURES.
        scales: noise of the scales of quantised layers, whatever the structure; 'frozen' leaves them out.
        compiled: the root's steps themselves run as compiled code.
        before: name → settings of leaves that a resumed run goes on with.

    Raises:
        ValueError: nothing to train, a parameter that is not the module's, storage shared by two Parameters, codes of a
            quantised layer, or absolute noise on scales of several kinds.
    """
    names = {id(p): name for name, p in root.named_parameters()}
    indices = {key: index for index, key in enumerate(names)}
    layers = [layer for _, layer in scaled_layers(root)]
    kinds = {id(layer.scales): layer.scale_kind for layer in layers}
    rows = {id(layer.scales) for layer in layers if layer.by_rows and layer.scales.dim() == 2}
    candidates = _candidates(parameters, names, left_out=kinds if scales == "frozen" else ())
    refuse_codes(root, candidates)
    _refuse_shared_storage(candidates)
    chosen = select(root, select_spec, candidates)
    if scales == "absolute":
        _refuse_several({kinds[id(p)] for p in chosen.values() if id(p) in kinds})

    linear, before = _linear_weights(root), before or {}
    structure = structure_of(structure)
    by_rows = isinstance(structure, Rank1) and scales == "relative"
    leaves: list[Leaf] = []
    for name, parameter in chosen.items():
        place = Place(name, indices[id(parameter)], parameter, distribution)
        if id(parameter) in kinds:
            leaf: Leaf | None = _scale_leaf(place, scales, by_rows and id(parameter) in rows)
        else:
            leaf = structure.leaf(place, id(parameter) in linear, before.get(name, {}))
        if leaf is not None:
            leaves.append(leaf)
    if not leaves:
        raise ValueError(
            f"structure={structure} takes none of the {len(chosen)} parameters that `select={select_spec!r}` holds (Rank1 "
            "takes the weight matrices of linear layers, and vectors); use structure='dense'"
        )
    return View(root, sorted(leaves, key=lambda leaf: leaf.index), compiled=compiled)


def _candidates(
    parameters: Iterable[nn.Parameter], names: Mapping[int, str], left_out: Container[int]
) -> dict[str, nn.Parameter]:
    """The parameters that can be trained, by name; ids in ``left_out`` are not among them."""
    found: dict[str, nn.Parameter] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if id(parameter) not in names:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not one of the LightningModule's; "
                "build the optimizer from self.parameters() after the module is complete"
            )
        if parameter.is_complex():
            raise ValueError(
                f"{names[id(parameter)]!r} is {parameter.dtype}; perturbations are real. Hold it as a real parameter "
                "(torch.view_as_real), freeze it, or leave it out of the optimizer"
            )
        if id(parameter) not in left_out:
            found[names[id(parameter)]] = parameter
    if not found:
        raise ValueError(
            "nothing to train: the optimizer holds no parameter with requires_grad=True; unfreeze some before `fit`, or train "
            "the scales of quantised layers with ZOStrategy('qzo')"
        )
    return found


def _refuse_several(units: set[str]) -> None:
    if len(units) > 1:
        raise ValueError(
            f"scales='absolute' gives one noise to scales of different units: {', '.join(sorted(units))}; use "
            "scales='relative', or select layers of one kind"
        )


def _scale_leaf(place: Place, scales: Scales, by_rows: bool) -> Leaf:
    """The leaf of a quantised layer's scales."""
    if by_rows:
        return RowScaleLeaf(*place)
    return RelativeScaleLeaf(*place) if scales == "relative" else AbsoluteScaleLeaf(*place)


def take_turns(root: nn.Module, leaves: Sequence[Leaf], cycle: Cycle) -> int:
    """Give each leaf its turn; returns how many blocks there are.

    Raises:
        ValueError: the leaves are in fewer than two blocks.
    """
    name, _ = blocks(root)
    inside = re.compile(rf"{re.escape(name)}\.(\d+)\.") if name else re.compile("(?!)")
    homes = [int(match[1]) if (match := inside.match(leaf.name)) else -1 for leaf in leaves]
    order = sorted(set(homes), key=lambda home: (home < 0, home))
    if len(order) < 2:
        raise ValueError(f"`cycle={cycle}` needs selected parameters in at least two blocks, found {len(order)}; leave it out")
    for leaf, home in zip(leaves, homes, strict=True):
        leaf.turn = Turn(order.index(home), len(order), cycle)
    return len(order)


def _linear_weights(root: nn.Module) -> set[int]:
    """Ids of parameters that only linear layers own (a head tied to an embedding is not one)."""
    owners: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {
        key
        for key, modules in owners.items()
        if all(isinstance(m, nn.Linear) and id(m._parameters.get("weight")) == key for m in modules)
    }


def _refuse_shared_storage(parameters: dict[str, nn.Parameter]) -> None:
    """Tied weights are one Parameter object; two objects on one storage would be perturbed and updated twice."""
    seen: dict[tuple[object, int], str] = {}
    for name, parameter in parameters.items():
        if not parameter.numel():
            continue
        offset = int(parameter.storage_offset()) * parameter.element_size()
        place = (parameter.device, parameter.untyped_storage().data_ptr() + offset)
        if place in seen:
            raise ValueError(
                f"{seen[place]!r} and {name!r} are two Parameters on the same memory; tie them by assigning the same "
                "Parameter object to both modules"
            )
        seen[place] = name
