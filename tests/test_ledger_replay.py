"""Base and ledger give the weights of every step, bit for bit; whatever they cannot give is refused by name."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Task,
    assert_same,
    batches,
    lm_loss,
    loader,
    mlp,
    mse,
    per_example_mse,
    quiet_trainer,
    tiny_causal_lm,
    token_batches,
    weights,
)
from ledgers import Noted, parameters
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from zolightning import ZOConfig, ZOStrategy
from zolightning.ledger import LedgerError, Replayed, read, replay
from zolightning.ledger.format import DIGEST, Check, Method, Options, Record, Step, encode, opening
from zolightning.noise import Rademacher, reference, set_backend
from zolightning.types import Key, Term

STEPS = 6
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-2),
    "sgd, weight decay, maximize": lambda p: SGD(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, lr_decay=0.1),
}
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
STRUCTURES = {
    "dense": (Task, mse, PLAIN),
    "rank1": (PerExampleTask, per_example_mse, PLAIN.override(estimator="per_example", structure="rank1")),
}
EACH = PLAIN.override(estimator="per_example", structure="rank1")


class Run(NamedTuple):
    """A run that is over: its ledger, its module, and the weights after each step."""

    path: Path
    module: pl.LightningModule
    weights: dict[int, dict[str, Tensor]]

    @property
    def base(self) -> dict[str, nn.Parameter]:
        return parameters(self.weights[0])


def train(
    path: Path, module: pl.LightningModule, items: Iterable[Any], config: ZOConfig = PLAIN, callbacks: Any = (), **settings: Any
) -> Run:
    noted = Noted()
    trainer = quiet_trainer(ZOStrategy(config, ledger=path), callbacks=[noted, *callbacks], **settings)
    trainer.fit(module, loader(list(items)))
    return Run(path, module, noted.weights)


def assert_replays(run: Run, steps: Iterable[int] | None = None) -> Replayed:
    """To every step that was noted, each from the base on; returns where the last one came to."""
    ledger = read(run.path)
    assert (ledger.torn, ledger.damage) == (0, "")
    assert len({str(w) for w in run.weights.values()}) > 1, "nothing was trained"
    for step in sorted(run.weights) if steps is None else steps:
        if step >= ledger.header.start:
            rebuilt = run.base
            replay(ledger, rebuilt, step)
            assert_same(rebuilt, run.weights[step])  # type: ignore[arg-type]
    done = replay(ledger, final := run.base)
    assert_same(final, weights(run.module))  # type: ignore[arg-type]
    assert done.checked == done.step == ledger.last  # the run's own fingerprint of its end was compared
    return done


def typed(precision: str, count: int = STEPS) -> list[Any]:
    dtype = DTYPES.get(precision, torch.float32)
    return [(x.to(dtype), y.to(dtype)) for x, y in batches(count)]


# ---- replay is training


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_is_training(optimizer: str, precision: str, structure: str, tmp_path: Path) -> None:
    """Noise, queries and accumulation take turns over the product."""
    kind, loss, config = STRUCTURES[structure]
    turn = list(itertools.product(OPTIMIZERS, DTYPES, STRUCTURES)).index((optimizer, precision, structure))
    config = config.override(noise=("rademacher", "gaussian")[turn % 2], num_queries=1 + turn % 3, normalize=turn % 5 == 0)
    settings = {"precision": precision, "accumulate_grad_batches": 1 + turn % 7 // 5}
    run = train(tmp_path / "ledger.zo", kind(mlp(), loss, OPTIMIZERS[optimizer]), typed(precision), config, **settings)
    assert_replays(run)


def only_matrices() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


OTHERS = [
    name
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_optimizer_of_torch(name: str, precision: str, tmp_path: Path) -> None:
    module = Task(only_matrices(), optimizer=lambda p: getattr(optim, name)(p, lr=1e-2))
    assert_replays(train(tmp_path / "ledger.zo", module, typed(precision), precision=precision))


VARIANTS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "sgd, learning rate as a tensor": lambda p: SGD(p, lr=torch.tensor(1e-2)),
    "groups": lambda p: AdamW([{"params": p[:1], "lr": 1e-2}, {"params": p[1:], "weight_decay": 0.5, "betas": (0.5, 0.9)}]),
    "groups of sgd": lambda p: SGD([{"params": p[2:], "lr": 1e-1}, {"params": p[:2], "maximize": True}], lr=1e-2),
    "groups in another order": lambda p: AdamW(p[::-1], lr=1e-2),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_optimizers(variant: str, precision: str, tmp_path: Path) -> None:
    module = Task(mlp(), optimizer=VARIANTS[variant])
    assert_replays(train(tmp_path / "ledger.zo", module, typed(precision), precision=precision))


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "queries": ({"num_queries": 5}, {}),
    "gaussian": ({"noise": "gaussian"}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "clipping by norm": ({"num_queries": 2}, {"gradient_clip_val": 1e-2}),
    "clipping by value": ({"num_queries": 2}, {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}),
    "own clipping": ({"clip": 1e-2, "num_queries": 3}, {}),
    "normalised": ({"normalize": True, "lr": 1e-3}, {}),
    "sgd in place of the module's": ({"optimizer": "sgd"}, {}),
    "selected": ({"select": "re:0"}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "16-mixed": ({}, {"precision": "16-mixed"}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, optimizer: str, tmp_path: Path) -> None:
    changes, settings = SETTINGS[name]
    run = train(
        tmp_path / "ledger.zo",
        Task(mlp(), optimizer=OPTIMIZERS[optimizer]),
        batches(STEPS),
        PLAIN.override(**changes),
        **settings,
    )
    assert_replays(run)


@pytest.mark.parametrize(
    "config", [ZOConfig(lr=1e-2, seed=3), EACH.override(num_queries=2, one_batch=False)], ids=["default", "two"]
)
def test_a_direction_for_each_example(config: ZOConfig, tmp_path: Path) -> None:
    run = train(tmp_path / "ledger.zo", PerExampleTask(only_matrices(), per_example_mse), batches(STEPS), config)
    assert_replays(run)
    assert {len(r.terms) for r in read(run.path) if isinstance(r, Step)} == {5 * config.num_queries}


SCHEDULERS: dict[str, tuple[str, Callable[[Optimizer], Any]]] = {
    "step": ("sgd", lambda o: StepLR(o, 2, 0.3)),
    "one cycle of momentum": ("nesterov", lambda o: OneCycleLR(o, 0.05, total_steps=STEPS)),
    "one cycle of beta": ("adamw", lambda o: OneCycleLR(o, 0.05, total_steps=STEPS)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tmp_path: Path) -> None:
    optimizer, scheduler = SCHEDULERS[name]
    run = train(tmp_path / "ledger.zo", Task(mlp(), mse, OPTIMIZERS[optimizer], scheduler), batches(STEPS))
    assert_replays(run)
    assert len({r.lrs for r in read(run.path) if isinstance(r, Step)}) > 2
    assert len([r for r in read(run.path) if isinstance(r, Options)]) == (1 if name == "step" else STEPS)


# ---- modules that change their mind


class Adversaries(pl.LightningModule):
    """Two optimizers, each on its own part, the second at every other step."""

    def __init__(self, second: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.make = nn.Linear(4, 3), nn.Linear(3, 3), second
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        left, right = self.optimizers()  # type: ignore[misc, attr-defined]
        left.step(closure=lambda: (self.second(self.first(x)) - y).square().mean())
        if batch_idx % 2:
            right.step(closure=lambda: -(self.second(self.first(x)) - y).square().mean())

    def configure_optimizers(self) -> Any:
        return [AdamW(self.first.parameters(), lr=1e-2), self.make(self.second.parameters())]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_two_optimizers(optimizer: str, tmp_path: Path) -> None:
    run = train(tmp_path / "ledger.zo", Adversaries(OPTIMIZERS[optimizer]), batches(STEPS))
    done = assert_replays(run)
    assert done.step == STEPS + STEPS // 2
    assert sorted(done.optimizers) == [0, 1]
    assert {r.optimizer for r in read(run.path) if isinstance(r, Step)} == {0, 1}


class Thaw(BaseFinetuning):
    """The last layer first, the first one from step 3 on, in a group of its own."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index, arg-type]

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_finetuning_adds_a_parameter_group(optimizer: str, tmp_path: Path) -> None:
    run = train(
        tmp_path / "ledger.zo",
        Task(mlp(), optimizer=lambda p: OPTIMIZERS[optimizer]([q for q in p if q.requires_grad])),
        batches(3),
        callbacks=[Thaw()],
        max_epochs=2,
    )
    assert_replays(run)
    assert torch.equal(run.weights[3]["net.0.weight"], run.weights[0]["net.0.weight"])
    assert not torch.equal(run.weights[4]["net.0.weight"], run.weights[3]["net.0.weight"])
    assert [(len(m.groups), len(m.leaves)) for m in read(run.path) if isinstance(m, Method)] == [(1, 2), (2, 4)]
    assert [len(r.lrs) for r in read(run.path) if isinstance(r, Step)] == [1, 1, 1, 2, 2, 2]


class Freezer(Noted):
    """The first layer stands still in steps 2 and 3."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for parameter in pl_module.net[0].parameters():  # type: ignore[index, union-attr]
            parameter.requires_grad_(batch_idx not in (2, 3))


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_frozen_and_unfrozen_midway(optimizer: str, tmp_path: Path) -> None:
    run = train(tmp_path / "ledger.zo", Task(mlp(), optimizer=OPTIMIZERS[optimizer]), batches(STEPS), callbacks=[Freezer()])
    assert_replays(run)
    still, moving = "net.0.weight", "net.2.weight"
    assert torch.equal(run.weights[2][still], run.weights[4][still])
    assert not torch.equal(run.weights[2][moving], run.weights[4][moving])
    assert not torch.equal(run.weights[4][still], run.weights[6][still])


class Setter(Noted):
    """Sets an option of the optimizer for steps 2 and 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        (group,) = trainer.optimizers[0].param_groups
        if batch_idx in (2, 4):
            before = {name: group[name] for name in self.options}
            group.update(self.options)
            self.options = before


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0}, {"weight_decay": 0.5}, {"momentum": 0, "nesterov": False, "dampening": 0.5}]
)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_options_that_are_scheduled(optimizer: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Without momentum the steps are plain SGD's."""
    run = train(
        tmp_path / "ledger.zo", Task(mlp(), optimizer=OPTIMIZERS[optimizer]), batches(STEPS), callbacks=[Setter(**options)]
    )
    assert_replays(run)


def patchy(net: nn.Module, batch: Any) -> Any:
    """Not a number where the batch says so, no loss at all where it says that."""
    (x, y), what = batch
    return None if what == "none" else mse(net, (x, y)) * (float("nan") if what == "nan" else 1.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "what", ["-,nan,-,none,-,-", "nan,none,-,-", "-,-,-,nan,none", "-,none,nan,nan,-,none,nan"], ids=lambda what: what
)
def test_skipped_steps(what: str, optimizer: str, tmp_path: Path) -> None:
    """They leave the weights alone, and can be asked for all the same, the last one too. A ledger begins with a change."""
    names = what.split(",")
    items = list(zip(batches(len(names)), names, strict=True))
    run = train(tmp_path / "ledger.zo", Task(mlp(), patchy, OPTIMIZERS[optimizer]), items)
    ledger = read(run.path)
    assert ledger.steps == names.count("-")
    assert max(run.weights) == ledger.last
    assert_replays(run)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_tied_weights(kind: str, optimizer: str, tmp_path: Path) -> None:
    module = Task(tiny_causal_lm(kind), lm_loss, OPTIMIZERS[optimizer])
    run = train(tmp_path / "ledger.zo", module, token_batches(4))
    assert_replays(run)
    header = read(run.path).header
    assert header.pretrained is not None
    assert header.pretrained["class"] == type(module.net).__name__ and header.pretrained["prefix"] == "net."
    assert header.parameters.keys() == dict(module.named_parameters()).keys()


def test_second_fit_of_one_trainer_starts_a_ledger_of_its_own(tmp_path: Path) -> None:
    noted, path = Noted(), tmp_path / "ledger.zo"
    trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=path), callbacks=[noted])
    module = Task(mlp(), optimizer=OPTIMIZERS["adamw"])
    trainer.fit(module, loader(batches(4)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batches(4)))
    first, second = read(tmp_path / "ledger.zo.1"), read(path)
    assert (first.header.start, first.last, second.header.start, second.last) == (0, 4, 4, 8)
    for ledger, steps in ((first, range(5)), (second, range(4, 9))):
        for step in steps:
            rebuilt = parameters(noted.weights[ledger.header.start])
            replay(ledger, rebuilt, step)
            assert_same(rebuilt, noted.weights[step])  # type: ignore[arg-type]


# ---- whatever the machine


def wide() -> nn.Module:
    """More than a thread's share, and no multiple of a vector."""
    torch.manual_seed(1)
    return nn.Linear(211, 301, bias=False)


@pytest.fixture
def auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("optimizer", ["sgd, weight decay, maximize", "adamw"])
def test_threads_backends_and_chunks_change_no_bit(
    optimizer: str, structure: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, loss, config = STRUCTURES[structure]
    dtype = DTYPES[precision]
    items = [(x.to(dtype), y.to(dtype)) for x, y in batches(3, inputs=211, outputs=301)]
    run = train(tmp_path / "ledger.zo", kind(wide(), loss, OPTIMIZERS[optimizer]), items, config, precision=precision)
    for backend, threads, chunk in (("native", 2, 1 << 18), ("native", 3, 1777), ("torch", 1, 1 << 18), ("torch", 4, 1777)):
        set_backend(backend)  # type: ignore[arg-type]
        torch.set_num_threads(threads)
        monkeypatch.setattr(reference, "CHUNK", chunk)
        assert_replays(run, steps=(2,))


@pytest.mark.usefixtures("auto_backend")
def test_a_run_on_one_backend_is_a_run_on_the_other(tmp_path: Path) -> None:
    """The ledgers differ in nothing at all: the probes, too, have the same bits."""
    for backend in ("native", "torch"):
        set_backend(backend)  # type: ignore[arg-type]
        train(tmp_path / f"{backend}.zo", Task(mlp(), optimizer=OPTIMIZERS["adamw"]), batches(STEPS))
    assert (tmp_path / "native.zo").read_bytes() == (tmp_path / "torch.zo").read_bytes()


def test_bytes_a_step(tmp_path: Path) -> None:
    """Beside a start of less than a kilobyte here, and 37 bytes for each fingerprint."""
    sizes = {}
    for count in (10, 110):
        run = train(tmp_path / f"{count}.zo", Task(mlp()), batches(count))
        sizes[count] = run.path.stat().st_size
    assert (sizes[110] - sizes[10]) / 100 == 53
    assert sizes[10] - 530 - 2 * 37 < 1500


def test_fingerprints_on_the_way(tmp_path: Path) -> None:
    run = train(tmp_path / "ledger.zo", Task(mlp()), batches(600))
    assert [c.step for c in read(run.path) if isinstance(c, Check)] == [1, 257, 513, 600]
    assert replay(read(run.path), run.base, 599).checked == 513
    assert replay(read(run.path), run.base, 513).checked == 513
    assert replay(read(run.path), run.base, 512).checked == 257


# ---- what cannot be had is refused


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("run") / "ledger.zo", Task(mlp(), optimizer=OPTIMIZERS["adamw"]), batches(STEPS))


def _altered(base: dict[str, nn.Parameter]) -> None:
    base["net.0.bias"].data.view(torch.int32)[3] ^= 1


def _renamed(base: dict[str, nn.Parameter]) -> None:
    base["other.weight"] = base.pop("net.2.weight")


BAD_BASES: dict[str, tuple[Callable[[dict[str, nn.Parameter]], Any], str]] = {
    "one bit": (
        _altered,
        r"these are not the weights that the run of .*ledger\.zo started from \(fingerprint \w{32}, the run's \w",
    ),
    "a parameter less": (
        lambda base: base.pop("net.0.bias"),
        r"the base lacks 'net\.0\.bias', which the run of .* had: it is another model",
    ),
    "a parameter more": (
        lambda base: base.update(extra=nn.Parameter(torch.ones(2))),
        r"the base has 'extra', which the run of .* did not have: it is another model",
    ),
    "another name": (_renamed, r"the base lacks 'net\.2\.weight'"),
    "none at all": (lambda base: base.clear(), r"lacks 'net\.0\.bias', 'net\.0\.weight', 'net\.2\.bias' and 1 more"),
    "another shape": (
        lambda base: base.update({"net.2.bias": nn.Parameter(torch.ones(4))}),
        r"'net\.2\.bias' is float32 \[4\] in the base, it was float32 \[3\] in the run",
    ),
    "another dtype": (
        lambda base: base.update({"net.2.bias": nn.Parameter(base["net.2.bias"].double())}),
        r"'net\.2\.bias' is float64 \[3\] in the base, it was float32 \[3\] in the run",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_wrong_bases_are_refused_and_left_alone(name: str, run: Run) -> None:
    change, message = BAD_BASES[name]
    base = run.base
    change(base)
    before = {n: p.detach().clone() for n, p in base.items()}
    with pytest.raises(LedgerError, match=message):
        replay(read(run.path), base)
    assert_same(base, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, STEPS + 1, 10**9])
def test_steps_out_of_range_are_refused(step: int, run: Run) -> None:
    with pytest.raises(
        LedgerError, match=rf"step {step} is not in .*ledger\.zo, which holds the weights after 0 … {STEPS} steps"
    ):
        replay(read(run.path), run.base, step)


def test_a_damaged_ledger_gives_what_came_before(run: Run, tmp_path: Path) -> None:
    data = bytearray(run.path.read_bytes())
    spans = read(run.path).spans
    start, _ = spans[[isinstance(r, Step) and r.step == 3 for r in read(run.path)].index(True)]
    data[start + 20] ^= 4
    path = tmp_path / "ledger.zo"
    path.write_bytes(data)
    ledger = read(path)
    for step in range(4):
        rebuilt = run.base
        replay(ledger, rebuilt, step)
        assert_same(rebuilt, run.weights[step])  # type: ignore[arg-type]
    for until in (4, STEPS):
        with pytest.raises(LedgerError, match=rf"step {until} is not in .*; the record at byte {start} of .* was altered"):
            replay(ledger, run.base, until)
    with pytest.raises(LedgerError, match=rf"the record at byte {start} of .*: ask for step 3 or less"):
        replay(ledger, run.base)


def test_a_torn_ledger_gives_what_came_before(run: Run, tmp_path: Path) -> None:
    """A power cut at any byte of the last records: what is whole replays to the weights of its step."""
    data, ends = run.path.read_bytes(), [end for _, end in read(run.path).spans]
    path = tmp_path / "ledger.zo"
    for cut in range(ends[-5], len(data) + 1):
        path.write_bytes(data[:cut])
        ledger = read(path)
        assert ledger.torn == cut - ledger.end
        rebuilt = run.base
        done = replay(ledger, rebuilt)
        assert_same(rebuilt, run.weights[done.step])  # type: ignore[arg-type]
        assert done.step == ledger.last


class Mine(SGD):
    """Not torch's: what it does is not in the ledger."""


class Own(Rademacher):
    """Bears another's name."""


class Named(Rademacher):
    name = "mine"


UNSUPPORTED: dict[str, tuple[Callable[[list[Any]], Optimizer], dict[str, Any], str]] = {
    "optimizer": (lambda p: Mine(p, lr=1e-2, momentum=0.9), {}, r"test_ledger_replay\.Mine is not one of torch\.optim's"),
    "distribution": (OPTIMIZERS["sgd"], {"noise": Named()}, r"Named is not one of zolightning's distributions"),
    "distribution of a known name": (OPTIMIZERS["sgd"], {"noise": Own()}, r"Own is not one of zolightning's distributions"),
    "learning rate as a tensor": (
        lambda p: AdamW(p, lr=torch.tensor(1e-2)),
        {},
        r"the optimizer's lr is a Tensor; give it as a number",
    ),
    "initial state": (
        lambda p: optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.5),
        {},
        r"Adagrad has state from before the first step that the ledger holds",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_replayed_trains_and_is_refused(name: str, tmp_path: Path) -> None:
    optimizer, changes, reason = UNSUPPORTED[name]
    run = train(tmp_path / "ledger.zo", Task(mlp(), optimizer=optimizer), batches(3), PLAIN.override(**changes))
    assert not torch.equal(run.weights[3]["net.0.weight"], run.weights[0]["net.0.weight"])
    ledger = read(run.path)
    assert ledger.last == 3  # the losses and coefficients are there
    with pytest.raises(LedgerError, match="the steps from 0 on cannot be replayed: .*" + reason):
        replay(ledger, run.base)
    replay(ledger, run.base, 0)


def test_own_optimizer_with_plain_sgd_steps_is_fine(tmp_path: Path) -> None:
    run = train(
        tmp_path / "ledger.zo", Task(mlp(), optimizer=lambda p: Mine(p, lr=1e-2)), batches(3), PLAIN.override(optimizer="sgd")
    )
    assert_replays(run)


class Meddler(Noted):
    """Changes the weights between steps 2 and 3."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx == 3:
            with torch.no_grad():
                pl_module.net[0].bias.data[0] += 1e-3  # type: ignore[index, union-attr, operator]


def test_weights_changed_behind_the_optimizer_are_found(tmp_path: Path) -> None:
    run = train(tmp_path / "ledger.zo", Task(mlp()), batches(STEPS), callbacks=[Meddler()])
    ledger = read(run.path)
    rebuilt = run.base
    replay(ledger, rebuilt, 2)
    assert_same(rebuilt, run.weights[2])  # type: ignore[arg-type]
    for until in (None, STEPS):
        with pytest.raises(
            LedgerError, match=rf"the weights after step {STEPS} differ from the run's .* by something else than"
        ):
            replay(ledger, run.base, until)
    assert replay(ledger, run.base, STEPS - 1).checked == 1  # which is said: nothing vouches for the later ones


# ---- files that somebody forged, checksums and all: nothing runs, nothing but torch's optimizers is made


def forge(path: Path, run: Run, records: list[Record]) -> Path:
    header = read(run.path).header
    data = opening(header)
    for record in records:
        data += encode(record, data[-DIGEST:], header.seed)
    path.write_bytes(data)
    return path


GROUPS = (("net.0.weight",),)
LEAVES = {"net.0.weight": ("dense", 0, 0)}
GOOD = Method(0, "AdamW", "rademacher", GROUPS, LEAVES)
STEP = Step(0, 0, (Term(Key(7, 0, 0), 1.0),), (1e-3,), 0.5)
FORGED: dict[str, tuple[list[Any], str]] = {
    "unknown optimizer": ([replace(GOOD, rule="Evil")], r"names an optimizer 'Evil', which torch\.optim of torch .* lacks"),
    "base class": ([replace(GOOD, rule="Optimizer")], r"the Method record of .* after step 0 cannot be applied: TypeError"),
    "module": ([replace(GOOD, rule="lr_scheduler")], r"names an optimizer 'lr_scheduler'"),
    "builtins": ([replace(GOOD, rule="__builtins__")], r"names an optimizer '__builtins__'"),
    "path to a class": ([replace(GOOD, rule="lr_scheduler.StepLR")], r"names an optimizer 'lr_scheduler\.StepLR'"),
    "optimizer that is a list": ([replace(GOOD, rule=["SGD"])], r"names an optimizer \('SGD',\)"),
    "unknown noise": (
        [replace(GOOD, distribution="os")],
        r"the ledger's noise 'os' is unknown; there are rademacher, gaussian",
    ),
    "unknown leaf": (
        [replace(GOOD, leaves={"net.0.weight": ("os.system", 0, 0)})],
        r"the ledger's leaf kind 'os\.system' is unknown; there are dense, rank1",
    ),
    "leaf of no parameter": ([replace(GOOD, leaves={"net.9": ("dense", 0, 0)})], r"Method record .* KeyError\('net\.9'\)"),
    "group of no parameter": ([replace(GOOD, groups=(("net.9",),))], r"Method record .* KeyError\('net\.9'\)"),
    "parameter in two groups": (
        [replace(GOOD, groups=GROUPS * 2)],
        r"Method record .* appear in more than one parameter group",
    ),
    "no groups": ([replace(GOOD, groups=(), leaves={})], r"Method record .*optimizer got an empty parameter list"),
    "rank-1 leaf on a vector": (
        [replace(GOOD, groups=(("net.0.bias",),), leaves={"net.0.bias": ("rank1", 0, 0)})],
        r"Method record .*a rank-1 leaf needs a matrix",
    ),
    "leaf index that is text": (
        [replace(GOOD, leaves={"net.0.weight": ("dense", "x", 0)}), STEP],
        r"the Step record .* cannot be",
    ),
    "parameters in the options": (
        [GOOD, Options(0, ({"params": ()},))],
        r"the ledger's options \['params'\] are unknown to torch",
    ),
    "learning rate in the options": ([GOOD, Options(0, ({"lr": 1.0},))], r"the ledger's options \['lr'\] are unknown to torch"),
    "options of two groups": ([GOOD, Options(0, ({}, {}))], r"the Options record .* cannot be applied: ValueError"),
    "options of nobody": ([Options(0, ({},))], r"the Options record .* cannot be applied: KeyError"),
    "options of another type": ([GOOD, Options(0, ({"betas": "ab"},)), STEP], r"the Step record .* cannot be applied: "),
    "step of nobody": ([STEP], r"the Step record of .*forged\.zo after step 0 cannot be applied: KeyError"),
    "too many learning rates": ([GOOD, replace(STEP, lrs=(1.0, 2.0))], r"the Step record .* cannot be applied: ValueError"),
    "closure optimizer": ([replace(GOOD, rule="LBFGS"), STEP], r"the Step record .* cannot be applied: TypeError"),
    "steps that go back": ([GOOD, replace(STEP, step=3), STEP], r"forged\.zo goes back from step 4 to step 0"),
    "wrong fingerprint": (
        [GOOD, STEP, Check(1, "0" * 32)],
        r"the weights after step 1 differ from the run's \(fingerprint \w{32}, t",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_records_are_refused(name: str, run: Run, tmp_path: Path) -> None:
    records, message = FORGED[name]
    ledger = read(forge(tmp_path / "forged.zo", run, records))
    with pytest.raises(LedgerError, match=message):
        replay(ledger, run.base)


RUNS_CODE = {
    "compile",
    "exec",
    "import",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "subprocess.Popen",
}
_seen: list[str] | None = None


def _watch(event: str, arguments: Any) -> None:
    if _seen is not None and event in RUNS_CODE:
        _seen.append(event)


def test_forged_records_run_nothing(run: Run, tmp_path: Path) -> None:
    """As the interpreter itself sees it: nothing is compiled, imported, unpickled or started for a file."""
    global _seen
    sys.addaudithook(_watch)  # for good; silent while nobody asks
    ledgers = [read(forge(tmp_path / f"forged {i}.zo", run, records)) for i, (records, _) in enumerate(FORGED.values())]
    for ledger in ledgers:  # once to load what torch loads when first used
        with pytest.raises(LedgerError):
            replay(ledger, run.base)
    bases = [run.base for _ in ledgers]
    _seen = []
    refused = 0
    for ledger, base in zip(ledgers, bases, strict=True):
        try:
            replay(read(ledger.path), base)
        except LedgerError:
            refused += 1
    found, _seen = _seen, None
    assert (refused, found) == (len(FORGED), [])
