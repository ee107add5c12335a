"""Turn labelled texts into prompts whose next token is the label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .text import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELD = "{text}"


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt around a text and, in label order, the word that follows it for each label.

    Raises ValueError unless `template` holds {text} exactly once and the verbalizers are at least two,
    non-empty and distinct.
    """

    template: str = "{text} It was"
    verbalizers: tuple[str, ...] = (" terrible", " great")

    def __post_init__(self) -> None:
        if self.template.count(_FIELD) != 1:
            raise ValueError(f"template {self.template!r} must contain {_FIELD} exactly once")
        if len(self.verbalizers) < 2 or len(set(self.verbalizers)) < len(self.verbalizers):
            raise ValueError(f"verbalizers {self.verbalizers!r} must be at least two distinct words")
        if not all(self.verbalizers):
            raise ValueError(f"verbalizers {self.verbalizers!r} must not be empty; give one word per label")

    def render(self, text: str) -> str:
        """Return the prompt for `text`."""
        return self.template.replace(_FIELD, text)


class Encoded(NamedTuple):
    """The token ids of a prompt and the index of its label."""

    input_ids: list[int]
    label: int


def verbalizer_ids(tokenizer: "PreTrainedTokenizerBase", prompt: PromptTemplate, label_names: Sequence[str]) -> Tensor:
    """Return the token id of each verbalizer, int64 of shape (labels,), in the order of `label_names`.

    Raises ValueError unless there is one verbalizer per label and each, put after the prompt, adds
    exactly one known token.
    """
    if len(prompt.verbalizers) != len(label_names):
        raise ValueError(
            f"{len(prompt.verbalizers)} verbalizers {prompt.verbalizers!r} for {len(label_names)} labels "
            f"({', '.join(label_names)}); give one verbalizer per label, in this order"
        )
    # The continuation is compared in context, as the model will be asked for it; alone, a word
    # can tokenise differently (SentencePiece adds a space of its own).
    stem = prompt.render("A film.")
    before = _tokens(tokenizer, [stem])[0]
    ids = [_added_token(tokenizer, before, stem, word) for word in prompt.verbalizers]
    if len(set(ids)) < len(ids):
        raise ValueError(f"verbalizers {prompt.verbalizers!r} share a token ({ids}); choose words that differ")
    return torch.tensor(ids)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    prompt: PromptTemplate,
    max_length: int = 128,
) -> list[Encoded]:
    """Return the tokenised prompts of `examples`, each at most `max_length` tokens.

    A prompt that is too long loses the end of its text, never a part of the template.

    Raises ValueError when even the template exceeds `max_length`.
    """
    if not examples:
        return []
    prompts = _tokens(tokenizer, [prompt.render(example.text) for example in examples])
    return [
        Encoded(_fitted(tokenizer, prompt, example.text, ids, max_length), example.label)
        for ids, example in zip(prompts, examples, strict=True)
    ]


def common_ending(items: Sequence[Encoded]) -> int:
    """Return how many tokens all prompts end with: those of the template behind the text."""
    shortest = min(items, key=lambda item: len(item.input_ids)).input_ids
    count = 0
    while count < len(shortest) and len({item.input_ids[-1 - count] for item in items}) == 1:
        count += 1
    return count


def collate(items: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Return a batch padded on the left with `pad_id`.

    Its keys are input_ids and attention_mask (batch, tokens) and labels (batch,), all int64.
    """
    width = max(len(item.input_ids) for item in items)
    gaps = [width - len(item.input_ids) for item in items]
    return {
        "input_ids": torch.tensor([[pad_id] * gap + item.input_ids for gap, item in zip(gaps, items, strict=True)]),
        "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
        "labels": torch.tensor([item.label for item in items]),
    }


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose=False: long texts are cut below, the warning about them would only mislead.
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return ids


def _added_token(tokenizer: "PreTrainedTokenizerBase", before: list[int], stem: str, word: str) -> int:
    after = _tokens(tokenizer, [stem + word])[0]
    added = after[len(before) :]
    if after[: len(before)] != before:
        raise ValueError(
            f"verbalizer {word!r} changes the tokens of the prompt before it; let verbalizers start with a "
            "space and the template end without one (a tokenizer that ends every text with a special token "
            "cannot be used)"
        )
    if len(added) != 1 or added[0] == tokenizer.unk_token_id:
        tokens = tokenizer.convert_ids_to_tokens(added)
        raise ValueError(
            f"verbalizer {word!r} must be one token of the vocabulary but becomes {tokens}; "
            "choose a shorter or more common word"
        )
    return added[0]


def _fitted(
    tokenizer: "PreTrainedTokenizerBase", prompt: PromptTemplate, text: str, ids: list[int], max_length: int
) -> list[int]:
    """Return `ids`, or the prompt with as many leading characters of `text` as fit, found by bisection."""
    if len(ids) <= max_length:
        return ids
    best = _tokens(tokenizer, [prompt.render("")])[0]
    if len(best) > max_length:
        raise ValueError(
            f"max_length={max_length} is too short: even the template {prompt.template!r} takes "
            f"{len(best)} tokens; raise it or shorten the template"
        )
    fits, exceeds = 0, len(text)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        ids = _tokens(tokenizer, [prompt.render(text[:middle].rstrip())])[0]
        if len(ids) <= max_length:
            fits, best = middle, ids
        else:
            exceeds = middle
    return best
