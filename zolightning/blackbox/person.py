"""A person who ranks candidates in the browser, for as long as it takes and over restarts of either side."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.atomic import atomic_file
from ..methods.ranking import EndOfRanking, Groups, RankingError, ranking_weights

Card = Mapping[str, str]
"""{"text": …} or {"picture": a PNG in base 64}."""

_FORMAT = 1


class Person:
    """Asks a person on the page that ``zolightning rank FOLDER`` serves.

    An oracle of :class:`~zolightning.methods.ranking.Ranking`. Question and answer are files in the folder, each written in
    one piece. The answer to the same candidates is asked for once: a training that was killed is started again, from a
    checkpoint or from its beginning, goes through the rankings it had, and waits for the next one.

    Args:
        folder: made where it is missing; one training at a time.
        show: candidate → a text, or a picture: an image of PIL, or numbers (H, W), (C, H, W) or (H, W, C), in 0 … 1 or uint8.
        words: stand above the candidates, such as the task.
        every: seconds between two looks into the folder, > 0.
        say: is told once where to rank.
    """

    def __init__(
        self,
        folder: str | Path,
        show: Callable[[object], object] = lambda candidate: candidate,
        words: str = "",
        every: float = 0.2,
        say: Callable[[str], object] = print,
    ) -> None:
        if not every > 0:
            raise ValueError(f"`Person(every=...)` must be > 0 seconds, got {every}")
        self.folder, self.show, self.words, self.every, self._say = Path(folder), show, words, every, say
        self._lock: FileLock | None = None

    def __call__(self, candidates: Sequence[object], top: int) -> Groups:
        """The person's ranking.

        Raises:
            EndOfRanking: the person has stopped.
            RankingError: a kept ranking is damaged, or a candidate cannot be shown.
            RuntimeError: another training asks in this folder.
        """
        return self._ask("ranking", [self._card(candidate) for candidate in candidates], top)

    def prefers(self, before: object, after: object) -> bool | None:
        """Whether the person likes ``after`` better, shown the two without being told which is which.

        Returns:
            None: equal, or the person has stopped.
        """
        cards = [self._card(before), self._card(after)]
        places = sorted((0, 1), key=lambda n: hashlib.sha256(_raw(cards[n])).digest())  # the same after a restart
        try:
            ranking = self._ask("blind", [cards[n] for n in places], 1)
        except EndOfRanking:
            return None
        before_, after_ = (ranking_weights(ranking, 2)[places.index(n)] for n in (0, 1))
        return None if before_ == after_ else after_ < before_

    def close(self, words: str = "The training has ended. Thank you.") -> None:
        """Say on the page that nothing more is asked, and leave the folder to the next training."""
        self._begin()
        self._write("end", [], 0, words, "end")
        assert self._lock is not None
        self._lock.release()
        self._lock = None

    def _ask(self, kind: str, cards: Sequence[Card], top: int) -> Groups:
        self._begin()
        name = hashlib.sha256(b"\0".join([kind.encode(), str(top).encode(), *map(_raw, cards)])).hexdigest()[:32]
        answer, stopped = self.folder / "rankings" / f"{name}.json", self.folder / "stop"
        if not answer.exists():
            self._write(kind, cards, top, self.words, name)
        while not answer.exists():
            if stopped.exists():
                stopped.unlink()
                raise EndOfRanking("stopped on the ranking page")
            time.sleep(self.every)
        try:
            ranking: Groups = json.loads(answer.read_text(encoding="utf-8"))["ranking"]
            ranking_weights(ranking, len(cards))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RankingError(f"{answer} is damaged ({error}); delete it, and the person is asked again") from error
        return ranking

    def _begin(self) -> None:
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "training.lock")
        try:
            lock.acquire(timeout=5)  # a page that looks whether it is held holds it for a moment
        except Timeout:
            raise RuntimeError(f"another training asks in {self.folder}; end it, or give this one another folder") from None
        self._lock = lock
        (self.folder / "stop").unlink(missing_ok=True)  # it was meant for the training before
        self._say(f"to rank, run `zolightning rank {self.folder}`; this training waits for it")

    def _write(self, kind: str, cards: Sequence[Card], top: int, words: str, name: str) -> None:
        done = sum(1 for _ in (self.folder / "rankings").glob("*.json"))
        asked = {"format": _FORMAT, "id": name, "kind": kind, "round": done + 1, "top": top, "words": words, "cards": [*cards]}
        with atomic_file(self.folder / "question.json") as draft:
            draft.write_text(json.dumps(asked), encoding="utf-8")

    def _card(self, candidate: object) -> Card:
        shown = self.show(candidate)
        if isinstance(shown, Tensor):
            shown = shown.detach().cpu().float().numpy() if shown.is_floating_point() else shown.cpu().numpy()
        if isinstance(shown, np.ndarray):
            shown = _image(shown)
        if not hasattr(shown, "save"):
            return {"text": str(shown)}
        data = io.BytesIO()
        shown.save(data, "PNG")
        return {"picture": base64.b64encode(data.getvalue()).decode()}

    def __repr__(self) -> str:
        return f"Person({str(self.folder)!r})"


def _raw(card: Card) -> bytes:
    return json.dumps(card, sort_keys=True).encode()


def _image(numbers: np.ndarray[Any, Any]) -> Any:
    from PIL import Image

    if numbers.ndim == 3 and numbers.shape[0] in (1, 3, 4) and numbers.shape[2] not in (1, 3, 4):
        numbers = numbers.transpose(1, 2, 0)
    numbers = numbers.squeeze(2) if numbers.ndim == 3 and numbers.shape[2] == 1 else numbers
    if not (numbers.ndim == 2 or (numbers.ndim == 3 and numbers.shape[2] in (3, 4))) or not numbers.size:
        raise RankingError(
            f"a candidate of shape {numbers.shape} is no picture, which is (H, W), (C, H, W) or (H, W, C); say with "
            "`Person(show=...)` how it is shown"
        )
    if numbers.dtype != np.uint8:
        if not np.isfinite(numbers).all():
            raise RankingError("a candidate holds numbers that are not finite, and cannot be shown")
        numbers = np.rint(np.clip(numbers, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(numbers)
