"""The models that are timed: random weights of a named architecture, or any Hugging Face id or folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..._answers import did_you_mean


class Shape(NamedTuple):
    """A decoder-only transformer's size. ``kv_heads`` 0 stands for OPT, whose heads have keys of their own."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


def _opt(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(hidden, 4 * hidden, layers, heads, 0, 50272, True)


ARCHITECTURES = {
    "tiny-llama": Shape(64, 128, 6, 4, 2, 256, True),
    "tiny-opt": Shape(32, 128, 6, 4, 0, 256, True),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": Shape(960, 2560, 32, 15, 5, 49152, True),
    "smollm2-1.7b": Shape(2048, 8192, 24, 32, 32, 49152, True),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000, False),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000, False),
    "llama3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "llama3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, True),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256, False),
    "llama3-70b": Shape(8192, 28672, 80, 64, 8, 128256, False),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000, False),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
}
"""Published shapes (SmolLM2, Llama 2 and 3, Mistral, OPT), and two tiny ones to try the command with."""


def build_model(name: str, dtype: torch.dtype, device: torch.device, length: int, seed: int = 0) -> nn.Module:
    """A causal language model in eval mode, its weights made in ``dtype`` on ``device``, so that a big one fits.

    Args:
        name: one of :data:`ARCHITECTURES` for random weights, else a Hugging Face id or a folder.
        dtype: The dtype of the weights.
        device: The device on which they are made.
        length: tokens of an example that it must take.
        seed: The seed of the random weights.

    Raises:
        OSError: no such model.
        ValueError: the model is too short for ``length``.
    """
    if name in ARCHITECTURES:
        return random_model(ARCHITECTURES[name], dtype, device, length, seed)
    check_name(name)
    from ...data import load_causal_lm

    try:
        model: nn.Module = load_causal_lm(name, dtype=dtype, offline=Path(name).exists())[0]
    except OSError as error:
        raise OSError(f"{error}\nOr random weights, no download: --model {' | '.join(ARCHITECTURES)}") from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"`length={length}` is more than {name} takes; allowed: 1 to {longest}")
    return model.to(device).eval()


def check_name(name: str) -> None:
    """Refuse a misspelled architecture before a hub is asked for it, which takes long to say no.

    Raises:
        ValueError: it is neither an architecture nor a folder, and close to an architecture's name.
    """
    known = name in ARCHITECTURES or "/" in name or Path(name).exists()
    hint = "" if known else did_you_mean(name, ARCHITECTURES)
    if hint:
        raise ValueError(
            f"`--model {name}` is neither a folder nor one of {', '.join(ARCHITECTURES)}{hint} A model of Hugging Face's hub "
            "is given with its owner, as owner/name"
        )


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, length: int = 1, seed: int = 0) -> nn.Module:
    """The architecture with weights as it is initialised before training, without dropout."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(_config(shape, max(2048, length)), dtype=dtype)
    return model.eval()


def _config(shape: Shape, positions: int) -> object:
    from transformers import LlamaConfig, OPTConfig

    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": shape.tied,
        "use_cache": False,
    }
    if shape.kv_heads:
        return LlamaConfig(**common, intermediate_size=shape.feed_forward, num_key_value_heads=shape.kv_heads)
    return OPTConfig(**common, ffn_dim=shape.feed_forward, word_embed_proj_dim=shape.hidden, dropout=0.0)
