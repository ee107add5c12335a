"""The rows of examples/quantized.py, each on a tiny model: prepared, stepped once, and what it trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Task, fit, lm_loss, load_example, tiny_causal_lm, token_batches, weights

pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' 'accelerate>=1.0'")

from zolightning.adapt.interventions import intervene

pytestmark = pytest.mark.integration

EXAMPLE = load_example("quantized")
METHODS = {m.name: m for m in EXAMPLE.methods(steps=2, backprop_steps=2, batch_size=2, seeds=1)}
MOVED = {
    "zo": lambda name: True,
    "qzo-nf4": lambda name: name.endswith("scales"),
    "qzo-nf4-batch": lambda name: name.endswith("scales"),
    "qzo3": lambda name: name.endswith("scales"),
    "qzo-nf4-paper": lambda name: name.endswith("scales"),
    "qzo-int8": lambda name: name.endswith("scales"),
    "reft-nf4": lambda name: name.endswith("intervention.vectors"),
    "reft3": lambda name: name.endswith("intervention.vectors"),
    "lora-zo": lambda name: "lora_" in name,
    "qlora": lambda name: "lora_" in name,
    "zeroqat4": lambda name: name.endswith("proj.weight"),
    "zeroqat3": lambda name: name.endswith("proj.weight"),
    "zeroqat3-probes": lambda name: True,
}


def test_every_training_row_is_here() -> None:
    assert {name for name, method in METHODS.items() if method.steps} == set(MOVED)


@pytest.mark.parametrize("name", METHODS)
def test_row(name: str) -> None:
    method = METHODS[name]
    model = method.prepare(tiny_causal_lm("llama", 64), torch.bfloat16)
    if method.interventions:
        intervene(model, 2, {"input_ids": token_batches(1)[0]})
    assert torch.isfinite(lm_loss(model, token_batches(1)[0])).all()
    if not method.steps:
        return
    task = Task(model, lm_loss, lambda p: method.make_optimizer()([q for q in p if q.requires_grad]))
    before = weights(task)
    fit(task, token_batches(2), method.strategy())
    moved = {n for n, v in weights(task).items() if n not in before or not torch.equal(v, before[n])}
    assert moved
    assert all(MOVED[name](n) for n in moved), moved


def test_gradients_come_through_after_an_evaluation() -> None:
    model, ids = METHODS["qlora"].prepare(tiny_causal_lm("llama", 64), torch.bfloat16), token_batches(1)[0]
    with torch.no_grad():
        model.eval()(ids)
    lm_loss(model.train(), ids).mean().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    twin = METHODS["qlora"].prepare(tiny_causal_lm("llama", 64), torch.bfloat16)
    lm_loss(twin.train(), ids).mean().backward()
    for name, p in twin.named_parameters():
        if name in adapters:
            assert torch.equal(p.grad, adapters[name].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--help"], 0, "python examples/quantized.py --methods"),
        (["--methods", "qzo"], 2, "unknown methods qzo; there are zero-shot, zo,"),
        (["--seeds", "0"], 2, "--steps, --batch-size and --seeds must be >= 1, got 5, 16 and 0"),
    ],
)
def test_command_line(
    options: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.__file__, *options])
    with pytest.raises(SystemExit) as stop:
        EXAMPLE.main()
    assert stop.value.code == code
    assert message in "".join(capsys.readouterr())


def test_a_result_is_kept_for_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs that come to nothing but a result; the rows that start from another's weights bring it."""
    made: list[str] = []

    def run_alone(task: Any, method: Any, seed: int, threads: int | None) -> Any:
        made.append(f"{method.name}-{seed}")
        if method.weights and not method.after:
            method.weights.touch()
        result = EXAMPLE.Result(method.name, method.title, seed, 0.5, 1.0, 1, 1.0, 2, 2, history=[])
        result.save(tmp_path / "runs" / f"{made[-1]}.json")
        return result

    def runs(*options: str) -> list[str]:
        made.clear()
        monkeypatch.setattr(
            sys, "argv", [EXAMPLE.__file__, "--out", str(tmp_path), "--methods", "zero-shot", "zo-ptq4", *options]
        )
        EXAMPLE.main()
        return sorted(made)

    monkeypatch.setattr(EXAMPLE, "run_alone", run_alone)
    monkeypatch.setattr(EXAMPLE, "prepare", lambda *_: None)
    every = ["zero-shot-0", "zo-0", "zo-ptq4-0"]
    assert runs() == every
    assert runs() == []
    assert runs("--seeds", "2") == ["zo-1", "zo-ptq4-1"]
    assert runs("--steps", "7") == every[1:]
    assert runs("--steps", "7") == []
    for changed in (["--test", "50"], ["--model", "other"], ["--max-length", "64"], ["--threads", "1"]):
        assert runs(*changed) == every
    assert runs("--batch-size", "8") == every
    (tmp_path / "runs" / "zo-0.safetensors").unlink()
    assert "zo-0" in runs("--batch-size", "8")
    (tmp_path / "runs" / "zero-shot-0.settings").unlink()
    assert runs("--batch-size", "8") == ["zero-shot-0"]
