"""Parameter-efficient views: few new weights on a frozen model. Under ZOStrategy they are parameters like all others.

LoRA and IA³ come from the ``peft`` library. Prefix and prompt tuning are here, since peft drops the position ids that
left-padded batches need; they work below the model's head, so in forwards and in ``generate``. Training without new weights
is a selection: BitFit is ``ZOStrategy(select="re:bias$")``, the last k blocks are ``select="last:K"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._answers import needs

NAME = "virtual_tokens"
"""Of the submodule that :func:`prefix` and :func:`prompt` add to the model's decoder."""

Kwargs: TypeAlias = dict[str, Any]
"""The arguments of a decoder's call, by name."""


def lora(model: nn.Module, r: int = 8, alpha: float = 16.0, targets: Sequence[str] | None = None) -> nn.Module:
    r"""Low-rank adapters :math:`W + \tfrac\alpha r B A`, LoRA, arXiv:2106.09685, on a model that is frozen otherwise.

    The defaults are those of MeZO's experiments: rank 8, α 16, queries and values; train with ``ZOStrategy("mezo-lora")``.
    Being linear layers, A and B also take directions for each example: ``ZOStrategy(select="all")``.

    Args:
        model: a Hugging Face model; changed in place.
        r: rank, >= 1.
        alpha: α > 0.
        targets: name endings of the layers to adapt; None: peft's for the model's type (mostly queries and values).
    """
    if r < 1 or not alpha > 0:
        raise ValueError(f"`lora(r=..., alpha=...)` must be >= 1 and > 0, got {r} and {alpha}")
    with needs("peft", "`lora`", "zolightning[peft]"):
        from peft import LoraConfig, inject_adapter_in_model

    names = None if targets is None else list(targets)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    adapted: nn.Module = inject_adapter_in_model(config, model)
    return adapted


def ia3(model: nn.Module, targets: Sequence[str] | None = None, feedforward: Sequence[str] | None = None) -> nn.Module:
    """Trained scales of keys, values and feed-forward activations, IA³, arXiv:2205.05638; all 1 at first.

    Args:
        model: a Hugging Face model; changed in place, frozen otherwise.
        targets: name endings of the layers whose outputs are scaled; None: peft's for the model's type.
        feedforward: those of them whose inputs are scaled instead; None with ``targets`` None: peft's.
    """
    with needs("peft", "`ia3`", "zolightning[peft]"):
        from peft import IA3Config, inject_adapter_in_model

    config = IA3Config(
        target_modules=None if targets is None else list(targets),
        feedforward_modules=(None if targets is None else []) if feedforward is None else list(feedforward),
    )
    adapted: nn.Module = inject_adapter_in_model(config, model)
    return adapted


def prefix(model: nn.Module, tokens: int | Sequence[int] = 5, seed: int = 0) -> nn.Module:
    """Trained keys and values before every layer's own, prefix tuning, arXiv:2101.00190, begun as those of real tokens.

    The model first answers as if these tokens stood before its input (MeZO found this start necessary); the paper's 5 random
    tokens are the default; train with ``ZOStrategy("mezo-prefix")``.

    Args:
        model: a Hugging Face causal language model; changed in place, frozen otherwise.
        tokens: the token ids, or how many to draw from the vocabulary, >= 1.
        seed: The seed of the draw.
    """
    body, ids = _body(model), _token_ids(model, tokens, seed)
    with torch.no_grad():
        cache = body(input_ids=ids[None], use_cache=True).past_key_values
    return _attach(model, body, _Prefix([(layer.keys[0], layer.values[0]) for layer in cache.layers]))


def prompt(model: nn.Module, tokens: int | Sequence[int] = 20, seed: int = 0) -> nn.Module:
    """Trained embeddings before the input's, prompt tuning, arXiv:2104.08691, begun as those of real tokens.

    Arguments as :func:`prefix`.
    """
    body, ids = _body(model), _token_ids(model, tokens, seed)
    return _attach(model, body, _Prompt(body.get_input_embeddings()(ids).detach()))


class _VirtualTokens(nn.Module, ABC):
    """Trained weights that stand for ``count`` tokens before all others.

    Its hooks on the decoder put them in at the first call of a sequence, when the cache is empty, and count them in masks
    and positions at every call.
    """

    count: int

    @abstractmethod
    def put(self, body: nn.Module, kwargs: Kwargs) -> None:
        """Into the arguments of a sequence's first call, whose mask and positions count the tokens already."""

    def before(self, body: nn.Module, args: tuple[object, ...], kwargs: Kwargs) -> tuple[tuple[object, ...], Kwargs]:
        kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None or len(args) > 1:
            raise ValueError("virtual tokens need the model to be called with input_ids; give every other argument by name")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(len(ids), ids.shape[1] + (0 if cache is None else max(0, cache.get_seq_length() - self.count)))
        if mask.dim() != 2:
            raise ValueError(f"virtual tokens need an attention mask of shape (batch, tokens), got {tuple(mask.shape)}")
        kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], 1)
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name] + self.count
        if cache is None or not cache.get_seq_length():
            self.put(body, kwargs)
        return (), kwargs

    def after(self, body: nn.Module, args: tuple[object, ...], kwargs: Kwargs, output: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:  # outputs are those of the real tokens
            output.last_hidden_state = output.last_hidden_state[:, self.count :]
        return output


class _Prefix(_VirtualTokens):
    """Keys and values of each layer, (heads, tokens, size) each."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.count = layers[0][0].shape[1]
        self.keys = nn.ParameterList([nn.Parameter(key.clone()) for key, _ in layers])
        self.values = nn.ParameterList([nn.Parameter(value.clone()) for _, value in layers])

    def put(self, body: Any, kwargs: Kwargs) -> None:
        from transformers import DynamicCache

        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache(config=body.config)
        size = len(kwargs["input_ids"])
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            wide = [t.unsqueeze(0).expand(size, -1, -1, -1) for t in (key, value)]
            kwargs["past_key_values"].update(*wide, layer)


class _Prompt(_VirtualTokens):
    """Embeddings, (tokens, width)."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.count = len(embeddings)
        self.embeddings = nn.Parameter(embeddings.clone())

    def put(self, body: Any, kwargs: Kwargs) -> None:
        ids = kwargs.pop("input_ids")
        shown = self.embeddings.unsqueeze(0).expand(len(ids), -1, -1)
        kwargs["inputs_embeds"] = torch.cat([shown, body.get_input_embeddings()(ids)], 1)
        for name in ("position_ids", "cache_position"):
            if (positions := kwargs.get(name)) is not None:
                first = torch.arange(self.count, device=positions.device).expand(*positions.shape[:-1], -1)
                kwargs[name] = torch.cat([first, positions], -1)


def _attach(model: nn.Module, body: nn.Module, virtual: _VirtualTokens) -> nn.Module:
    if NAME in body._modules:
        raise ValueError("the model already has virtual tokens; load it anew for others")
    model.requires_grad_(False)
    body.add_module(NAME, virtual)
    body.register_forward_pre_hook(virtual.before, with_kwargs=True)
    body.register_forward_hook(virtual.after, with_kwargs=True)
    return model


def _body(model: Any) -> Any:
    try:
        return model.get_decoder()
    except (AttributeError, NotImplementedError) as error:
        raise TypeError(f"virtual tokens need a Hugging Face causal language model, got {type(model).__name__}") from error


def _token_ids(model: Any, tokens: int | Sequence[int], seed: int) -> Tensor:
    size, device = model.get_input_embeddings().num_embeddings, model.device
    if isinstance(tokens, int):
        if tokens < 1:
            raise ValueError(f"`tokens` must be >= 1, or a list of token ids; got {tokens}")
        return torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(seed)).to(device)
    ids = torch.tensor(list(tokens))
    if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(f"`tokens` must be ids between 0 and {size - 1}, got {list(tokens)}")
    return ids.to(device)
