"""Models that run outside of PyTorch and take the numbers that are trained as inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..probing.batches import batch_examples
from ..types import Batch


class EngineError(RuntimeError):
    """An engine did not load its model, did not run it, or gave something else than it should."""


class Engine(Protocol):
    """A model that something else than PyTorch runs. A new engine is a class with these five.

    Its outputs are a function of the numbers and the batch only: state between calls only saves time.
    """

    identity: str
    """Names the model, so that numbers trained with it are not loaded into another."""

    @property
    def numbers(self) -> Mapping[str, Tensor]:
        """The trained numbers: name → their first values; an attribute will do."""

    by_example: bool
    """Whether ``run`` takes a row of numbers for each example, (B, n) for a vector of n; else each in its own shape."""

    def prepare(self, batch: Batch) -> bool:
        """Compute the part that does not depend on the numbers, and keep it for the calls of ``run`` on this batch.

        Returns:
            Whether there is such a part, which then counts as a forward pass.
        """

    def run(self, numbers: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(B, …): the model's outputs for the batch's examples at these numbers."""


class EngineModel(nn.Module):
    r"""An engine's model as a module whose parameters are the numbers that the engine takes as inputs.

    ::

        class Classifier(ZOMixin, L.LightningModule):
            def zo_prepare(self, batch):
                return self.model.prepare(batch)

            def zo_objective(self, batch):
                return F.cross_entropy(self.model(batch), batch["labels"], reduction="none")

    The outputs carry no gradient: train it under :class:`~zolightning.ZOStrategy`, whose probes change the parameters that
    ``forward`` reads. Forward passes in an inference engine train vectors and adapters; MobiZO, arXiv:2409.15520.

    Args:
        engine: see :class:`Engine`.

    Raises:
        ValueError: the engine has no numbers to train, or two whose names come to the same.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self._names = {re.sub(r"\W", "_", name): name for name in engine.numbers}
        if not self._names or len(self._names) < len(engine.numbers):
            raise ValueError(f"the engine must train some numbers, each under a name of its own; got {[*engine.numbers]}")
        self.numbers = nn.ParameterDict()  # filled one by one: made from a dictionary, it would sort the names
        for key, name in self._names.items():
            self.numbers[key] = nn.Parameter(engine.numbers[name].clone())

    def prepare(self, batch: Batch) -> Batch | None:
        """The batch, when the engine has computed the part that all probes of a step share; None: it has no such part."""
        return batch if self.engine.prepare(batch) else None

    def forward(self, batch: Batch) -> Tensor:
        """The engine's outputs (B, …) at the parameters as they are read now.

        Raises:
            EngineError: the engine failed.
            ValueError: the batch holds no tensor whose dimension 0 are its examples.
        """
        examples = batch_examples(batch)
        if examples is None:
            raise ValueError("an engine needs a batch with a tensor whose dimension 0 are the examples, and found none")
        outputs = self.engine.run({name: self._read(key, examples) for key, name in self._names.items()}, batch)
        if outputs.shape[:1] != (examples,):
            raise EngineError(f"{self.engine} gave outputs of shape {tuple(outputs.shape)} for {examples} examples")
        return outputs

    def _read(self, key: str, examples: int) -> Tensor:
        parameter: Tensor = self.numbers[key]
        if not self.engine.by_example:
            return parameter.detach()
        # an operation with one row for each example, so that a probe can give each a direction of its own
        return (torch.zeros(examples, 1, device=parameter.device) + parameter).detach()

    def get_extra_state(self) -> dict[str, str]:
        return {"model": self.engine.identity}

    def set_extra_state(self, state: Mapping[str, str]) -> None:
        if state["model"] != self.engine.identity:
            raise ValueError(
                f"these numbers were trained with the model {state['model']}, and this engine runs {self.engine.identity}; "
                "load the model that they belong to"
            )
