"""Control vectors trained inside llama.cpp, in the form that its own tools load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .engine import EngineError
from .llamacpp import LlamaContext, LlamaModel, Rows
from .prompts import EncodedPrompts, Prompt


class ControlVectors:
    r"""A vector for each of some blocks, added to the hidden states that it puts out at a prompt's last positions:

    .. math:: h^{(l)}_t \leftarrow h^{(l)}_t + s_l\,v_l, \qquad t = T - W, \dots, T - 1

    The text before these positions does not depend on the vectors: it is encoded once, its keys and values are kept, and a
    probe costs W tokens. Each example can have vectors of its own. A batch is a mapping with ``input_ids`` and
    ``attention_mask`` (B, T), padded on the left, as :func:`~zolightning.data.collate` makes it.

    Args:
        model: the GGUF file.
        calibration: token ids of some prompts, whose hidden states have the RMS s_l.
        positions: W >= 1; None moves all positions, as llama.cpp's own tools do, and encodes the whole prompt in each probe.
        layers: blocks, from 1 on; None: the middle third.
        outputs: token ids whose logits are given, or of a list of ids their mean; None: all tokens.
        sequences: prompts whose keys and values are kept, >= 1.
        length: tokens of the longest prompt, >= 1.
        threads: of llama.cpp.

    Raises:
        ValueError: an argument out of range.
    """

    by_example = True

    def __init__(
        self,
        model: LlamaModel,
        calibration: Sequence[Sequence[int]],
        *,
        positions: int | None = 1,
        layers: Sequence[int] | None = None,
        outputs: Sequence[int | Sequence[int]] | None = None,
        sequences: int = 32,
        length: int = 128,
        threads: int = 1,
    ) -> None:
        third = model.blocks // 3
        self.layers = sorted(set(range(max(1, third), model.blocks - third) if layers is None else layers))
        if not self.layers or not 1 <= self.layers[0] <= self.layers[-1] < model.blocks:
            raise ValueError(f"`ControlVectors(layers=...)` must be in 1 … {model.blocks - 1}, got {self.layers}")
        if not calibration:
            raise ValueError("`ControlVectors(calibration=...)` needs at least one prompt, which tells the vectors' scale")
        self.model, self.positions = model, positions
        self.outputs = None if outputs is None else [[one] if isinstance(one, int) else [*one] for one in outputs]
        settings = repr((self.layers, positions, [[*prompt] for prompt in calibration]))
        self.identity = f"{model.identity}, control vectors {hashlib.sha256(settings.encode()).hexdigest()[:16]}"
        self.numbers = {"vectors": torch.zeros(len(self.layers) * model.width)}
        self.scales = sizes(model, calibration, positions, length)[self.layers]
        self._texts = EncodedPrompts(model, positions, sequences, length, threads)

    def prepare(self, batch: Mapping[str, Tensor]) -> bool:
        """Encode the text before the positions that are moved."""
        self._texts.encode(list(dict.fromkeys(prompts_of(batch)))[: self._texts.sequences])
        return self.positions is not None

    def run(self, numbers: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """(B, outputs), float32: logits of the token that comes next."""
        # chosen at once: the logits of a whole vocabulary, for each example of all probes, would be most of a step's memory
        return torch.from_numpy(
            np.concatenate([self._chosen(self._texts.logits(*each)) for each in self._each(numbers, batch)])
        )

    def answers(self, numbers: Mapping[str, Tensor], batch: Mapping[str, Tensor], tokens: int) -> list[list[int]]:
        """The model's text behind each prompt, as token ids: always the likeliest one, at most ``tokens``.

        The vectors move the prompt's last positions and all that is written. See :class:`WrittenAnswers`.
        """
        if tokens < 1:
            raise ValueError(f"`tokens` must be >= 1, got {tokens}")
        return [answer for each in self._each(numbers, batch) for answer in self._texts.answers(*each, tokens)]

    def rows(self, vectors: Rows) -> Rows:
        """(blocks − 1, width): added to the output of each block from 1 on."""
        rows = np.zeros((self.model.blocks - 1, self.model.width), np.float32)
        rows[np.array(self.layers) - 1] = vectors.reshape(len(self.layers), -1) * self.scales[:, None]
        return rows

    def _chosen(self, logits: Rows) -> Rows:
        return logits if self.outputs is None else np.stack([logits[:, ids].mean(1) for ids in self.outputs], 1)

    def _each(
        self, numbers: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[Prompt], Rows, int, int]]:
        """Prompts that run in one go, their rows, and the first and the last block."""
        vectors, prompts = numbers["vectors"].float().numpy(), prompts_of(batch)
        for some in self._alike(vectors, prompts):
            yield prompts[some], self.rows(vectors[some.start]), self.layers[0], self.layers[-1]

    def _alike(self, vectors: Rows, prompts: Sequence[Prompt]) -> Iterator[slice]:
        """Neighbours that can run in one go: different prompts at equal vectors."""
        first, seen = 0, set[Prompt]()
        for n, prompt in enumerate(prompts):
            if prompt in seen or len(seen) == self._texts.sequences or not np.array_equal(vectors[n], vectors[first]):
                yield slice(first, n)
                first, seen = n, set()
            seen.add(prompt)
        yield slice(first, len(prompts))


class WrittenAnswers:
    """A score of the model's text, as an :class:`~zolightning.blackbox.engine.Engine`; it need not be differentiable.

    ::

        def right(answers, batch):
            return [float(wanted in model.text(answer)) for answer, wanted in zip(answers, batch["wanted"])]

        EngineModel(WrittenAnswers(ControlVectors(model, ...), right))

    In ``zo_objective`` return ``1 - model(batch)`` where higher is better.

    Args:
        engine: writes.
        score: (token ids of the B answers, the batch) → B numbers.
        tokens: of an answer at most, >= 1.
    """

    by_example = True

    def __init__(
        self,
        engine: ControlVectors,
        score: Callable[[list[list[int]], Mapping[str, Tensor]], Sequence[float] | Tensor],
        tokens: int = 16,
    ) -> None:
        self.engine, self.score, self.tokens = engine, score, tokens
        self.identity, self.numbers, self.prepare = engine.identity, engine.numbers, engine.prepare

    def run(self, numbers: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """(B,), float32.

        Raises:
            EngineError: the score gave something else than a finite number for each answer.
        """
        answers = self.engine.answers(numbers, batch, self.tokens)
        scores = torch.as_tensor(self.score(answers, batch), dtype=torch.float32)
        if scores.shape != (len(answers),) or not scores.isfinite().all():
            raise EngineError(f"the score must give {len(answers)} finite numbers, one for each answer; got {scores}")
        return scores


def export_control_vectors(path: str | Path, engine: ControlVectors, vectors: Tensor) -> None:
    """Write a GGUF file for ``llama-cli --control-vector``, which moves all positions, as ``positions=None`` does.

    Args:
        path: the file.
        engine: whose layers and scales they are.
        vectors: the trained ones, flat.

    Raises:
        ValueError: the vectors were trained for the last positions only, which llama.cpp's own tools cannot do.
    """
    if engine.positions is not None:
        raise ValueError(
            f"these vectors move the last {engine.positions} positions, and llama.cpp's tools move all; train them with "
            "`ControlVectors(positions=None)`"
        )
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", engine.model.architecture)
    writer.add_uint32("controlvector.layer_count", len(engine.layers))
    rows = engine.rows(vectors.detach().float().numpy())
    for layer in engine.layers:
        writer.add_tensor(f"direction.{layer}", rows[layer - 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompts_of(batch: Mapping[str, Tensor]) -> list[Prompt]:
    """The token ids of a batch's examples, without its padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask.bool(), strict=True)]


def sizes(model: LlamaModel, prompts: Sequence[Sequence[int]], positions: int | None, length: int) -> Rows:
    """(blocks,): the RMS of each block's output at the prompts' last positions."""
    squares = np.zeros(model.blocks)
    kept = positions or 0

    def note(name: str, states: Rows) -> None:
        block = int(name.rpartition("-")[2])
        squares[block] += np.square(states.reshape(-1, model.width)[-kept:]).mean()

    context = LlamaContext(model, 1, length, watch=note)
    for prompt in prompts:
        context.decode([(0, 0, prompt[-length:])], logits=True)
        context.forget(0)
    return np.sqrt(np.maximum(squares / len(prompts), 1e-12)).astype(np.float32)
