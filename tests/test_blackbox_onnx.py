"""ONNX graphs trained in ONNX Runtime, beside the same networks in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.box import BlackBox
from zolightning.blackbox.engine import EngineError, EngineModel
from zolightning.blackbox.onnx_engine import OnnxEngine, initializers_to_inputs
from zolightning.ledger import read, replay

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
pytest.importorskip("onnxscript", reason="needs onnxscript, with which PyTorch exports a graph")


class Text(nn.Module):
    """A bag of words and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.words(ids).mean(1))))


class Vision(nn.Module):
    """Two convolutions and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2)
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.second(self.first(image).relu()).relu().flatten(1))


def example(kind: str, size: int = 12) -> dict[str, Tensor]:
    if kind == "text":
        ids = torch.randint(50, (size, 7))
        return {"ids": ids, "labels": (ids[:, 0] < 25).long()}
    image = torch.randn(size, 1, 8, 8)
    return {"image": image, "labels": (image.mean((1, 2, 3)) > 0).long()}


@pytest.fixture(scope="module", params=["text", "vision"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    kind = request.param
    torch.manual_seed(1)
    net = {"text": Text, "vision": Vision}[kind]().eval()
    path = tmp_path_factory.mktemp("onnx") / f"{kind}.onnx"
    name = {"text": "ids", "vision": "image"}[kind]
    torch.onnx.export(
        net, (example(kind)[name],), path, input_names=[name], dynamic_shapes=({0: torch.export.Dim("examples")},),
        dynamo=True, verbose=False, external_data=False, optimize=False,
    )  # fmt: skip
    return kind, net, path


def engine_of(net: nn.Module, path: Path) -> OnnxEngine:
    return OnnxEngine(path, [name for name, _ in net.named_parameters()])


def test_projected_gradients_are_torchs(exported: tuple[str, nn.Module, Path]) -> None:
    kind, net, path = exported
    batch, model = example(kind), EngineModel(engine_of(net, path))
    *inputs, labels = batch.values()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    assert all(torch.equal(weights[name], value) for name, value in model.engine.numbers.items())
    assert model.prepare(batch) is None  # so it counts as no forward

    def both(offset: float, z: dict[str, Tensor]) -> tuple[float, float]:
        moved = {name: w + offset * z[name] for name, w in weights.items()}
        outs = functional_call(net, moved, tuple(inputs)), model.engine.run(moved, batch)
        a, b = (F.cross_entropy(out.double(), labels).item() for out in outs)
        return a, b

    pairs = []
    for _ in range(30):
        z = {name: torch.randn_like(w) for name, w in weights.items()}
        (a_up, b_up), (a_down, b_down) = both(1e-2, z), both(-1e-2, z)
        pairs.append((a_up - a_down, b_up - b_down))
    assert torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1] >= 0.99
    torch.testing.assert_close(model(batch), net(*inputs), rtol=1e-4, atol=1e-5)


def test_an_engine_can_stand_behind_trained_layers(exported: tuple[str, nn.Module, Path]) -> None:
    """As a black box, whose backward pass asks ONNX Runtime: the gradient is autograd's."""
    kind, net, path = exported
    if kind == "text":
        pytest.skip("word numbers have no gradient")
    engine, batch = engine_of(net, path), example(kind, 3)
    box = BlackBox(lambda rows: engine.run(dict(engine.numbers), {"image": rows}), estimator="cge", mu=1e-3)
    found = []
    for model in (box, net):
        image = batch["image"].clone().requires_grad_()
        F.cross_entropy(model(image), batch["labels"]).backward()
        assert image.grad is not None
        found.append(image.grad.flatten())
    assert F.cosine_similarity(*found, 0) > 0.99
    assert box.queries == 3 * (1 + 64)


class Task(ZOMixin, pl.LightningModule):
    def __init__(self, net: nn.Module, engine: bool) -> None:
        super().__init__()
        self.net, self.engine = net, engine

    def zo_prepare(self, batch: Any) -> Any:
        return self.net.prepare(batch) if self.engine else None  # type: ignore[operator]

    def zo_objective(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.net(batch) if self.engine else self.net(*list(batch.values())[:-1])
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def fit(module: Task, batch: dict[str, Tensor], steps: int) -> Task:
    trainer = pl.Trainer(
        strategy=ZOStrategy(PLAIN, num_queries=4), max_steps=steps, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch], None))
    return module


def test_training_inside_the_engine_is_training(exported: tuple[str, nn.Module, Path]) -> None:
    """Equal names and shapes get equal noise, so the weights end where PyTorch's end."""
    kind, net, path = exported
    batch, start = example(kind), {k: v.clone() for k, v in net.state_dict().items()}
    twin = type(net)()
    twin.load_state_dict(start)
    inside = fit(Task(EngineModel(engine_of(net, path)), True), batch, 8).net
    outside = fit(Task(twin, False), batch, 8).net
    for ours, theirs, before in zip(inside.parameters(), outside.parameters(), start.values(), strict=True):
        assert not torch.equal(theirs, before)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * (theirs - before).abs().max().item())


def test_the_ledger_gives_the_trained_numbers_to_the_bit(exported: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    kind, net, path = exported
    module, base = (Task(EngineModel(engine_of(net, path)), True) for _ in range(2))
    trainer = pl.Trainer(
        strategy=ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"), max_steps=5, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([example(kind)] * 5, None))
    rebuilt = dict(base.named_parameters())
    replay(read(tmp_path / "ledger.zo"), rebuilt)
    for name, parameter in module.named_parameters():
        assert torch.equal(rebuilt[name], parameter)


def test_numbers_go_back_into_their_own_model_alone(exported: tuple[str, nn.Module, Path]) -> None:
    kind, net, path = exported
    model = EngineModel(engine_of(net, path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    again = EngineModel(engine_of(net, path))
    again.load_state_dict(model.state_dict())
    batch = example(kind)
    assert torch.equal(again(batch), model(batch))
    other = onnx.load(path)
    other.graph.name = "another"
    with pytest.raises(ValueError, match="load the model that they belong to"):
        EngineModel(OnnxEngine(other, [*model.engine.numbers])).load_state_dict(model.state_dict())


def test_the_models_of_the_caller_stay_as_they_are(exported: tuple[str, nn.Module, Path]) -> None:
    _, _, path = exported
    graph = onnx.load(path)
    before = graph.SerializeToString()
    OnnxEngine(graph, ["head.weight"])
    assert graph.SerializeToString() == before


def test_bad_input_is_refused(exported: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    kind, _, path = exported
    with pytest.raises(ValueError, match="no initializer 'tail'; it has "):
        OnnxEngine(path, ["tail"])
    with pytest.raises(ValueError, match="at least one initializer, each once"):
        OnnxEngine(path, ["head.bias", "head.bias"])
    with pytest.raises(ValueError, match="at least one initializer"):
        OnnxEngine(path, [])
    with pytest.raises(ValueError, match=r"output='tail'.*is unknown"):
        OnnxEngine(path, ["head.bias"], output="tail")
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        OnnxEngine(tmp_path / "none.onnx", ["head.bias"])
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:-200])
    with pytest.raises((EngineError, ValueError)):
        OnnxEngine(damaged, ["head.bias"])
    model = EngineModel(OnnxEngine(path, ["head.bias"]))
    batch = example(kind)
    with pytest.raises(ValueError, match="the batch lacks"):
        model({"labels": batch["labels"]})
    with pytest.raises(ValueError, match="whose dimension 0 are the examples"):
        model({"labels": 3})
    with pytest.raises(EngineError, match="ONNX Runtime failed"):
        model({name: value.double() for name, value in batch.items()})
    with pytest.raises(ValueError, match="holds int64"):
        initializers_to_inputs(_with_integers(), ["shape"])


def _with_integers() -> Any:
    from onnx import TensorProto, helper

    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [6] if n == "x" else [2, 3]) for n in ("x", "y")]
    return helper.make_model(helper.make_graph([node], "integers", infos[:1], infos[1:], [shape]))


def test_a_vector_of_the_graph_is_trained_by_the_whole_batch(exported: tuple[str, nn.Module, Path]) -> None:
    """No example can read a bias of its own inside a graph; the default recipe then shares a direction."""
    kind, _, path = exported
    module = Task(EngineModel(OnnxEngine(path, ["head.bias"])), True)
    before = [p.clone() for p in module.parameters()]
    trainer = pl.Trainer(
        strategy=ZOStrategy(), max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([example(kind)] * 3, None))
    assert not torch.equal(before[0], next(module.parameters()))
