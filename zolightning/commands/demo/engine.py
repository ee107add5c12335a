"""The demo's row inside llama.cpp: the same task on the model's own 4-bit file."""

from __future__ import annotations

from torch import Tensor

from ...blackbox.control_vectors import ControlVectors
from ...blackbox.engine import EngineModel
from ...blackbox.label_words import label_words
from ...blackbox.llamacpp import LlamaModel, library
from ...data import Encoded, PromptTemplate, Splits
from ...data.model import default_gguf
from ...data.text import Example
from ...records.memory import rss
from ...types import Batch
from .methods import Method
from .module import MakeOptimizer, PromptClassifier, PromptData

KNOWN = 256  # training texts by which label words are chosen


class EngineClassifier(PromptClassifier):
    """The same classifier, whose model llama.cpp runs; vectors at the prompt's last position are trained.

    Args:
        model: gives the verbalizers' logits.
        make_optimizer, decay_steps: see :class:`PromptClassifier`.
        outside: bytes that the engine holds.
    """

    def __init__(self, model: EngineModel, make_optimizer: MakeOptimizer, decay_steps: int, outside: int) -> None:
        super().__init__(model, model.numbers["vectors"].new_zeros(0), make_optimizer, decay_steps)
        self.outside = outside

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, labels), float32."""
        logits: Tensor = self.model(batch)
        return logits

    def zo_prepare(self, batch: dict[str, Tensor]) -> Batch:
        return self.model.prepare(batch)  # type: ignore[operator]


def missing(model: str | None) -> str:
    """Why this row cannot be run; "" when it can.

    Args:
        model: as the demo was told; None: its own, of which there is a GGUF file.
    """
    if model is not None:
        return f"it trains inside the GGUF file of the demo's own model, and --model is {model}"
    try:
        library()
    except ImportError as error:
        return str(error)
    return ""


def build_engine(
    method: Method, texts: Splits, prompt: PromptTemplate, max_length: int, seed: int, offline: bool
) -> tuple[EngineClassifier, PromptData]:
    """The model in llama.cpp, and the texts in its tokens."""
    held = rss()
    gguf = LlamaModel(default_gguf(offline=offline))

    def encoded(part: list[Example]) -> list[Encoded]:
        return [Encoded(gguf.tokens(prompt.render(example.text))[-max_length:], example.label) for example in part]

    train, validation, test = map(encoded, texts[:3])
    prompts, labels = [example.input_ids for example in train[:KNOWN]], [example.label for example in train[:KNOWN]]
    words = [[gguf.tokens(prompt.render("A film.") + word)[-1]] for word in prompt.verbalizers]
    if all(labels.count(label) > 1 for label in range(len(words))):
        words = label_words(gguf, prompts, labels)
    vectors = ControlVectors(gguf, prompts[:16], outputs=words, sequences=32, length=max_length)
    data = PromptData(train, validation, test, 0, method.batch_size, seed)
    decay = method.steps if method.decay else 0
    return EngineClassifier(EngineModel(vectors), method.make_optimizer(), decay, rss() - held), data
