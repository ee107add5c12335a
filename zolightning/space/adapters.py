"""Weights that were added to a model to be trained in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .scales.layer import is_a

_ADDED = (
    ("peft", "BaseTunerLayer"),  # LoRA, IA³ and the like, around a layer of the model
    *(("peft", name) for name in ("PrefixEncoder", "PromptEmbedding", "PromptEncoder")),
    ("zolightning", "_VirtualTokens"),
    ("zolightning", "Intervention"),
)


def adapter_names(root: nn.Module) -> Iterator[str]:
    """Names of the Parameters of adapters, virtual tokens and interventions; those of the layers that they wrap are not."""
    for path, module in root.named_modules():
        if any(is_a(module, package, name) for package, name in _ADDED):
            found = (name for name, _ in module.named_parameters() if not name.startswith("base_layer."))
            yield from (f"{path}.{name}".lstrip(".") for name in found)
