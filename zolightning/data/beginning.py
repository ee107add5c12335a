"""Encode the tokens that all prompts begin with once, and let all rows of a batch attend to them where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .candidates import evaluating, model_inputs

if TYPE_CHECKING:
    from transformers import Cache

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values (rows, heads, tokens, width), layer by layer."""

ATTENTION = "sdpa_behind_beginning"


class Beginning:
    """The keys and values of the tokens that all prompts begin with: instructions, answered examples. Computed once.

    All rows read the same ones: a row softmax([q·K₀ᵀ, q·Kᵀ])·[V₀; V] has keys and values K, V of its own tokens only, and the
    products with K₀ and V₀ are one for all rows. For this the model's attention implementation "sdpa" is set to one that adds
    the beginning where there is one, and is "sdpa" elsewhere. A model with other attention, with a sliding window, or with
    another answer on the beginning itself gets copies for each row.

    Args:
        model: a Hugging Face causal language model, of which no weight that is trained takes part here.
        tokens: their ids, at least one.

    A forward of another model, or one whose attention was changed since, raises a RuntimeError where rows share the beginning.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        ids = torch.tensor([tokens], device=next(model.parameters()).device)
        self._shared = Shared(keys_and_values(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        self.copied = not _shares(model, ids, self._shared)
        """Whether each row gets copies."""

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the batch, left-padded input_ids and attention_mask of the prompts' other tokens, going on from here."""
        mask, rows = batch["attention_mask"], len(batch["input_ids"])
        longer = {**batch, "attention_mask": torch.cat((mask.new_ones(rows, len(self._shared)), mask), 1)}
        if not self.copied:
            return longer | {"beginning": self._shared, "text": ()}
        copies = tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self._shared.layers)
        return longer | {"text": copies}


@dataclass(frozen=True, eq=False)
class Shared:
    """Keys and values that all rows of a batch attend to; no tensor, so that nothing that repeats a batch repeats them."""

    layers: Layers

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register()  # a model that comes along asks for this attention in the other process too
        self.__dict__.update(state)

    def __len__(self) -> int:
        return self.layers[0][0].shape[-2]

    def cache(self, text: Layers) -> "Cache":
        """Return a new cache that goes on from here, and from each row's own text, if there is any."""
        from transformers import Cache

        turn = _Turn()
        layers = [_layer_type()(keys, values, turn) for keys, values in self.layers]
        for layer, own in zip(layers, text, strict=bool(text)):
            layer.fill(*own)
        return Cache(layers=layers)


@dataclass
class _Turn:
    """Whether attention still has to read the beginning that came with the last keys."""

    open: bool = False


def keys_and_values(model: Any, batch: Mapping[str, Any]) -> Layers:
    """Of all tokens of the batch, layer by layer; without those of a beginning that it shares."""
    from transformers import DynamicCache

    body = model.get_decoder()
    inputs = {"past_key_values": DynamicCache()} | model_inputs(body, batch) | {"use_cache": True}
    body(**inputs)
    return tuple((layer.keys, layer.values) for layer in inputs["past_key_values"].layers)


def _shares(model: Any, ids: Tensor, whole: Shared) -> bool:
    """Give the model the attention that shares a beginning; whether the second half of one behind its first is as it was."""
    config, half = model.get_decoder().config, len(whole) // 2
    if half == 0 or getattr(config, "sliding_window", None) or config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    _register()
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    own = ids[:, half:].repeat(2, 1)
    own[1, 1:] = ids[0, half:-1]  # the second row is one token shorter, and padded
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, half] = 0
    first = Shared(tuple((keys[:, :, :half], values[:, :, :half]) for keys, values in whole.layers))
    agrees = False
    try:
        with evaluating(model):
            found = keys_and_values(model, {"input_ids": own, "attention_mask": mask, "beginning": first, "text": ()})
        agrees = all(
            _close(new[0], old[0, :, half:]) and _close(new[1, :, 1:], old[0, :, half:-1])
            for layers in zip(found, whole.layers, strict=True)
            for new, old in zip(*layers, strict=True)
        )
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        pass  # it takes another cache, or does not read the beginning
    finally:
        config._attn_implementation = ATTENTION if agrees else before
    return agrees


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.numel() == 0 or bool((found - wanted).abs().max() <= tolerance(wanted.dtype) * wanted.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    """How far values may be apart, as a share of the largest, that a model computes in another order."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)  # 30 blocks in float32 differ by 2e-6


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@cache
def _layer_type() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class Behind(DynamicLayer):  # type: ignore[misc]
        """The keys and values of each row's own tokens; those of the beginning go along with them."""

        def __init__(self, keys: Tensor, values: Tensor, turn: _Turn) -> None:
            super().__init__()
            self.beginning, self.turn = (keys, values, turn), turn

        def fill(self, keys: Tensor, values: Tensor) -> None:
            """Begin with these keys and values of each row's own tokens, which attention has read before."""
            super().update(keys, values)

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.turn.open:
                raise RuntimeError(
                    "the attention of this model did not read the beginning of the prompts: it is not the model that "
                    "`Beginning(model, tokens)` was made for, or its attention was changed since; make the beginning again"
                )
            keys, values = super().update(*args, **kwargs)
            keys.beginning, self.turn.open = self.beginning, True  # the attention gets no cache, but this very tensor
            return keys, values

        def get_seq_length(self) -> int:
            return self.beginning[0].shape[-2] + int(super().get_seq_length())

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            begun = self.beginning[0].shape[-2]
            return self.get_seq_length() - begun + query_length, begun

    return Behind


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention implementation of transformers: `query` (rows, heads, queries, width), `key` and `value` likewise."""
    if not hasattr(key, "beginning"):
        from transformers import AttentionInterface

        more = {"dropout": dropout, "scaling": scaling, **kwargs}
        result: tuple[Tensor, None] = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **more)
        return result
    first_key, first_value, turn = key.beginning
    first_key, first_value, turn.open = first_key[0], first_value[0], False
    (rows, _, queries, width), heads = query.shape, key.shape[1]  # a key's head may serve several heads of queries
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, heads, -1, width)
    first = query.transpose(0, 1).reshape(heads, -1, width) @ first_key.transpose(1, 2)  # of all rows at once
    scores = query @ key.transpose(2, 3)
    if attention_mask is None and queries > 1:
        attention_mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None:
        by_query = scores.view(rows, -1, queries, scores.shape[-1])
        scores = by_query.masked_fill(~attention_mask, -torch.inf).view_as(scores)
    first = first.view(heads, rows, -1, first.shape[-1]).transpose(0, 1)
    weights = F.dropout(torch.cat((first, scores), -1).softmax(-1, torch.float32).to(query.dtype), dropout)
    first, own = torch.split(weights, [first.shape[-1], scores.shape[-1]], -1)
    out = first.transpose(0, 1).reshape(heads, -1, first.shape[-1]) @ first_value
    out = own @ value + out.view(heads, rows, -1, out.shape[-1]).transpose(0, 1)
    return out.reshape(rows, -1, queries, out.shape[-1]).transpose(1, 2).contiguous(), None
