"""Files that hold a model's tensors under other names, or a mixture's experts one by one where the model stacks them.

Transformers says how a model's files differ from it; only the forms that need no arithmetic are read here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from .files import Extent, OffloadError, Source


def sources(model: Any, files: Mapping[str, Extent], transformers: ModuleType) -> dict[str, Source]:
    """Where the model's tensors are, by their names in it, or by those in the files where nothing is known of them.

    Args:
        model: whose.
        files: the tensors that they hold, by name.
        transformers: the package.

    Raises:
        OffloadError: a tensor would have to be computed.
    """
    try:
        mapping = import_module(f"{transformers.__name__}.conversion_mapping")
        loading = import_module(f"{transformers.__name__}.core_model_loading")
    except ModuleNotFoundError:  # before transformers 5, models had the form of their files
        return {key: Source.of(extent) for key, extent in files.items()}
    conversions = mapping.get_model_conversion_mapping(model)
    renamings = [c for c in conversions if not isinstance(c, loading.WeightConverter)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    found: dict[str, Source] = {}
    stacked: dict[str, dict[str, list[Extent]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(files, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters)
        if pattern is None:
            found[name] = Source.of(files[key])
        else:
            stacked[name][pattern].append(files[key])
    for name, by_pattern in stacked.items():
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        found[name] = _stack(name, [by_pattern[p] for p in converter.source_patterns], converter.operations)
    return found


def _stack(name: str, lists: list[list[Extent]], operations: list[Any]) -> Source:
    """Experts along a new first dimension; the rows of each from one list after another."""
    kinds = [(type(o).__name__, getattr(o, "dim", None)) for o in operations]
    alike = len({len(some) for some in lists}) == 1 and all(len({e.shape for e in some}) == 1 for some in lists)
    if kinds[:1] != [("MergeModulelist", 0)] or kinds[1:] not in ([], [("Concatenate", 1)]) or not alike:
        raise OffloadError(
            f"the files store {name!r} in another form than the model has it, which offload does not convert yet; load the "
            "model without offload and save it in the form that it has"
        )
    rows, shape = sum(some[0].shape[0] for some in lists), lists[0][0].shape[1:]
    return Source(tuple(run for expert in zip(*lists, strict=True) for run in expert), (len(lists[0]), rows, *shape))
