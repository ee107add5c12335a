"""``zolightning plan``: predictions beside what steps really took, and the method that it says to take.

A measured peak is that of PyTorch's CPU allocator, as profilers in all threads record each allocation of a real set-up and
two real steps, plus the weights that were there before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from zolightning import Session, ZOConfig
from zolightning.cli import main
from zolightning.commands.bench import methods as bench
from zolightning.commands.bench.workload import Spec, Workload
from zolightning.commands.plan.main import Limits, Planned, advice, plan
from zolightning.commands.plan.rows import ROWS, Need, _with_vectors, with_adapters
from zolightning.engine.deferred import Deferred
from zolightning.methods.recipes import REFT
from zolightning.offload import Offload, attach
from zolightning.records.memory import tensor_bytes

BY_NAME = {row.name: row for row in ROWS}


def spec(model: str, batch: int, length: int, logits: Any = "last", dtype: str = "fp32") -> Spec:
    return Spec(model, batch, length, dtype, None, logits, "cpu", 1)


def vectors(work: Workload, gradient: bool) -> bench.Running:
    _with_vectors(work.model, 4)
    work.shell = lambda: work.model  # type: ignore[method-assign]  # hooks survive no copy of the weights
    return bench._descent(work, work.model, AdamW) if gradient else bench.zeroth_order(work, REFT)


def qlora(work: Workload) -> bench.Running:
    with_adapters(work.model.requires_grad_(False))
    return bench._descent(work, work.model, AdamW)


REAL: dict[str, bench.Method] = {
    "adamw": bench.METHODS["backprop-adamw"],
    "sgd": bench.METHODS["backprop-sgd"],
    "checkpointed": bench.METHODS["backprop-checkpointed"],
    "lora": bench.METHODS["lora"],
    "qlora": bench.Method("qlora", qlora, plain=True, kind="nf4"),
    "exact-vectors": bench.Method("exact-vectors", partial(vectors, gradient=True)),
    "zo": bench.METHODS["spsa-rademacher"],
    "qzo": bench.METHODS["qzo-nf4"],
    "vectors": bench.Method("vectors", partial(vectors, gradient=False)),
}


def workload(method: bench.Method, where: Spec) -> Workload:
    work = method.workload(where)
    mask = torch.ones_like(work.batch["input_ids"])
    mask[0, :2] = 0  # a shorter text
    work.batch["attention_mask"] = mask
    return work


def allocated(run: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator held at most while it ran, in all threads that it began and ended.

    The profiler of today sees one thread's memory; the one before it can be had in each.
    """
    settings = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    found: list[Any] = []

    def watched(work: Callable[..., object]) -> Callable[..., object]:
        def watch(*args: object) -> object:
            _enable_profiler_legacy(settings)
            try:
                return work(*args)
            finally:
                found.extend(event for events in _disable_profiler_legacy() for event in events)

        return watch

    before = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", watched(threading.Thread.run))
        kept = watched(run)()
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
    del kept
    changes = [(found[0].cpu_elapsed_us(e), e.cpu_memory_usage()) for e in found if e.kind() == "memory_alloc"]
    return max(accumulate(size for _, size in sorted(changes, key=itemgetter(0))))


def measured(name: str, where: Spec) -> int:
    method = REAL[name]
    work = workload(method, where)
    states = [p.quant_state.absmax for p in work.model.parameters() if hasattr(p, "quant_state")]
    there = tensor_bytes([*work.model.parameters(), *work.model.buffers(), *(states if name == "qlora" else [])])

    def run() -> bench.Running:
        running = method.setup(work)  # which exposes QZO's scales: new memory, in the place of that which was there
        running.step(bench.LR)
        running.step(bench.LR)
        return running

    return there + allocated(run)


QUICK = [("tiny-llama", 4, 128, "last", "zo"), ("tiny-llama", 4, 128, "full", "sgd")]


@pytest.mark.parametrize(("model", "batch", "length", "logits", "name"), QUICK)
def test_a_prediction_is_within_5_percent(model: str, batch: int, length: int, logits: str, name: str) -> None:
    where = spec(model, batch, length, logits)
    assert BY_NAME[name].need(where).device == pytest.approx(measured(name, where), rel=0.05)


MANY = [("tiny-llama", 4, 128, logits, name) for logits in ("last", "full") for name in REAL]
LARGER = [(model, 4, 64, "last", name) for model in ("opt-125m", "smollm2-135m") for name in ("zo", "adamw", "lora", "qzo")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "batch", "length", "logits", "name"), MANY + LARGER)
def test_predictions_are_within_5_percent(model: str, batch: int, length: int, logits: str, name: str) -> None:
    """``pytest tests/test_plan.py -m slow -s`` prints predicted ÷ measured; two CPU minutes."""
    where = spec(model, batch, length, logits)
    predicted, found = BY_NAME[name].need(where).device, measured(name, where)
    print(f"{model} {batch}x{length} {logits} {name}: {predicted / 1e6:.2f} / {found / 1e6:.2f} MB = {predicted / found:.3f}")
    assert predicted == pytest.approx(found, rel=0.05)


def offloaded_peak(where: Spec) -> tuple[int, int]:
    """(bytes at most, in the allocator and a full pool; bytes that a step reads)."""
    work = workload(REAL["zo"], where)
    config = ZOConfig(estimator="spsa", structure="dense", select="all", normalize=False, seed=0)
    store = attach(work.model, Offload("disk"), work.device, Path("work"))
    here = tensor_bytes(p for p in work.model.parameters() if type(p) is nn.Parameter)

    def run() -> None:
        optimizer = SGD(work.model.parameters(), lr=1e-7)
        session = Session(work.model, optimizer, config, repeatable=True, apply=Deferred(store))
        store.start()
        try:
            for _ in range(2):
                session.estimate(work.loss(work.model), work.batch)
                session.update()
        finally:
            session.close()
            store.stop()

    most = allocated(run)
    print(f"{store.most_in_memory} of {store.pool} bytes of the pool were used")  # fewer where reading ahead comes late
    assert store.most_in_memory <= store.pool
    return here + most + store.pool, sum(entry.nbytes for entry in store.entries)


@pytest.mark.slow
def test_offload_is_predicted_within_5_percent() -> None:
    where = spec("smollm2-135m", 4, 128)  # above 256 numbers: two forwards, in lockstep
    found, away = offloaded_peak(where)
    need = BY_NAME["zo-disk"].need(where)
    print(f"zo-disk: {need.device / 1e6:.2f} / {found / 1e6:.2f} MB = {need.device / found:.3f}")
    assert need.device == pytest.approx(found, rel=0.05)
    assert need.read == need.written == away


def test_offload_needs_two_matrices_its_activations_and_no_vocabulary() -> None:
    small = spec("opt-125m", 2, 8)
    resident, disk, cpu = (BY_NAME[name].need(small) for name in ("zo", "zo-disk", "zo-cpu"))
    largest = 3072 * 768 * 4
    assert 2 * largest <= disk.device <= 4 * largest < 50272 * 768 * 4 < resident.device
    assert disk.read == disk.written == cpu.host
    assert disk.disk == 2 * disk.written
    assert disk.host == cpu.disk == 0
    layers = 85e6  # weights of linear layers; both forwards run in one batch, and the head sees one position of each text
    assert 2 * 2 * 16 * layers < disk.flops == resident.flops < 1.2 * 2 * 2 * 16 * layers


def planned(**bytes_needed: int) -> list[Planned]:
    limits = Limits(device=100, host=100, disk=100)
    needs = {name: Need(device=size) for name, size in bytes_needed.items()}
    reasons = {name: "too little device" if limits.lacks(need) else "" for name, need in needs.items()}
    return [Planned(BY_NAME[name.replace("_", "-")], need, need.device, reasons[name]) for name, need in needs.items()]


@pytest.mark.parametrize(
    ("bytes_needed", "said"),
    [
        ({"adamw": 90, "lora": 50, "zo": 20}, "Take AdamW: backprop fits and is the better choice"),
        ({"adamw": 400, "lora": 50, "zo": 20}, "Take LoRA: backprop fits and is the better choice"),
        ({"adamw": 400, "lora": 200, "zo": 90, "zo_disk": 20}, "Take ZO, offload=disk"),
        ({"adamw": 400, "zo": 200}, "Nothing fits"),
    ],
)
def test_backprop_comes_first_where_it_fits(bytes_needed: dict[str, int], said: str) -> None:
    assert said in advice(planned(**bytes_needed))


@pytest.mark.integration
def test_the_verb_prints_a_table_and_what_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "tiny-llama", "--batch", "2", "--length", "8", "--methods", "sgd,qzo,zo-disk"])
    out = capsys.readouterr().out
    assert all(BY_NAME[name].title in out for name in ("sgd", "qzo", "zo-disk"))
    assert "Take SGD" in out
    assert "GFLOP/s" in out
    plan("opt-125m", 2, 8, device="cuda", methods="zo-disk", device_memory=1e-4, host_memory=1e-4, disk=1e-4)
    out = capsys.readouterr().out
    assert "too little device and disk" in out
    assert "Nothing fits" in out


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "zolightning plan --model opt-13b --precision bf16" in " ".join(capsys.readouterr().out.split()).replace("- ", "-")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"methods": "adam"}, "adam unknown; allowed: adamw"),
        ({"disk": -1.0}, "must be > 0"),
        ({"model": "smollm2-135"}, "smollm2-135m"),
        ({"device": "cuda"}, "--device-memory"),
    ],
)
def test_refusals(options: dict[str, Any], error: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a device whose memory can be asked")
    with pytest.raises(ValueError, match=error):
        plan(**{"model": "tiny-llama", "batch": 1, "length": 4, "methods": "zo", **options})


def test_a_folder_needs_its_configuration_only(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    weights = sum(p.nbytes for p in LlamaForCausalLM(config).parameters())
    where = replace(spec("tiny-llama", 1, 4), model=str(tmp_path))
    assert weights < BY_NAME["zo"].need(where).device < 2 * weights
