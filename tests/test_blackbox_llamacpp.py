"""Control vectors trained inside llama.cpp, beside the same model in PyTorch.

They are skipped where llama.cpp cannot be used: `pip install 'zolightning[llamacpp]'` builds it. Without a build:
see zolightning/blackbox/README.md.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from tiny_gguf import BLOCKS, BYTES, WIDTH, WORDS, tiny_llama, write_gguf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.control_vectors import ControlVectors, WrittenAnswers, export_control_vectors
from zolightning.blackbox.engine import EngineError, EngineModel
from zolightning.blackbox.label_words import label_words
from zolightning.blackbox.llamacpp import LlamaContext, LlamaModel, library
from zolightning.commands.demo.methods import GGUF
from zolightning.commands.demo.run import Task, run
from zolightning.data import FetchError
from zolightning.ledger import read, replay

try:
    library()
except ImportError as error:
    pytest.skip(f"llama.cpp cannot be used here: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return LlamaModel(write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


def prompts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(WORDS, (5 + n % 4,), generator=generator).tolist() for n in range(count)]


def batch_of(items: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, items))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in items]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in items]),
        "labels": torch.tensor([p[0] % 2 for p in items]),
    }


def engine(gguf: LlamaModel, **options: Any) -> ControlVectors:
    return ControlVectors(gguf, prompts(), **{"length": 16, "outputs": [3, 9], **options})


def test_label_words_are_those_that_tell_labels_apart_in_torch_too(gguf: LlamaModel) -> None:
    """By Welch's t of log-probabilities, computed here from the logits of PyTorch."""
    items = prompts(24)
    labels = [item[-1] % 3 for item in items]
    found = label_words(gguf, items, labels, words=3, likely=40)
    with torch.no_grad():
        chances = torch.stack([tiny_llama()(torch.tensor([item])).logits[0, -1] for item in items]).log_softmax(1).double()
    candidates = set(chances.mean(0).topk(42).indices.tolist())
    taken = {token for some in found for token in some}
    assert [len(some) for some in found] == [3, 3, 3] and len(taken) == 9 and taken <= candidates
    for label, some in enumerate(found):
        here = torch.tensor(labels) == label
        groups = chances[here], chances[~here]
        spread = sum(group.var(0, correction=0) for group in groups) / 2
        t = (groups[0].mean(0) - groups[1].mean(0)) / spread.sqrt()
        assert t[some[0]] >= t[some[1]] - 0.05 >= t[some[2]] - 0.1
        rest = [t[token] for token in chances.mean(0).topk(38).indices.tolist() if token not in taken]
        assert t[some[-1]] > max(rest) - 0.05
    assert label_words(gguf, items, labels, words=3, likely=40) == found
    for options, message in (
        ({"labels": labels[:-1]}, "got 23 labels"), ({"labels": [0] * 24}, r"of each kind \[24\]"),
        ({"labels": [5, *labels[1:]]}, "twice or more"), ({"words": 0}, "cannot choose 0 tokens"),
        ({"words": 14}, "cannot choose 14 tokens for each of 3 labels out of 40"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            label_words(gguf, items, **{"labels": labels, "words": 3, "likely": 40, **options})


def test_outputs_can_be_means_of_words(gguf: LlamaModel) -> None:
    one, mean, items = engine(gguf, outputs=[3, 9, 5]), engine(gguf, outputs=[[3, 9], 5]), prompts()
    rows = {"vectors": 0.3 * torch.randn(len(items), one.numbers["vectors"].numel())}
    three = one.run(rows, batch_of(items))
    expected = torch.stack((three[:, :2].mean(1), three[:, 2]), 1)
    torch.testing.assert_close(mean.run(rows, batch_of(items)), expected)


def test_the_script_without_torch_trains(tmp_path: Path) -> None:
    """It ends with an error if PyTorch is in its process."""
    model = write_gguf(tiny_llama(BYTES), tmp_path / "tiny.gguf")
    table = tmp_path / "texts.csv"
    table.write_text("text,label\n" + "".join(f'"{word}, I say",{n % 2}\n' for n, word in enumerate(["bad", "good"] * 4)))
    script = Path(__file__).parents[1] / "examples" / "gguf_without_torch.py"
    options = ["--batch", "4", "--queries", "1", "--steps", "2"]
    run = subprocess.run([sys.executable, script, model, table, table, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"after 2 steps of 4 texts: [\d.]+ %", run.stdout)
    assert float(re.search(r"memory of the whole process: (\d+) MiB", run.stdout)[1]) < 256  # type: ignore[index]


@contextmanager
def moved(model: nn.Module, rows: np.ndarray, positions: int | None) -> Iterator[None]:
    """The textbook: a hook behind each block from 1 on adds its row at the last positions."""

    def add(row: Tensor) -> Any:
        def hook(block: nn.Module, args: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[:, -(positions or 0) :] += row
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return hook

    blocks = model.model.layers[1:]
    handles = [block.register_forward_hook(add(torch.from_numpy(row))) for block, row in zip(blocks, rows, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def textbook(model: nn.Module, made: ControlVectors, vectors: Tensor, items: list[list[int]]) -> Tensor:
    """Logits of each prompt run alone with its own vectors, in PyTorch."""
    found = []
    for row, item in zip(vectors, items, strict=True):
        with moved(model, made.rows(row.numpy()), made.positions):
            found.append(model(torch.tensor([item])).logits[0, -1, [3, 9]])
    return torch.stack(found)


@pytest.mark.parametrize("positions", [1, 2, None])
def test_logits_are_those_of_the_same_model_in_torch(gguf: LlamaModel, positions: int | None) -> None:
    made, items = engine(gguf, positions=positions), prompts()
    vectors = 0.3 * torch.randn(len(items), made.numbers["vectors"].numel())
    assert made.layers == [1, 2]
    for rows in (torch.zeros_like(vectors), vectors, vectors[:1].expand_as(vectors)):
        ours = made.run({"vectors": rows}, batch_of(items))
        torch.testing.assert_close(ours, textbook(tiny_llama(), made, rows, items), rtol=0, atol=2e-2)


def test_projected_gradients_are_torchs(gguf: LlamaModel) -> None:
    made, items, model = engine(gguf), prompts(), tiny_llama()
    labels, pairs = batch_of(items)["labels"], []
    for _ in range(12):
        z = 0.2 * torch.randn(len(items), made.numbers["vectors"].numel()).sign()
        ours = [F.cross_entropy(made.run({"vectors": s * z}, batch_of(items)), labels, reduction="none") for s in (1, -1)]
        theirs = [F.cross_entropy(textbook(model, made, s * z, items), labels, reduction="none") for s in (1, -1)]
        pairs.append(torch.stack((ours[0] - ours[1], theirs[0] - theirs[1])))
    assert torch.corrcoef(torch.cat(pairs, 1).double())[0, 1] >= 0.99


def test_scales_are_the_sizes_of_hidden_states(gguf: LlamaModel) -> None:
    made = engine(gguf, positions=2)
    with torch.no_grad():
        states = [tiny_llama().model(torch.tensor([p]), output_hidden_states=True).hidden_states for p in prompts()]
    sizes = [np.sqrt(np.mean([s[layer + 1][0, -2:].square().mean() for s in states])) for layer in made.layers]
    np.testing.assert_allclose(made.scales, sizes, rtol=1e-2)


def test_what_is_kept_changes_no_answer(gguf: LlamaModel) -> None:
    """More prompts than are kept, repeated ones, and another batch in between."""
    items = prompts(7)
    few, many = engine(gguf, sequences=2), engine(gguf, sequences=32)
    rows = (torch.arange(14) % 3)[:, None] * torch.full((1, few.numbers["vectors"].numel()), 0.1)
    batch = batch_of(items + items)
    assert EngineModel(many).prepare(batch) is batch  # which counts as a forward
    assert EngineModel(engine(gguf, positions=None)).prepare(batch) is None
    many.run({"vectors": rows[:3]}, batch_of(prompts(40)[30:33]))
    ours, theirs = few.run({"vectors": rows}, batch), many.run({"vectors": rows}, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(many.run({"vectors": rows}, batch), theirs)


class Classifier(ZOMixin, pl.LightningModule):
    def __init__(self, model: EngineModel) -> None:
        super().__init__()
        self.model = model

    def zo_prepare(self, batch: Any) -> Any:
        return self.model.prepare(batch)

    def zo_objective(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch), batch["labels"], reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(model: EngineModel, module: type[Classifier] = Classifier, **settings: Any) -> None:
    trainer = pl.Trainer(
        strategy=ZOStrategy("reft", seed=1, **settings), max_steps=15, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module(model), DataLoader([batch_of(prompts(8))] * 15, None))


@pytest.mark.parametrize("estimator", ["per_example", "spsa"])
def test_training_lowers_the_loss_and_repeats_to_the_bit(gguf: LlamaModel, estimator: str, tmp_path: Path) -> None:
    batch, (one, two, base) = batch_of(prompts(8)), (EngineModel(engine(gguf)) for _ in range(3))
    before = F.cross_entropy(one(batch), batch["labels"])
    fit(one, estimator=estimator, ledger=tmp_path / "ledger.zo")
    fit(two, estimator=estimator)
    assert F.cross_entropy(one(batch), batch["labels"]) < 0.7 * before
    assert torch.equal(one.numbers["vectors"], two.numbers["vectors"])
    replay(read(tmp_path / "ledger.zo"), dict(Classifier(base).named_parameters()))
    assert torch.equal(one.numbers["vectors"], base.numbers["vectors"])


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_in_torch_too(gguf: LlamaModel) -> None:
    made, items, model = engine(gguf, positions=2, length=24), prompts(), tiny_llama()
    vectors = 0.3 * torch.randn(len(items), made.numbers["vectors"].numel())
    answers = made.answers({"vectors": vectors}, batch_of(items), 5)
    for row, item, answer in zip(vectors, items, answers, strict=True):
        assert len(answer) == 5
        for n, token in enumerate(answer):
            made.positions = 2 + n  # the prompt's last two, and what was written
            with moved(model, made.rows(row.numpy()), made.positions):
                logits = model(torch.tensor([item + answer[:n]])).logits[0, -1]
            assert logits[token] > logits.max() - 0.05
    made.positions = 2
    assert made.answers({"vectors": vectors}, batch_of(items), 5) == answers
    with pytest.raises(ValueError, match=r"and 20 more do not fit into the engine's `length`, 24"):
        made.answers({"vectors": vectors}, batch_of(items), 20)
    with pytest.raises(ValueError, match="`tokens` must be >= 1, got 0"):
        made.answers({"vectors": vectors}, batch_of(items), 0)


def test_a_score_of_written_text_is_trained_on(gguf: LlamaModel) -> None:
    """The share of even tokens, which has no derivative."""

    def even(answers: list[list[int]], batch: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in answer) / len(answer) for answer in answers]

    class Writer(Classifier):
        def zo_objective(self, batch: Any) -> Tensor:
            return 1 - self.model(batch)

    model, batch = EngineModel(WrittenAnswers(engine(gguf, positions=2, length=24), even, 4)), batch_of(prompts(8))
    before = model(batch).mean()
    fit(model, module=Writer, num_queries=4)
    assert model(batch).mean() > before + 0.2
    for bad in (lambda answers, batch: [1.0], lambda answers, batch: [math.nan] * len(answers)):
        with pytest.raises(EngineError, match="must give 8 finite numbers, one for each answer"):
            EngineModel(WrittenAnswers(engine(gguf, length=24), bad, 4))(batch)


@pytest.mark.network
@pytest.mark.slow
def test_training_takes_the_memory_of_inference() -> None:
    """Each in a process of its own, beyond their libraries: the demo's file, label words and two steps."""
    script = Path(__file__).parents[1] / "examples" / "gguf_engine.py"
    run = subprocess.run([sys.executable, script, "--memory"], capture_output=True, text=True, check=False)
    if "FetchError" in run.stderr:
        pytest.skip("the demo's model cannot be fetched")
    assert run.returncode == 0, run.stderr
    assert float(re.search(r"training takes ([\d.]+) ×", run.stdout)[1]) <= 1.05  # type: ignore[index]


@pytest.mark.network
@pytest.mark.slow
def test_the_demos_own_file_trains(tmp_path: Path) -> None:
    """The demo's row, on 4 texts."""
    row = replace(GGUF, steps=1, batch_size=4, overrides={"num_queries": 1})
    try:
        found = run(
            Task(validation=4, test=4, validations=1, store=f"sqlite:///{tmp_path}/mlflow.db", out=str(tmp_path)), row, 0
        )
    except FetchError as error:
        pytest.skip(f"the demo's model cannot be fetched: {error}")
    assert found.examples == 4
    assert found.forward_passes == 3  # the text, and a pair of probes
    assert len(found.history) == 2
    assert found.weights > 90e6  # the file
    assert found.weights < found.peak_memory < 1e9


def test_the_exported_file_gives_the_trained_outputs(gguf: LlamaModel, tmp_path: Path) -> None:
    """Read as llama.cpp's own tools read it, and set by its binding."""
    made, items = engine(gguf, positions=None, layers=[1, 3]), prompts()
    vectors = torch.randn(made.numbers["vectors"].numel())
    ours = made.run({"vectors": vectors.expand(len(items), -1)}, batch_of(items))
    export_control_vectors(tmp_path / "vectors.gguf", made, vectors)

    data = np.zeros((BLOCKS - 1, WIDTH), np.float32)
    reader = GGUFReader(tmp_path / "vectors.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    for tensor in reader.tensors:
        name, _, layer = tensor.name.partition(".")
        assert name == "direction"
        data[int(layer) - 1] = tensor.data
    context, lib = LlamaContext(gguf, 1, 16), library()
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert lib.llama_set_adapter_cvec(context.handle, pointer, data.size, WIDTH, 1, BLOCKS) == 0
    for item, expected in zip(items, ours, strict=True):
        logits = torch.from_numpy(context.decode([(0, 0, item)], logits=True))[0, [3, 9]]
        context.forget(0)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="move the last 1 positions"):
        export_control_vectors(tmp_path / "no.gguf", engine(gguf), vectors)


def test_bad_input_is_refused_and_nothing_is_lost(gguf: LlamaModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        LlamaModel(tmp_path / "none.gguf")
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(gguf.path.read_bytes()[:-5000])
    (tmp_path / "words.gguf").write_text("no model")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "vectors.gguf").write_bytes(gguf.path.read_bytes()[:2000])
    for name in ("truncated", "words", "empty", "vectors"):
        with pytest.raises(EngineError, match="cannot load"):
            LlamaModel(tmp_path / f"{name}.gguf")
    for options, message in (
        ({"layers": [0, 1]}, r"must be in 1 … 3, got \[0, 1\]"),
        ({"layers": []}, r"must be in 1 … 3, got \[\]"),
        ({"positions": 0}, "`positions` must be >= 1, got 0"),
        ({"sequences": 0}, "`sequences` must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(gguf, **options)
    with pytest.raises(ValueError, match="at least one prompt"):
        ControlVectors(gguf, [])
    made, items = engine(gguf, positions=2), prompts()
    zeros = torch.zeros(len(items), made.numbers["vectors"].numel())
    before = made.run({"vectors": zeros}, batch_of(items))
    for bad in ([1], [1] * 17):
        with pytest.raises(ValueError, match="this engine takes 2 to 16"):
            made.run({"vectors": zeros[:2]}, batch_of([items[0], bad]))
    with pytest.raises(EngineError, match="failed with code"):
        made.run({"vectors": zeros[:1]}, batch_of([[1, 2, WORDS + 5, 3, 4]]))
    torch.testing.assert_close(made.run({"vectors": zeros}, batch_of(items)), before)
    state = EngineModel(made).state_dict()
    copy = tmp_path / "other.gguf"
    copy.write_bytes(gguf.path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="load the model that they belong to"):
        EngineModel(engine(LlamaModel(copy))).load_state_dict(state)
    with pytest.raises(ValueError, match="load the model that they belong to"):  # equal shapes, other blocks
        EngineModel(engine(gguf, positions=2, layers=[2, 3])).load_state_dict(state)
