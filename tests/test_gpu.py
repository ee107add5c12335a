"""On a CUDA device: the bits of the CPU, exact restore, ledgers that a CPU replays, quantised layers.

None of this runs where there is no GPU. By itself: ``python -m pytest -q tests/test_gpu.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, assert_same, fit, lm_losses, tiny_causal_lm, token_batches, weights
from torch import Tensor

from zolightning import ZOConfig, ZOStrategy, noise
from zolightning.ledger import read, replay
from zolightning.noise import Distribution, Gaussian, Rademacher, backends, reference, sample
from zolightning.noise.selftest import same_bits, specimens, verify_triton
from zolightning.space import Cycle
from zolightning.types import Key, Term

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
KEY, TERMS = Key(3, 1, 2), [Term(Key(3, 1, 0), 0.3), Term(Key(3, 1, 1), -0.7)]
DISTRIBUTIONS = [Rademacher(), Gaussian()]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("kind", [None, *(dist.native for dist in DISTRIBUTIONS)])
def test_triton_is_taken(kind: int | None) -> None:
    assert noise.active_backend(GPU) == "triton"
    library = backends.gpu_backend(GPU, kind)
    assert library is not None
    assert verify_triton(library, GPU, kind) == ""


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sweeps_give_the_bits_of_the_cpu(dist: Distribution, dtype: torch.dtype, backend: Any) -> None:
    """Perturbation, both ways, rows, update, rounding, sums: whatever backend runs them."""
    w = specimens(dtype)[9:2009].reshape(40, 50)
    rows = torch.tensor([3, 39, 0, 3])

    def run(device: torch.device) -> list[Tensor]:
        here = w.to(device)
        moved, plus, minus = (torch.empty_like(here) for _ in range(3))
        noise.perturb(moved, here, dist, TERMS, 7, 1000)
        noise.perturb_both(plus, minus, here, dist, TERMS[0], 7, 1000)
        some = torch.empty(4, 50, dtype=dtype, device=device)
        noise.perturb_rows(some, here[rows.to(device)], dist, TERMS, 7, rows.to(device))
        kept = moved.clone()
        noise.keep_large_(kept, here, 0.5)
        total = noise.noise_sum(dist, TERMS, 7, 77, 3000, device)
        queries = torch.tensor([5, 0, 9], device=device)
        drawn = sample(dist, KEY, 7, torch.zeros_like(queries), 300, queries)
        outer = noise.outer_sum(drawn, total[:300].view(3, 100))
        updated = here.clone()
        if dtype in (torch.bfloat16, torch.float16):  # how torch.add rounds wider types is the device's own business
            noise.sgd_(updated, dist, TERMS, 7, 1000, 0.3, 0.1, KEY)
            noise.outer_sgd_(updated, drawn[:, :40].contiguous(), drawn[:, 40:90].contiguous(), 7, 0.3, 0.1, KEY)
        words = here.view(-1).view(torch.int16 if here.element_size() == 2 else torch.int32).to(torch.int64)
        fingerprint = torch.tensor(noise.mixed_sum(words, 4) % (1 << 62))
        return [t.cpu() for t in (moved, plus, minus, some, kept, total, drawn, outer, updated, fingerprint)]

    expected = run(CPU)
    noise.set_backend(backend)
    try:
        found = run(GPU)
    finally:
        noise.set_backend("auto")
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(ours, theirs), number


def test_wide_updates_are_those_of_torch_on_the_device() -> None:
    w = specimens(torch.float32)[9:2009].to(GPU)
    ours, expected = w.clone(), w.clone()
    noise.sgd_(ours, Gaussian(), TERMS, 7, 0, 0.3, 0.1, KEY)
    reference.sgd_(expected, Gaussian(), TERMS, 7, 0, 0.3, 0.1, KEY)
    assert same_bits(ours, expected)


ON_GPU = {"accelerator": "gpu", "devices": 1}


def train(config: ZOConfig, dtype: torch.dtype, ledger: Any = False) -> tuple[Any, Any]:
    module = PerExampleTask(tiny_causal_lm("llama").to(dtype), lm_losses)
    before = copy.deepcopy(module)
    fit(module, token_batches(4), ZOStrategy(config, ledger=ledger), **ON_GPU)
    return before, module


STRUCTURES = {
    "dense": PLAIN.override(lr=1e-2),
    "gaussian": PLAIN.override(lr=1e-2, noise="gaussian", num_queries=2),
    "two forwards": PLAIN.override(lr=1e-2, one_batch=False),
    "rank1": ZOConfig(select="all", lr=1e-2, seed=3),
    "lowrank": PLAIN.override(structure="lowrank", lr=1e-2),
    "sparse": PLAIN.override(structure="sparse", lr=1e-2),
    "adam": PLAIN.override(optimizer="adam", lr=1e-2),
    "sign": PLAIN.override(optimizer="sign", lr=1e-2),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_is_exact_and_steps_are_taken(name: str, dtype: torch.dtype) -> None:
    before, same = train(STRUCTURES[name].override(lr=0.0), dtype)
    assert_same(weights(same.cpu()), weights(before))
    before, moved = train(STRUCTURES[name], dtype)
    assert any(not torch.equal(a, b) for a, b in zip(weights(moved.cpu()).values(), weights(before).values(), strict=True))


@pytest.mark.parametrize("name", ["dense", "gaussian", "rank1", "lowrank", "sparse", "sign"])
def test_a_ledger_written_on_the_gpu_is_replayed_on_either(name: str, tmp_path: Path) -> None:
    """bfloat16 weights, whose updates are our own arithmetic, come out bit for bit on the CPU too."""
    path = tmp_path / "ledger.zo"
    before, trained = train(STRUCTURES[name], torch.bfloat16, ledger=path)
    for device in (GPU, CPU):
        again = copy.deepcopy(before).to(device)
        replay(read(path), dict(again.named_parameters()))
        assert_same(weights(again.cpu()), weights(trained.cpu()))


def test_both_probes_in_one_batch_are_those_of_two() -> None:
    _, together = train(STRUCTURES["dense"], torch.float32)
    _, apart = train(STRUCTURES["two forwards"], torch.float32)
    assert_same(weights(together.cpu()), weights(apart.cpu()), tolerance=1e-4)


def with_dropout(net: Any, batch: Any) -> Tensor:
    """Draws from the GPU's generator, which each probe must find where the others did."""
    return lm_losses(net, batch) * F.dropout(torch.ones((), device=GPU), 0.5)


GRAPHS = {name: STRUCTURES[name] for name in ("dense", "gaussian", "two forwards", "rank1", "adam")}
GRAPHS["turns"] = PLAIN.override(lr=1e-2, cycle=Cycle(blocks=1))
GRAPHS["a direction for each example"] = ZOConfig(select="re:_proj|norm", lr=1e-2, seed=3)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("loss", [lm_losses, with_dropout], ids=lambda f: f.__name__)
def test_graphs_train_as_plain_forwards(name: str, loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    def trained(graphs: bool) -> Any:
        module = PerExampleTask(tiny_causal_lm("llama").bfloat16(), loss)
        items = [*token_batches(12), *token_batches(8, size=3)]  # a second shape comes later
        fit(module, items, ZOStrategy(GRAPHS[name].override(cuda_graphs=graphs)), **ON_GPU)
        return weights(module.cpu())

    expected = trained(False)
    with caplog.at_level("INFO"):
        assert_same(trained(True), expected)
    assert "replayed as CUDA graphs" in caplog.text


def waits(net: Any, batch: Any) -> Tensor:
    losses = lm_losses(net, batch)
    return losses * (1.0 if losses.sum().item() > 0 else 2.0)


class Counts:
    """Reads what a replay does not know of."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, net: Any, batch: Any) -> Tensor:
        self.calls += 1
        return lm_losses(net, batch) * self.calls


def means(net: Any, batch: Any) -> Tensor:
    """PyTorch's own mean, which is split afterwards."""
    x = net(input_ids=batch).logits
    return F.mse_loss(x.float(), torch.zeros_like(x, dtype=torch.float32))


@pytest.mark.parametrize(("loss", "why"), [(waits, "waits for the GPU"), (Counts(), "another loss"), (means, "losses of the")])
def test_forwards_that_no_graph_can_give_run_as_they_are(loss: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    def trained(graphs: bool) -> Any:
        own = copy.deepcopy(loss)
        module = PerExampleTask(tiny_causal_lm("llama").bfloat16(), own)
        fit(module, token_batches(8), ZOStrategy(PLAIN.override(lr=1e-2, cuda_graphs=graphs)), **ON_GPU)
        return weights(module.cpu())

    with caplog.at_level("INFO"):
        found = trained(True)
    assert why in caplog.text
    if not isinstance(loss, Counts):  # which knows that it was called for a test
        assert_same(found, trained(False))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_scales_of_bitsandbytes_layers(kind: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from zolightning.adapt.quantize import quantize

    model = tiny_causal_lm("llama", width=64).to(torch.bfloat16)
    module = PerExampleTask(model, lm_losses)
    quantize(module, kind)
    fit(module, token_batches(1), ZOStrategy("qzo", lr=1e-2, seed=1, ledger=False), **ON_GPU)
    codes = {n: b.clone() for n, b in module.state_dict().items() if b.dtype in (torch.uint8, torch.int8)}
    before = weights(module)
    fit(module, token_batches(3), ZOStrategy("qzo", lr=1e-2, seed=1, ledger=False), **ON_GPU)
    assert codes
    for name, value in module.state_dict().items():
        if name in codes:
            assert torch.equal(value, codes[name].to(value.device)), name
    after = weights(module)
    changed = [n for n, p in before.items() if not torch.equal(p.to(after[n].device), after[n])]
    assert changed
    assert all("scale" in n for n in changed), changed
    assert all((after[n] > 0).all() for n in changed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_graphs_train_quantised_layers_as_plain_forwards(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    from zolightning.adapt.quantize import quantize

    def trained(graphs: bool) -> Any:
        module = PerExampleTask(tiny_causal_lm("llama", width=64).to(torch.bfloat16), lm_losses)
        quantize(module, kind)
        strategy = ZOStrategy("qzo", lr=1e-2, seed=1, ledger=False, cuda_graphs=graphs)
        fit(module, token_batches(8), strategy, **ON_GPU)
        return weights(module.cpu())

    expected = trained(False)
    with caplog.at_level("INFO"):
        assert_same(trained(True), expected)
    assert "replayed as CUDA graphs" in caplog.text


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_lightning_s_precision_plugin(mode: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins.precision.bitsandbytes import BitsandbytesPrecision

    module = PerExampleTask(tiny_causal_lm("llama", width=64), lm_losses)
    plugin = BitsandbytesPrecision(mode, dtype=torch.bfloat16, ignore_modules={"net.lm_head"})
    strategy = ZOStrategy("qzo", lr=1e-2, seed=1, ledger=False)
    fit(module, token_batches(3), strategy, plugins=[plugin], **ON_GPU)
    scales = [p for n, p in module.named_parameters() if n.endswith("scales")]
    assert scales
    assert all((p > 0).all() for p in scales)  # on the CPU: Lightning puts the module back there
    assert strategy.last_record is not None
    assert strategy.last_record.projected_grad > 0
