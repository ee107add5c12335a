"""Prompts whose beginnings llama.cpp keeps encoded, so that only their last positions run in each probe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .llamacpp import LlamaContext, LlamaModel, Rows

Prompt = tuple[int, ...]


class EncodedPrompts:
    """The latest prompts, each up to its last positions, encoded without control vectors.

    Args:
        model: encodes them.
        positions: how many positions of each are left out, >= 1; None: all.
        sequences: prompts that are kept, >= 1.
        length: tokens of the longest, >= 1.
        threads: of llama.cpp.
    """

    def __init__(self, model: LlamaModel, positions: int | None, sequences: int, length: int, threads: int) -> None:
        for name, value in (("positions", positions), ("sequences", sequences), ("length", length)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}")
        self.positions, self.sequences, self.length = positions, sequences, length
        self._model = model
        self._context = LlamaContext(model, sequences, length, threads)
        self._free, self._kept = list(range(sequences)), OrderedDict[Prompt, int]()

    def encode(self, prompts: Sequence[Prompt]) -> list[int]:
        """Where each prompt is kept; those that are new are encoded now.

        Args:
            prompts: different ones, at most ``sequences``.

        Raises:
            ValueError: one that is too short or too long.
        """
        fewest = self.positions or 1
        for prompt in prompts:
            if not fewest <= len(prompt) <= self.length:
                raise ValueError(
                    f"a prompt has {len(prompt)} tokens, and this engine takes {fewest} to {self.length}; see its `length` and "
                    "`positions`"
                )
        for prompt in prompts:
            if prompt in self._kept:
                self._kept.move_to_end(prompt)
        new = [prompt for prompt in prompts if prompt not in self._kept]
        while len(self._free) < len(new):
            self._free.append(self._kept.popitem(last=False)[1])
        places = {prompt: self._free.pop() for prompt in new}
        try:
            for place in places.values():
                self._context.forget(place)
            self._context.steer(None)
            self._context.decode([(place, 0, prompt[: self.start(prompt)]) for prompt, place in places.items()])
        except BaseException:
            self._free += places.values()
            raise
        self._kept |= places
        return [self._kept[prompt] for prompt in prompts]

    def logits(self, prompts: Sequence[Prompt], vectors: Rows, first: int, last: int) -> Rows:
        """(prompts, words): scores behind each prompt when its last positions are moved, see :meth:`LlamaContext.steer`."""
        with self._moved(prompts, vectors, first, last) as (_, logits):
            return logits

    def answers(self, prompts: Sequence[Prompt], vectors: Rows, first: int, last: int, tokens: int) -> list[list[int]]:
        """The likeliest tokens that follow each prompt, one after another, when its last positions and they are moved.

        Args:
            prompts: different ones, at most ``sequences``.
            vectors, first, last: see :meth:`LlamaContext.steer`.
            tokens: the most for each prompt, >= 1; the model's end of text ends an answer, and is left out.
        """
        if too_long := [prompt for prompt in prompts if len(prompt) + tokens > self.length]:
            raise ValueError(
                f"a prompt of {len(too_long[0])} tokens and {tokens} more do not fit into the engine's `length`, {self.length}"
            )
        found: list[list[int]] = [[] for _ in prompts]
        with self._moved(prompts, vectors, first, last) as (places, logits):
            going = list(range(len(prompts)))
            while going:
                following = [int(row.argmax()) for row in logits]
                going = [n for n, token in zip(going, following, strict=True) if not self._model.ends(token)]
                for n, token in zip(going, (t for t in following if not self._model.ends(t)), strict=True):
                    found[n].append(token)
                going = [n for n in going if len(found[n]) < tokens]
                logits = self._context.decode(
                    [(places[n], len(prompts[n]) + len(found[n]) - 1, found[n][-1:]) for n in going], True
                )
        return found

    @contextmanager
    def _moved(self, prompts: Sequence[Prompt], vectors: Rows, first: int, last: int) -> Iterator[tuple[list[int], Rows]]:
        """Where the prompts are kept, and the logits behind them; prompts decoded meanwhile are forgotten afterwards."""
        places = self.encode(prompts)
        self._context.steer(vectors, first, last)
        try:
            yield (
                places,
                self._context.decode(
                    [(place, self.start(p), p[self.start(p) :]) for place, p in zip(places, prompts, strict=True)], logits=True
                ),
            )
        finally:
            for place, prompt in zip(places, prompts, strict=True):
                self._context.forget(place, self.start(prompt))

    def start(self, prompt: Prompt) -> int:
        """The first position that is left out."""
        return 0 if self.positions is None else len(prompt) - self.positions
