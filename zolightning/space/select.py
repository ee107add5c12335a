"""Which parameters are searched: by name, by pattern, by transformer block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

from torch import nn

from .adapters import adapter_names
from .scales import scaled_layers

Select = str | Callable[[str, nn.Parameter], bool]

_BLOCKS = re.compile(r"(?P<kind>first|last):(?P<count>\d+)|blocks:(?P<low>\d+)-(?P<high>\d+)|(?P<middle>middle)")
_USAGE = (
    "allowed: 'all', 'middle' (the middle third of the blocks), 'first:K', 'last:K', "
    "'blocks:I-J' (inclusive), 'scales' (of quantised layers), 'scales:' before any of these, "
    "'re:PATTERN' (searched in the parameter's name), 'dominant' (in ZOStrategy, which has a batch to look at), or a function "
    "(name, parameter) -> bool"
)


def select(root: nn.Module, spec: Select, candidates: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The candidates that ``spec`` names.

    Args:
        root: the module, for its blocks.
        spec: 'all', 'middle', 'first:K', 'last:K', 'blocks:I-J', 're:PATTERN', or a predicate. 'middle' is everything for a
            module without a stack of at least six blocks. 'scales', or 'scales:' before another, are those of quantised layers.
        candidates: trainable parameters by name.

    Raises:
        ValueError: unknown spec, blocks out of range, nothing selected, or 'scales' where adapters wait to be trained.
    """
    if callable(spec):
        chosen = {n: p for n, p in candidates.items() if spec(n, p)}
    elif spec == "all":
        chosen = dict(candidates)
    elif match := re.fullmatch("scales(:(?P<rest>.+))?", spec):
        chosen = select(root, match["rest"] or "all", _scales(root, candidates))
    elif spec.startswith("re:"):
        try:
            pattern = re.compile(spec[3:])
        except re.error as error:
            raise ValueError(f"`select={spec!r}` is not a regular expression: {error}") from None
        chosen = {n: p for n, p in candidates.items() if pattern.search(n)}
    elif match := _BLOCKS.fullmatch(spec):
        chosen = _by_block(root, spec, match, candidates)
    else:
        raise ValueError(f"`select={spec!r}` is unknown; {_USAGE}")
    if not chosen:
        some = ", ".join(list(candidates)[:3])
        raise ValueError(f"`select={spec!r}` names no trainable parameter; there are {len(candidates)}: {some}, …")
    return chosen


def blocks(root: nn.Module) -> tuple[str, int]:
    """(name, length) of the module's stack of blocks: the ModuleList or Sequential of equals with most parameters.

    ("", 0) when there is none.
    """
    best, most = ("", 0), 0
    for name, module in root.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = [next(members) for _, members in groupby(module, key=type)]
            size = sum(p.numel() for p in module.parameters())
            if len(kinds) == 1 and next(kinds[0].children(), None) is not None and size > most:
                best, most = (name, len(module)), size
    return best


def _scales(root: nn.Module, candidates: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    adapter = next((n for n in adapter_names(root) if n in candidates), None)
    if adapter is not None:
        raise ValueError(
            f"`select='scales'` would leave the adapters untrained that are on the model ({adapter!r}, …). Train them instead: "
            "ZOStrategy('spsa', select='all'); or both: ZOStrategy('qzo', select='all'); or freeze them"
        )
    scales = {id(layer.scales) for _, layer in scaled_layers(root)}
    found = {n: p for n, p in candidates.items() if id(p) in scales}
    if not found:
        raise ValueError("`select='scales'` names no trainable parameter: the scales have requires_grad=False")
    return found


def _by_block(
    root: nn.Module, spec: str, match: re.Match[str], candidates: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    name, length = blocks(root)
    if match["middle"]:
        if length < 6:
            return dict(candidates)
        wanted: Iterable[int] = range(length // 3, length - length // 3)
    elif not length:
        raise ValueError(f"`select={spec!r}` needs a stack of equal blocks (nn.ModuleList), and the module has none; {_USAGE}")
    elif match["kind"]:
        count = int(match["count"])
        wanted = range(count) if match["kind"] == "first" else range(length - count, length)
    else:
        wanted = range(int(match["low"]), int(match["high"]) + 1)
    indices = list(wanted)
    if not indices or indices[0] < 0 or indices[-1] >= length:
        raise ValueError(f"`select={spec!r}` is out of range: {name!r} has blocks 0 to {length - 1}")
    prefixes = tuple(f"{name}.{i}." for i in indices)
    return {n: p for n, p in candidates.items() if n.startswith(prefixes)}
