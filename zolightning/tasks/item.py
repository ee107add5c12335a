"""A question to a language model, and a task as a value: how a row of a table becomes such a question."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Row = Mapping[str, Any]
Kind = Literal["words", "options", "mask", "text"]


class Item(NamedTuple):
    """A question.

    Args:
        prompt: The text before the answer, or around '{mask}'.
        options: the answers to choose from, as they stand after the prompt; () where the model writes its own.
        right: The numbers of the right options.
        references: the texts that are right; where there are options, those.
    """

    prompt: str
    options: tuple[str, ...] = ()
    right: frozenset[int] = frozenset()
    references: tuple[str, ...] = ()

    @property
    def answered(self) -> str:
        """The prompt with its (first) right answer, as a demonstration."""
        answer = self.options[min(self.right)] if self.options else " " + self.references[0]
        return self.prompt.replace("{mask}", answer.strip()) if "{mask}" in self.prompt else self.prompt + answer


@dataclass(frozen=True)
class TextTask:
    """How a row becomes an :class:`Item`: prompts with '{column}' in them, and where the answers are.

    Raises ValueError where the fields contradict each other; :meth:`item` raises it for a row with a missing value or a wrong
    answer, and KeyError for one that lacks a column.
    """

    kind: Kind
    """'words': the label's word after the prompt, the same few words for every row. 'options': continuations that each row
    brings, scored by the average log-likelihood of their tokens. 'mask': the label's word in place of '{mask}', for masked
    language models. 'text': the model writes the answer."""

    template: str
    """The prompt; '{column}' stands for a row's value."""

    words: tuple[str, ...] = ()
    """For 'words' and 'mask': the word of each label, with the space that belongs before it."""

    label: str = "label"
    """Column of the label's number; for 'options' of the right option's number."""

    options: str = "options"
    """For 'options': column of the list of continuations."""

    answers: str = "answers"
    """For 'text', and for 'options' without a label: column of the right texts, a list or one text."""

    prepare: Callable[[Row], Row] | None = None
    """Run on each row first."""

    source: tuple[str, ...] = ()
    """Arguments of Hugging Face's ``load_dataset``."""

    max_new_tokens: int = 32
    """For 'text': the longest answer."""

    def __post_init__(self) -> None:
        if (self.kind in ("words", "mask")) != bool(self.words):
            raise ValueError(
                f"a task of kind {self.kind!r} {'needs' if not self.words else 'takes no'} words; got {self.words!r}"
            )
        if len(set(self.words)) < len(self.words) or len(self.words) == 1:
            raise ValueError(f"words must be at least two and differ, got {self.words!r}")
        if (self.kind == "mask") != ("{mask}" in self.template):
            raise ValueError(f"'{{mask}}' belongs only in the template of kind 'mask', got {self.kind!r} and {self.template!r}")

    def item(self, row: Row) -> Item:
        """The question that a row asks."""
        row = row if self.prepare is None else self.prepare(_Filled(row))
        prompt = self.template.format_map(_Filled({**row, "mask": "{mask}"}))
        if self.kind in ("words", "mask"):
            number = _whole(_column(row, self.label), self.label)
            if not 0 <= number < len(self.words):
                raise ValueError(f"label {number} is not one of the {len(self.words)} labels 0 to {len(self.words) - 1}")
            return Item(prompt, self.words, frozenset([number]), (self.words[number].strip(),))
        if self.kind == "options":
            options = _column(row, self.options)
            if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
                raise ValueError(
                    f"column {self.options!r} must hold a list of texts, as .jsonl and .parquet files can; got {options!r:.100}"
                )
            options = tuple(options)
            right = frozenset(_whole(number, self.label) for number in _listed(_column(row, self.label)))
            if not right or not all(0 <= number < len(options) for number in right):
                raise ValueError(f"right option {sorted(right)} is not one of the {len(options)} options")
            return Item(prompt, options, right, tuple(options[number] for number in sorted(right)))
        references = tuple(str(answer) for answer in _listed(_column(row, self.answers)) if answer is not None)
        if not references:
            raise ValueError(f"no answer in column {self.answers!r}; leave out rows without one")
        return Item(prompt, references=references)


def _column(row: Row, name: str) -> Any:
    """The value at 'a' or, in a dict within, at 'a.b'."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(name)
        value = _Filled(value)[part]
    return value


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, int, float)) else list(value)


def _whole(value: Any, column: str) -> int:
    """The number; 1.0 and "1" are 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"column {column!r} must hold whole numbers, got {value!r}")
    return int(number)


class _Filled(dict[str, Any]):
    """A row in which to read a missing value is an error, and not the text "None"."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"no value in column {name!r} ({value}); fill it in or leave the row out")
        return value


def few_shot(items: Sequence[Item], k: int, seed: int = 0) -> list[Item]:
    """k items of each right answer (of 'text' and 'options' tasks k in all), drawn and ordered by ``seed``.

    Raises ValueError where there are fewer.
    """
    words = {item.options for item in items}
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(item.right if len(words) == 1 else None, []).append(item)
    generator = random.Random(seed)
    if k < 1 or min(map(len, groups.values()), default=0) < k:
        sizes = {str(sorted(key or ())): len(group) for key, group in groups.items()}
        raise ValueError(f"`few_shot(k={k})` must be >= 1 and at most the items of each answer: {sizes}")
    chosen = [item for group in groups.values() for item in generator.sample(group, k)]
    generator.shuffle(chosen)
    return chosen


def in_context(items: Sequence[Item], demonstrations: Sequence[Item], separator: str = "\n\n") -> list[Item]:
    """The items, each after the answered demonstrations: in-context learning, without any training."""
    before = "".join(shown.answered + separator for shown in demonstrations)
    return [item._replace(prompt=before + item.prompt) for item in items]
