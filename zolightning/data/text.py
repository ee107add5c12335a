"""Labelled texts, split for training, and the embedded film snippets."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from .archives import read_tar_member
from .artifacts import VADER
from .fetch import fetch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_WORDS = range(4, 31)
_CLEAR = 1.0


class Example(NamedTuple):
    """A text and the index of its label."""

    text: str
    label: int


class Splits(NamedTuple):
    """Three disjoint parts of a data set; `label_names[example.label]` is an example's label."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    label_names: tuple[str, ...]


def film_snippets(seed: int = 0, validation: int = 400, test: int = 1000, offline: bool = False) -> Splits:
    """Return sentences from film reviews, labelled negative (0) or positive (1), in equal numbers.

    The 10,605 snippets of Hutto & Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text", ICWSM-14, each with a mean human rating from -4 to 4. Kept are clear
    ratings (at least 1 or at most -1) of 4 to 30 words, each text once. `seed` settles which snippets go
    where; `validation` and `test` count examples, the rest is for training. Fetched once (2.5 MB), only
    read from the cache if `offline`.

    Raises FetchError when the data cannot be fetched, ValueError when the sizes leave nothing to train on.
    """
    usable = [
        Example(text, int(rating > 0))
        for rating, text in rated_snippets(offline=offline)
        if abs(rating) >= _CLEAR and len(text.split()) in _WORDS
    ]
    examples = distinct(usable, lambda example: example.text)
    random.Random(seed).shuffle(examples)
    by_class = [[example for example in examples if example.label == label] for label in (0, 1)]
    size = min(map(len, by_class))
    if min(validation, test) < 0 or validation + test > 2 * size - 2:
        raise ValueError(
            f"validation={validation} and test={test} do not fit: there are {2 * size} balanced snippets; "
            "choose sizes of at least 0 that together leave some for training"
        )
    # An odd size gives its extra example to class 1.
    held = [((validation + label) // 2, (test + label) // 2) for label in (0, 1)]
    splits = split_classes([group[:size] for group in by_class], held, ("negative", "positive"), seed)
    sizes = len(splits.train), len(splits.validation), len(splits.test)
    logger.info("film snippets: %d for training, %d for validation, %d for test [%s]", *sizes, VADER.credit)
    return splits


def rated_snippets(*, offline: bool = False) -> list[tuple[float, str]]:
    """Return all 10,605 film snippets with their mean rating (-4 to 4), in file order."""
    inner = read_tar_member(fetch(VADER, offline=offline), _INNER)
    lines = read_tar_member(inner, _SNIPPETS).decode("utf-8").rstrip().split("\n")
    fields = (line.split("\t", 2) for line in lines)
    return [(float(rating), " ".join(text.split())) for _, rating, text in fields]


def distinct(items: Iterable[T], text_of: Callable[[T], str]) -> list[T]:
    """Return the first item of each text, in order; spacing and case make no difference between texts."""
    first: dict[str, T] = {}
    for item in items:
        first.setdefault(" ".join(text_of(item).split()).casefold(), item)
    return list(first.values())


def drawn(items: list[T], most: int) -> list[T]:
    """Return so many of the items, the same in every run, or all of them. Not the first: a file may be sorted by its labels."""
    return items if len(items) <= most else random.Random(0).sample(items, most)


def split_classes(
    by_class: Sequence[Sequence[Example]],
    held: Sequence[tuple[int, int]],
    label_names: tuple[str, ...],
    seed: int,
) -> Splits:
    """Return splits that each mix the classes, in an order settled by `seed`.

    `held` counts, for each class, the leading examples for validation and the next ones for test.
    """
    splits = Splits([], [], [], label_names)
    for examples, (validation, test) in zip(by_class, held, strict=True):
        splits.validation.extend(examples[:validation])
        splits.test.extend(examples[validation : validation + test])
        splits.train.extend(examples[validation + test :])
    shuffler = random.Random(seed)
    for part in (splits.train, splits.validation, splits.test):
        shuffler.shuffle(part)
    return splits
