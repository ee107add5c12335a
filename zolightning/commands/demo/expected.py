"""How long a demo will take, said before it begins: its arithmetic at the measured speed of a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...data import Encoded, common_ending
from ...methods.recipes import RECIPES
from .methods import Method
from .run import Task

_SHARE = 0.6  # of a lone product's speed that a run reaches, padding, attention, norms and updates counted in
_SHORT = 0.6  # of a forward, at least, in a probe of a prompt's end: it reads the text's keys and values, measured on AVX2
_PIECES = 1.5  # tokens of a word of English
_START = 10.0  # seconds in which a run's process loads libraries and model


@dataclass(frozen=True)
class Workload:
    """The settings on which the duration depends, in addition to the methods and the speed."""

    operations: float
    """Floating-point operations of the forward of one example."""
    ending: float
    """Share of an example's tokens that all prompts end with."""
    evaluated: int
    """Examples that a run looks at to validate and to test, text of other kinds counted as so many of them."""

    @staticmethod
    def of(task: Task, model: nn.Module, prompts: Sequence[Encoded], general: Sequence[str] = ()) -> Workload:
        """The workload of ``task`` on ``prompts`` like those that are trained on, and on ``general`` texts at the end."""
        tokens = sum(len(prompt.input_ids) for prompt in prompts) / len(prompts)
        head = getattr(model, "get_output_embeddings", lambda: None)()  # of its rows only the candidates are used
        layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        weights = sum(layer.weight.numel() for layer in layers)
        others = round(_PIECES * sum(len(text.split()) for text in general) / tokens)
        evaluated = task.validation * (1 + task.validations) + task.test + others
        return Workload(2.0 * weights * tokens, common_ending(prompts) / tokens, evaluated)

    def seconds(self, runs: Sequence[Method], flops: float) -> float:
        """Seconds that ``runs`` take, one after another, where a product does ``flops`` operations a second."""
        forwards = sum(m.steps * m.batch_size * self._forwards(m) + self.evaluated for m in runs)
        return forwards * self.operations / (_SHARE * flops) + _START * len(runs)

    def _forwards(self, method: Method) -> float:
        """A step's cost for each example, in forwards of it."""
        if method.recipe is not None:
            probes = 2.0 * RECIPES[method.recipe].override(**method.overrides).build_estimator(torch.float32).num_queries
            return 1.0 + max(self.ending, _SHORT) * probes if method.encodes_once else probes
        if method.probe:
            return 1.0
        if method.encodes_once:
            return 1.0 + 2.0 * max(self.ending, _SHORT)
        if method.lora:
            return 2.0  # the backward pass goes through the activations only
        return 4.0 if method.checkpointing else 3.0
