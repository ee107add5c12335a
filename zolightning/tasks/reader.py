"""How an answer is read off a language model: which tokens go in, and which scores or texts come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import answer_log_likelihood, candidate_logits, generate_answers
from ..objectives import exact_match, f1_error, soft_zero_one, text_errors, token_f1, zero_one
from .item import Item, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Any]
Objective = Callable[[nn.Module, Batch], Tensor | float]
"""(model, batch) → (B,) losses, or one for the batch."""


def cross_entropy(scores: Tensor, right: Tensor) -> Tensor:
    r"""(B,) in float32: :math:`-\log \sum_{c \in \mathrm{right}} p_c`, the probability that any right option is chosen."""
    return -scores.float().log_softmax(-1).masked_fill(~right, -torch.inf).logsumexp(-1)


class Reader(ABC):
    """Turns items into batches, and the model's outputs for a batch into losses and scores.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of a sequence; a longer prompt loses its beginning (never its first, special, token).
    """

    main: ClassVar[str]
    """Name of the score that decides."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        if max_length < 2:
            raise ValueError(f"`max_length` must be >= 2, got {max_length}")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set one: tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer, self.max_length = tokenizer, max_length

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> dict[str, object]:
        """A batch whose first tensor has the items along dimension 0."""

    @abstractmethod
    def objectives(self) -> dict[str, Objective]:
        """The objectives by name; the default first."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scores of shape (B,) by name, ``main`` among them; higher is better but for 'loss'."""

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return ids

    def _fitted(self, ids: list[int], room: int = 0) -> list[int]:
        """The ids, cut so that ``room`` more fit behind them."""
        most = self.max_length - room
        if len(ids) <= most:
            return ids
        start = int(ids[0] in self.tokenizer.all_special_ids)
        return ids[:start] + ids[len(ids) - most + start :]

    def _left_padded(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, sequences))
        gaps = [width - len(ids) for ids in sequences]
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[pad] * gap + ids for gap, ids in zip(gaps, sequences, strict=True)]),
            "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
        }

    def _continued(self, prompt: str, answers: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of the prompt with each answer, and how many at the end tell them from the prompt."""
        before, *sequences = self._ids([prompt, *(prompt + answer for answer in answers)])
        lengths = []
        for answer, ids in zip(answers, sequences, strict=True):
            shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
            if not 0 < len(ids) - shared < self.max_length:
                raise ValueError(
                    f"the answer {answer!r} takes {len(ids) - shared} tokens; it must take at least one, and fewer than "
                    f"max_length={self.max_length}"
                )
            lengths.append(len(ids) - shared)
        return [self._fitted(ids) for ids in sequences], lengths


class ChoiceReader(Reader):
    """One of several answers: each gets a score."""

    main = "accuracy"

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, K) float32, −inf where an item has fewer than K options."""

    def objectives(self) -> dict[str, Objective]:
        def of(score: Callable[[Tensor, Tensor], Tensor | float]) -> Objective:
            return lambda model, batch: score(*_judged(*self._scored(model, batch)))

        return {
            "cross_entropy": lambda model, batch: cross_entropy(*self._scored(model, batch)),
            "accuracy": of(zero_one),
            "soft_accuracy": of(soft_zero_one),
            "f1": of(f1_error),
        }

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        scores, right = self._scored(model, batch)
        return {"accuracy": 1 - zero_one(*_judged(scores, right)), "loss": cross_entropy(scores, right)}

    def _scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scores, and which options are right, (B, K) both."""
        scores = self.scores(model, batch)
        return scores, batch["right"].to(scores.device)

    def _right(self, items: Sequence[Item]) -> Tensor:
        widest = max(len(item.options) for item in items)
        return torch.tensor([[place in item.right for place in range(widest)] for item in items])


def _judged(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of the right options the one that scores best as the label, and the scores without the others: they are not wrong."""
    labels = scores.masked_fill(~right, -torch.inf).argmax(-1)
    others = right.scatter(1, labels[:, None], False)
    return scores.masked_fill(others, -torch.inf), labels


class WordReader(ChoiceReader):
    """The same few single-token words for every item: their logits after the prompt, and no others.

    Args:
        tokenizer: of a causal language model.
        words: one for each label, each adding exactly one token to a prompt.
        max_length: most tokens of a prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], prompt: str = "A film.", max_length: int = 512
    ) -> None:
        super().__init__(tokenizer, max_length)
        before, *sequences = self._ids([prompt, *(prompt + word for word in words)])
        self.ids = torch.tensor([ids[-1] for ids in sequences])
        if any(ids[:-1] != before for ids in sequences) or len(set(self.ids.tolist())) < len(words):
            made = [self.tokenizer.convert_ids_to_tokens(ids) for ids in sequences]
            raise ValueError(f"words {tuple(words)!r} must be different single tokens after {prompt!r}; they make {made}")

    def collate(self, items: Sequence[Item]) -> dict[str, object]:
        prompts = [self._fitted(ids) for ids in self._ids([item.prompt for item in items])]
        return {**self._left_padded(prompts), "right": self._right(items)}

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        return candidate_logits(model, batch, self.ids)


class OptionReader(ChoiceReader):
    """Continuations of any length, scored by the average log-likelihood of their tokens, as MeZO's multiple choice."""

    def collate(self, items: Sequence[Item]) -> dict[str, object]:
        right = self._right(items)
        count, widest = right.shape
        sequences, lengths = [], []
        for item in items:
            ids, sizes = self._continued(item.prompt, item.options)
            spare = widest - len(ids)
            sequences += ids + ids[:1] * spare  # a sequence that no score comes from
            lengths.append(sizes + [0] * spare)
        padded = {name: value.view(count, widest, -1) for name, value in self._left_padded(sequences).items()}
        return {**padded, "lengths": torch.tensor(lengths), "right": right}

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        lengths = batch["lengths"]
        scores = answer_log_likelihood(model, flat, lengths.flatten()).view(lengths.shape)
        return scores.masked_fill(lengths == 0, -torch.inf)

    def objectives(self) -> dict[str, Objective]:
        def likelihood(model: nn.Module, batch: Batch) -> Tensor:
            scores, labels = _judged(*self._scored(model, batch))
            return -scores.gather(1, labels[:, None])[:, 0]

        return {**super().objectives(), "likelihood": likelihood}


class MaskReader(ChoiceReader):
    """The label's word in place of '{mask}', for masked language models; the head sees that one position.

    Args:
        tokenizer: of a masked language model.
        words: one for each label, each a single token.
        max_length: most tokens of a prompt, which loses its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length)
        ids = tokenizer(list(words), add_special_tokens=False)["input_ids"]
        if any(len(word) != 1 or word[0] == tokenizer.unk_token_id for word in ids) or len({word[0] for word in ids}) < len(
            ids
        ):
            raise ValueError(f"words {tuple(words)!r} must be different single tokens; they are {ids}")
        self.ids = torch.tensor([word[0] for word in ids])

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        prompts = [item.prompt.replace("{mask}", self.tokenizer.mask_token) for item in items]
        batch = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        masks = batch["input_ids"] == self.tokenizer.mask_token_id
        if not bool((masks.sum(1) == 1).all()):
            raise ValueError(f"each prompt must keep one mask within max_length={self.max_length} tokens")
        return {**batch, "mask_position": masks.int().argmax(1), "right": self._right(items)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        rows = torch.arange(len(batch["right"]), device=batch["input_ids"].device)

        def keep_masked(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[rows, batch["mask_position"]][:, None]
            return output

        inputs = {k: v for k, v in batch.items() if k not in ("mask_position", "right")}
        with model.base_model.register_forward_hook(keep_masked):
            logits: Tensor = model(**inputs).logits
        return logits[:, 0, self.ids.to(logits.device)].float()


class TextReader(Reader):
    """The model writes: trained on the likelihood of the reference or on the scores of its own greedy answers.

    Args:
        tokenizer: of a causal language model.
        max_new_tokens: the longest answer that it may write, >= 1.
        max_length: most tokens of a prompt with its answer, >= max_new_tokens + 2.
    """

    main = "f1"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 32, max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length)
        if not 1 <= max_new_tokens <= max_length - 2:
            raise ValueError(
                f"`max_new_tokens` must be >= 1 and leave at least 2 of max_length={max_length} tokens to the prompt, got "
                f"{max_new_tokens}"
            )
        self.max_new_tokens = max_new_tokens

    def collate(self, items: Sequence[Item]) -> dict[str, object]:
        prompts = [self._fitted(ids, self.max_new_tokens) for ids in self._ids([item.prompt for item in items])]
        answered = [self._continued(item.prompt, [f" {item.references[0]}\n"]) for item in items]
        taught = self._left_padded([sequences[0] for sequences, _ in answered])
        return {
            **self._left_padded(prompts),
            "answered_ids": taught["input_ids"],
            "answered_mask": taught["attention_mask"],
            "lengths": torch.tensor([lengths[0] for _, lengths in answered]),
            "references": [frozenset(item.references) for item in items],  # no list: those of texts would be taken for columns
        }

    def answers(self, model: nn.Module, batch: Batch) -> list[str]:
        """B texts."""
        return generate_answers(model, self.tokenizer, batch, self.max_new_tokens)

    def objectives(self) -> dict[str, Objective]:
        def likelihood(model: nn.Module, batch: Batch) -> Tensor:
            taught = {"input_ids": batch["answered_ids"], "attention_mask": batch["answered_mask"]}
            return -answer_log_likelihood(model, taught, batch["lengths"])

        return {
            "likelihood": likelihood,
            "f1": lambda model, batch: text_errors(self.answers(model, batch), _lists(batch), token_f1),
            "exact_match": lambda model, batch: text_errors(self.answers(model, batch), _lists(batch), exact_match),
        }

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        answers = self.answers(model, batch)
        scores = {"f1": token_f1, "exact_match": exact_match}
        return {name: 1 - text_errors(answers, _lists(batch), score) for name, score in scores.items()}


def _lists(batch: Batch) -> list[list[str]]:
    return [list(references) for references in batch["references"]]


def reader_for(task: TextTask, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> Reader:
    """The reader of a task's kind; words of several tokens are read as options."""
    if task.kind == "mask":
        return MaskReader(tokenizer, task.words, max_length)
    if task.kind == "text":
        return TextReader(tokenizer, task.max_new_tokens, max_length)
    if task.kind == "words":
        stem = task.template.rsplit("}", 1)[-1]
        try:
            return WordReader(tokenizer, task.words, stem or "A film.", max_length)
        except ValueError:
            return OptionReader(tokenizer, max_length)
    return OptionReader(tokenizer, max_length)
