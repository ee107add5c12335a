"""The bench command on tiny models: every method runs or says why not, and the figures fit together. No times asserted."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from torch import nn

from zolightning.adapt.matmul import fastest_dtype
from zolightning.cli import main
from zolightning.commands.bench.main import Bench, select_methods
from zolightning.commands.bench.measure import Gemm, count_flops, interleave, is_exact, timed
from zolightning.commands.bench.methods import DEFAULT_METHODS, METHODS, Method, Running, forward
from zolightning.commands.bench.models import ARCHITECTURES, random_model
from zolightning.commands.bench.peak import Memory
from zolightning.commands.bench.reference_mezo import ReferenceMeZO
from zolightning.commands.bench.report import Row, make_row, text_table
from zolightning.commands.bench.run import Session
from zolightning.commands.bench.workload import Spec, Workload
from zolightning.commands.clock import Clock
from zolightning.probing.isolation import Isolation

pytestmark = pytest.mark.integration


def spec(**changes: object) -> Spec:
    values = {"model": "tiny-llama", "batch": 2, "length": 8, "dtype": "bf16", "master": None, "logits": "last"}
    return Spec(**{**values, "device": "cpu", "threads": 1, **changes})  # type: ignore[arg-type]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_one_file_cannot_be_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`out` and `csv` must be two files, got .*x\.csv for both"):
        Bench(model="tiny-llama", out=str(tmp_path / "x.csv"))()


def test_graphs_are_skipped_where_there_is_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--repeats", "1", "--warmup", "0", "--threads", "1", "--device", "cpu", "--memory", "False", "--out", str(out)]
    main(["bench", "--model", "tiny-llama", "--batch", "1", "--length", "4", *options, "--methods", "spsa-graphs,rank1-graphs"])
    for row in json.loads(out.read_text())["rows"][1:]:
        assert row["skipped"] == "no CUDA graphs: the module is on cpu"


def test_quantised_layers(tmp_path: Path) -> None:
    """No step changes the codes; both kinds beside each other."""
    out = tmp_path / "bench.json"
    Bench(
        model="tiny-llama", batch=2, length=8, repeats=1, warmup=0, threads=1, device="cpu", out=str(out), memory=False,
        methods="forward-nf4,qzo-nf4,forward-int8,qzo-int8,spsa-rademacher",
    )()  # fmt: skip
    rows = {r["method"]: r for r in json.loads(out.read_text())["rows"]}
    assert {name for name, row in rows.items() if row["skipped"]} == set()
    assert all(row["exact"] for row in rows.values())
    assert 0 < rows["qzo-int8"]["trained"] < rows["qzo-nf4"]["trained"] < rows["spsa-rademacher"]["trained"] / 10


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, store = tmp_path / "new" / "bench.json", f"sqlite:///{tmp_path}/mlflow.db"
    options = ["--repeats", "3", "--warmup", "1", "--threads", "1", "--device", "cpu", "--out", str(out), "--store", store]
    chosen = ("forward", "reference-mezo", "spsa-rademacher", "spsa-middle", "rank1", "lightning")
    names = json.dumps(chosen)
    main(["bench", "--model", "tiny-llama", "--batch", "2", "--length", "8", *options, "--methods", names])
    shown = capsys.readouterr().out
    assert "[memory 1/6] forward: " in shown
    assert "[round 3/3]" in shown

    report = json.loads(out.read_text())
    assert report["settings"]["model"] == "tiny-llama"
    tiny = random_model(ARCHITECTURES["tiny-llama"], torch.float32, torch.device("cpu"))
    assert report["model"]["parameters"] == sum(p.numel() for p in tiny.parameters())
    assert report["machine"]["kernels"] in ("native", "torch")
    assert report["versions"]["torch"] == torch.__version__
    assert report["gemm"]["gflops"] > 0
    rows = {r["method"]: r for r in report["rows"]}
    assert list(rows) == [name for name in METHODS if name in chosen]
    assert all(r["skipped"] == "" for r in rows.values())
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert row["step_ms"] == pytest.approx(1e3 * median(row["seconds"]))
        assert row["min_ms"] <= row["step_ms"] <= row["max_ms"]
        assert row["ratio_to_forwards"] == pytest.approx(row["step_ms"] / rows["forward"]["step_ms"])
        assert row["speedup"] == pytest.approx(rows["reference-mezo"]["step_ms"] / row["step_ms"])
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / rows["forward"]["peak_bytes"])
        assert row["peak_bytes"] > report["model"]["bytes"]
        assert row["gemm_share"] == pytest.approx(row["gflops"] / report["gemm"]["gflops"])
        assert row["exact"] is (row["method"] != "reference-mezo")
    beyond = rows["reference-mezo"]["step_ms"] - rows["forward"]["step_ms"]
    assert rows["reference-mezo"]["ns_per_parameter"] == pytest.approx(1e6 * beyond / report["model"]["parameters"])
    assert rows["spsa-rademacher"]["trained"] == rows["lightning"]["trained"] == report["model"]["parameters"]
    assert 0 < rows["rank1"]["trained"] == rows["spsa-middle"]["trained"] < report["model"]["parameters"]

    with out.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(rows)
    assert all(line["batch"] == "2" and line["date"] == report["date"] for line in lines)
    assert float(lines[1]["step_ms"]) == rows["reference-mezo"]["step_ms"]
    for name in rows:
        assert f"\n{name} " in shown

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("zolightning-bench")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["rank1/step_ms"] == pytest.approx(rows["rank1"]["step_ms"])
    assert logged.data.params["dtype"] == ("bf16" if fastest_dtype() == torch.bfloat16 else "fp32")


def test_masters_full_logits_and_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Bench(
        model="tiny-opt", batch=2, length=8, master="fp32", logits="full", repeats=1, warmup=0, threads=1, device="cpu",
        methods="spsa-gaussian, rank1,reference-mezo,backprop-checkpointed", memory=False, out=str(tmp_path / "o.json"),
        csv=str(tmp_path / "c.csv"),
    )()  # fmt: skip
    report = json.loads((tmp_path / "o.json").read_text())
    assert [r["method"] for r in report["rows"]] == [
        "forward", "forward-master", "reference-mezo", "spsa-gaussian", "rank1", "backprop-checkpointed",
    ]  # fmt: skip
    rows = {r["method"]: r for r in report["rows"]}
    assert [name for name, row in rows.items() if row["skipped"]] in ([], ["rank1"])  # OPT flattens its batch
    assert all(row["peak_bytes"] is None and row["memory_ratio"] is None for row in rows.values())
    assert rows["spsa-gaussian"]["exact"] is True
    assert report["gemm"]["dtype"] == "bf16"
    assert (tmp_path / "c.csv").exists()
    assert "c.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "`batch` must be >= 1, got 0"),
        (["--length", "0"], "`length` must be >= 1, got 0"),
        (["--threads", "0"], "`threads` must be >= 1, got 0"),
        (["--repeats", "0"], "`repeats` must be >= 1, got 0"),
        (["--warmup", "-1"], "`warmup` must be >= 0, got -1"),
        (["--methods", "spsa-rademacker"], "'spsa-rademacker' is unknown; allowed: forward, .*did you mean 'spsa-rademacher"),
        (["--methods", "forward-master"], "forward-master .* needs master=fp32"),
        (["--dtype", "fp32", "--master", "fp32"], "fp32 throughout: leave `master` out"),
        (["--logits", "full", "--length", "1"], "`length=1` has no next token"),
        (["--model", "./no/such/model", "--memory", "false"], "(?s)cannot load model.*--model tiny-llama | "),
        (["--model", "smolm2-135m"], "is neither a folder nor one of tiny-llama, .*did you mean 'smollm2-135m'"),
        (["--out", "."], "`out=.` is a folder"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["bench", *(["--model", "tiny-llama"] if "--model" not in args else []), *args])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ValueError, match="`device=cuda`: PyTorch finds no CUDA device"):
        spec(device="cuda")


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Example: zolightning bench --batch 8 --length 64" in shown
    documented = shown.replace("- ", "-")
    assert all(name in documented for name in (*METHODS, *ARCHITECTURES))


def test_methods_keep_the_order_of_the_table_and_their_forward() -> None:
    assert select_methods("rank1, reference-mezo", master=False) == ["forward", "reference-mezo", "rank1"]
    assert select_methods(["rank1"], master=True) == ["forward", "forward-master", "rank1"]
    assert select_methods(None, master=False) == DEFAULT_METHODS


# ---- the methods -----------------------------------------------------------------------------------------------------


def test_reference_mezo_is_the_textbook_update() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    eps, lr = 1e-3, 1e-2
    start = [p.detach().clone() for p in net.parameters()]
    generator = torch.Generator().manual_seed(11)
    z = [torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype) for p in start]

    def loss_at(scale: float) -> float:
        values = {n: p + scale * d for (n, _), p, d in zip(net.named_parameters(), start, z, strict=True)}
        return F.mse_loss(torch.func.functional_call(net, values, (x,)), y).item()

    expected = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    mezo = ReferenceMeZO(net.parameters(), eps, seed=11)
    g = mezo.step(lambda: F.mse_loss(net(x), y).item(), lr)
    assert g == pytest.approx(expected, rel=1e-9)
    assert mezo.seed == 12
    for p, s, d in zip(net.parameters(), start, z, strict=True):
        torch.testing.assert_close(p.detach(), s - lr * expected * d, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "exact"), [("spsa-gaussian", True), ("rank1", True), ("reference-mezo", False)])
def test_exactness_is_measured(name: str, exact: bool) -> None:
    assert is_exact(METHODS[name].setup(Workload(spec()))) is exact


def test_steps_are_those_of_the_strategy() -> None:
    alone, trained = Workload(spec()), Workload(spec())
    start = [p.detach().clone() for p in alone.model.parameters()]
    by_hand = METHODS["spsa-rademacher"].setup(alone)
    for _ in range(3):
        by_hand.step(1e-2)
    METHODS["lightning"].setup(trained).step(1e-2)
    pairs = list(zip(alone.model.parameters(), trained.model.parameters(), start, strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, s) for a, _, s in pairs)


def test_every_method_sees_the_same_loss() -> None:
    """A shell has its own Parameters on the workload's memory, ties kept."""
    work = Workload(spec())
    shell = work.shell()
    assert shell.lm_head.weight is shell.model.embed_tokens.weight  # type: ignore[union-attr]
    for (name, ours), theirs in zip(shell.named_parameters(), work.model.parameters(), strict=True):
        assert ours is not theirs, name
        assert ours.data_ptr() == theirs.data_ptr(), name
    with torch.no_grad():
        ids, labels = work.batch["input_ids"], work.batch["labels"]
        logits = work.model(input_ids=ids).logits.float()
        expected = F.cross_entropy(logits[:, -1], labels, reduction="none")
        torch.testing.assert_close(work.loss(shell)(work.batch), expected, rtol=1e-2, atol=1e-2)
        full = Workload(spec(logits="full"))
        each = [F.cross_entropy(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True)]
        torch.testing.assert_close(full.loss(full.model)(full.batch), torch.stack(each), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "parameters"), [("smollm2-135m", 134_515_008), ("opt-1.3b", 1_315_758_080), ("llama-7b", 6_738_415_616)]
)
def test_shapes_are_the_published_ones(name: str, parameters: int) -> None:
    model = random_model(ARCHITECTURES[name], torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_steps_are_interleaved() -> None:
    order: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    rounds: list[int] = []
    seconds = interleave({"a": step("a", 1.0), "b": step("b", 2.0), "c": step("c", 3.0)}, 3, rounds.append)
    assert order == ["a", "b", "c"] * 3
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert rounds == [1, 2, 3]


def test_zo_steps_are_timed_after_the_first_looks_for_state(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    everything = Isolation.everything
    monkeypatch.setattr(Isolation, "everything", lambda self: looks.append(self) or everything(self))
    session = Session(spec(), {})
    for name in ("forward", "spsa-rademacher"):
        session.start(name, 0)
    assert looks
    looks.clear()
    session.running["spsa-rademacher"].step(0.0)
    assert not looks


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_the_clock_counts_what_it_says(clock: Clock) -> None:
    """Waiting takes no CPU time."""

    def waits(lr: float) -> None:
        time.sleep(0.05)

    seconds = timed(Running(waits, torch.nn.Identity(), 0), torch.device("cpu"), clock)
    assert seconds < 0.05 if clock == "cpu" else seconds >= 0.05


def test_flops_of_the_two_forwards() -> None:
    """Twice the linear weights for each token, of the head for the last one; the attention's two products."""
    work = Workload(spec())
    shape, batch, length = ARCHITECTURES["tiny-llama"], 2, 8
    width = shape.hidden // shape.heads
    linear = shape.layers * shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * width + 3 * shape.feed_forward)
    attention = shape.layers * 4 * batch * shape.heads * length * length * width
    expected = 2 * batch * (length * linear + shape.vocabulary * shape.hidden) + attention
    rotary = abs(count_flops(forward(work)) - 2 * expected)
    assert rotary < 0.01 * expected


def test_rows_and_table() -> None:
    common = {"forwards": 0.2, "reference": 0.6, "flops": 4e9, "gemm_gflops": 40.0, "inference_peak": 100, "exact": True}
    row = make_row("ours", [0.3, 0.25, 0.2], trained=10**9, peak=102, **common)  # type: ignore[arg-type]
    assert (row.step_ms, row.min_ms, row.max_ms) == pytest.approx((250, 200, 300))
    assert row.ratio_to_forwards == pytest.approx(1.25)
    assert row.speedup == pytest.approx(2.4)
    assert row.ns_per_parameter == pytest.approx(0.05)
    assert (row.memory_ratio, row.gflops, row.gemm_share) == pytest.approx((1.02, 16, 0.4))
    header, _, ours, skipped = text_table([row, Row("lora", skipped="peft is not installed")]).splitlines()
    assert header.split()[:3] == ["method", "step", "ms"]
    assert ours.split() == ["ours", "250.0", "200.0", "300.0", "1.250", "2.40", "0.05", "0.0", "1.020", "16", "40", "yes"]
    assert skipped == "lora: skipped, peft is not installed"


def test_what_does_not_fit_is_skipped_with_a_reason() -> None:
    peaks = {"lora": Memory(None, 0, "out of memory"), "backprop-sgd": Memory(1 << 60, 0)}
    session = Session(spec(), peaks)
    for name in ("forward", "lora", "backprop-sgd"):
        session.start(name, 0)
    session.gemm = Gemm(torch.float32, torch.device("cpu"), 64)
    rows = session.rows(["forward", "lora", "backprop-sgd"], session.time(1, lambda line: None), 1.0)
    assert rows[0].skipped == ""
    assert rows[1].skipped == "out of memory"
    assert "GB in addition to the weights, which is not free" in rows[2].skipped


def test_running_out_of_memory_ends_the_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(work: Workload) -> Running:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def broken(work: Workload) -> Running:
        raise RuntimeError("a mistake in the method")

    monkeypatch.setitem(METHODS, "lora", Method("lora", setup))
    monkeypatch.setitem(METHODS, "rank1", Method("rank1", broken))
    session = Session(spec(), {})
    session.start("lora", 0)
    assert session.skipped == {"lora": "out of memory"}
    with pytest.raises(RuntimeError, match="a mistake in the method"):
        session.start("rank1", 0)
