"""The model and the batch that are planned for: shapes without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...offload import entries_of, rows_together
from ...space.together import SMALL
from ..bench.models import ARCHITECTURES, check_name, random_model
from ..bench.workload import Spec, Workload

_META = torch.device("meta")


class Imagined(Workload):
    """A workload whose tensors have no data, for one method.

    Args:
        spec: The workload; its model may be a named architecture, a folder or a Hugging Face id.
        change: made to the model first, such as adapters.

    Raises:
        OSError: no such model.
    """

    def __init__(self, spec: Spec, change: Callable[[nn.Module], object] | None = None) -> None:
        self.spec, self.device, self.kind = spec, torch.device("cpu"), None
        self.model = _model(spec)
        if change is not None:
            with _META:
                change(self.model)

    @contextmanager
    def without_data(self) -> Iterator[None]:
        """Context in which the model's tensors are on the CPU, and no tensor takes memory."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            made: dict[int, Tensor] = {}  # a tied one stays one
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        module._parameters[name] = made.setdefault(  # type: ignore[assignment]
                            id(parameter), nn.Parameter(empty, parameter.requires_grad)
                        )
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
            yield

    def batch_of(self, copies: int = 1) -> dict[str, Tensor]:
        """The batch, so many times: texts of several lengths, so with a mask."""
        examples, length = copies * self.spec.batch, self.spec.length
        ids, mask = (torch.zeros(examples, length, dtype=torch.int64) for _ in range(2))
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(examples, dtype=torch.int64)}

    @property
    def weights(self) -> int:
        """Bytes of the model."""
        return sum(t.nbytes for t in {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}.values())

    @property
    def moved(self) -> list[int]:
        """Bytes of each matrix, or part of one, that offload moves."""
        rows, cpu = rows_together(self.model), torch.device("cpu")
        large = {name: p for name, p in self.model.named_parameters() if p.numel() > SMALL}
        return [entry.nbytes for name, p in large.items() for entry in entries_of(name, p, cpu, rows.get(name))]


def _model(spec: Spec) -> nn.Module:
    if spec.model in ARCHITECTURES:
        return random_model(ARCHITECTURES[spec.model], spec.stored_dtype, _META, spec.length)
    check_name(spec.model)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(spec.model, local_files_only=Path(spec.model).exists())
    except (OSError, ValueError) as error:
        raise OSError(f"{error}\nOr a shape, no download: --model {' | '.join(ARCHITECTURES)}") from error
    with _META:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=spec.stored_dtype)
    return model.eval()
