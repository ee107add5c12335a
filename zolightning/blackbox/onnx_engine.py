"""ONNX graphs in ONNX Runtime, their trained tensors made inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .engine import EngineError

if TYPE_CHECKING:
    from onnx import ModelProto

_NEEDED = "needs ONNX Runtime, which is not installed; run `pip install 'zolightning[onnx]'`"


def initializers_to_inputs(model: ModelProto, names: Sequence[str]) -> dict[str, Tensor]:
    """Turn some of a graph's stored tensors into inputs of the graph, in place.

    Args:
        model: any ONNX model.
        names: of float initializers.

    Returns:
        name → the values that the graph stored.

    Raises:
        ValueError: a name that no initializer of the graph has, or one that holds no floats.
    """
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if unknown := [name for name in names if name not in stored]:
        raise ValueError(f"the graph has no initializer {unknown[0]!r}; it has {', '.join(sorted(stored)) or 'none'}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`trained` must name at least one initializer, each once; got {list(names)}")
    values, known = {}, {value.name for value in model.graph.input}
    for name in names:
        array = np.array(numpy_helper.to_array(stored[name]))
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"the initializer {name!r} holds {array.dtype}; perturbations need float16, float32 or float64")
        values[name] = torch.from_numpy(array)
        if name not in known:
            model.graph.input.append(helper.make_tensor_value_info(name, stored[name].data_type, array.shape))
        model.graph.initializer.remove(stored[name])
    return values


class OnnxEngine:
    """A graph whose trained tensors are inputs, run by ONNX Runtime.

    A batch is a mapping with the graph's other inputs by name; other entries, such as labels, are ignored.

    Args:
        model: a file, or a model.
        trained: names of the initializers that are trained.
        output: name of the output that is given; None: the first.
        threads: of ONNX Runtime.

    Raises:
        ImportError: ONNX Runtime is not installed.
        FileNotFoundError, EngineError: no such file, or one that ONNX Runtime cannot run.
        ValueError: see :func:`initializers_to_inputs`; or an unknown output.
    """

    by_example = False

    def __init__(
        self, model: str | Path | ModelProto, trained: Sequence[str], output: str | None = None, threads: int = 1
    ) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"OnnxEngine {_NEEDED}") from error
        graph, name = _loaded(model), str(model) if isinstance(model, (str, Path)) else model.graph.name
        self.identity = f"{name} ({hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:16]})"
        self.numbers = initializers_to_inputs(graph, trained)
        outputs = [value.name for value in graph.graph.output]
        if output is not None and output not in outputs:
            raise ValueError(f"`OnnxEngine(output={output!r})` is unknown; the graph has {', '.join(outputs)}")
        self.output, self._name = output or outputs[0], name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        try:
            onnx.checker.check_model(graph)
            self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own kinds have no common base
            raise EngineError(f"ONNX Runtime cannot run {name}: {error}") from error
        stored = {value.name for value in self._session.get_overridable_initializers()}
        self._inputs = {v.name for v in self._session.get_inputs()} - set(self.numbers) - stored

    def prepare(self, batch: Mapping[str, Tensor]) -> bool:
        """There is nothing to compute: the whole graph runs in each probe."""
        return False

    def run(self, numbers: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The graph's output."""
        if missing := self._inputs - set(batch):
            raise ValueError(f"the batch lacks {', '.join(sorted(missing))}, which the graph {self._name} takes as inputs")
        feed: dict[str, Any] = {name: batch[name].numpy() for name in self._inputs}
        feed |= {name: value.numpy() for name, value in numbers.items()}
        try:
            (out,) = self._session.run([self.output], feed)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self._name}: {error}") from error
        return torch.from_numpy(np.asarray(out))

    def __repr__(self) -> str:
        return f"OnnxEngine({self._name!r}, {[*self.numbers]})"


def _loaded(model: str | Path | ModelProto) -> ModelProto:
    """A copy of the model, so that the caller's stays as it is."""
    import onnx

    if isinstance(model, (str, Path)):
        if not Path(model).is_file():
            raise FileNotFoundError(f"there is no ONNX file {model}")
        try:
            return onnx.load(model)
        except Exception as error:  # protobuf's errors, or a lost file of external data
            raise EngineError(f"{model} is damaged or no ONNX model: {error}") from error
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
