"""Weights that live in a tier give the bits of weights in memory, whatever the pool, the tier and the leaf."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from zolightning.engine.updates import apply_update, changes
from zolightning.noise import DISTRIBUTIONS
from zolightning.offload.disk import DiskTier
from zolightning.offload.entry import Entry
from zolightning.offload.files import OffloadError
from zolightning.offload.residency import StoredParameter, bind, stored
from zolightning.offload.schedule import Forecast
from zolightning.offload.store import Store
from zolightning.offload.tiers import HostTier, Tier
from zolightning.space import Rank1, Structure, View, build_view
from zolightning.space.structure import LowRank, Sparse
from zolightning.types import Key, Term

STEPS = 3


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)]
    whole = nn.Sequential(nn.Embedding(300, 256), *layers, nn.Linear(256, 300, bias=False)).to(dtype)
    whole[-1].weight = whole[0].weight  # tied
    return whole


def offloaded(module: nn.Module, tier: Tier, **options: Any) -> Store:
    store = Store(tier, **options)
    for name, parameter in module.named_parameters():
        if parameter.numel() > 1 << 16:
            tier.keep(name, parameter.detach())
            entry = Entry(name, parameter.shape, parameter.dtype, parameter.device)
            store.add(entry)
            bind(parameter, [entry], store)
    tier.read_bytes = tier.written_bytes = 0
    return store


def disk() -> DiskTier:
    return DiskTier(folder=Path("work"))


@contextmanager
def running(store: Store) -> Iterator[Store]:
    store.start()
    try:
        yield store
    finally:
        store.stop()


class Outcome(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


@torch.no_grad()
def trained(
    module: nn.Module,
    store: Store | None,
    make: Callable[[Any], Optimizer],
    structure: str | Structure = "dense",
    steps: int = STEPS,
) -> Outcome:
    """Two-point steps by hand, on resident weights or on stored ones."""
    optimizer = make(module.parameters())
    view = build_view(module, module.parameters(), DISTRIBUTIONS["gaussian"](), structure=structure)
    batch = torch.arange(64).view(4, 16) * 4
    losses: list[float] = []
    for step in range(steps):
        key = Key(3, step)
        for side in (1e-2, -1e-2):
            with view.along(key, side):
                losses.append(F.cross_entropy(module(batch).float().flatten(0, 1), batch.flatten()).item())
        update(optimizer, view, store, [Term(key, (losses[-2] - losses[-1]) / 2e-2)], key)
    if store is not None:
        store.flush()
    return Outcome(losses, {name: p.detach().clone() for name, p in module.named_parameters()})


def update(optimizer: Optimizer, view: View, store: Store | None, terms: list[Term], key: Key) -> None:
    away = {id(p) for p in stored(leaf.parameter for leaf in view.leaves)}
    apply_update(optimizer, [leaf for leaf in view.leaves if id(leaf.parameter) not in away], terms, key)
    later = [leaf for leaf in view.leaves if id(leaf.parameter) in away]
    if store is not None:
        for change, members in changes(optimizer, later, terms, key):
            store.defer(change, {entry: leaf for leaf in members for entry in leaf.parameter.entries})


def same(a: Outcome, b: Outcome) -> bool:
    return a.losses == b.losses and all(torch.equal(value, b.weights[name]) for name, value in a.weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=1e-3, weight_decay=0.1), lambda p: AdamW(p, lr=1e-3)])
@pytest.mark.parametrize("options", [{}, {"prefetch": 0}, {"write_every": 3}])
def test_disk_gives_the_bits_of_memory(dtype: torch.dtype, make: Callable[[Any], Optimizer], options: dict[str, int]) -> None:
    module = net(dtype)
    with running(offloaded(module, disk(), **options)) as store:
        assert same(trained(module, store, make), trained(net(dtype), None, make))


@pytest.mark.parametrize("structure", [Sparse(0.75), LowRank(2, 2), Rank1()])
def test_every_leaf_gives_the_bits_of_memory(structure: Structure) -> None:
    make = lambda p: SGD(p, lr=1e-3)  # noqa: E731
    module = net()
    with running(offloaded(module, HostTier(torch.device("cpu")))) as store:
        assert same(trained(module, store, make, structure), trained(net(), None, make, structure))


def test_frozen_weights_are_never_written() -> None:
    module = net()
    module[1].requires_grad_(False)
    resident = net()
    resident[1].requires_grad_(False)
    tier = disk()
    make = lambda p: SGD([x for x in p if x.requires_grad], lr=1e-3)  # noqa: E731
    with running(offloaded(module, tier)) as store:
        assert same(trained(module, store, make), trained(resident, None, make))
        trainable = sum(p.nbytes for p in stored(module.parameters()) if p.requires_grad)
    assert tier.written_bytes == STEPS * trainable


def test_a_step_reads_each_forward_and_writes_once_in_a_pool_of_two() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(320, 320, bias=False) for _ in range(12)))
    tier, weights = disk(), 12 * 320 * 320 * 4
    with running(offloaded(module, tier)) as store, torch.no_grad():
        optimizer = SGD(module.parameters(), lr=1e-3)
        view = build_view(module, module.parameters(), DISTRIBUTIONS["rademacher"]())
        for step in range(6):
            for side in (1e-2, -1e-2):
                with view.along(Key(0, step), side):
                    module(torch.ones(2, 320))
            update(optimizer, view, store, [Term(Key(0, step), 1.0)], Key(0, step))
        store.flush()
    assert store.most_in_memory <= store.pool == 2 * 320 * 320 * 4
    assert tier.written_bytes == 6 * weights
    assert tier.read_bytes <= 13 * weights + store.pool  # the flush reads once more, and then it is read ahead


def test_a_weight_that_no_step_reads_costs_nothing_and_catches_up() -> None:
    module, resident = net(), net()
    tier = disk()
    with running(offloaded(module, tier, prefetch=0)) as store:
        make = lambda p: SGD(p, lr=1e-3)  # noqa: E731
        for m in (module, resident):
            view = build_view(m, m.parameters(), DISTRIBUTIONS["gaussian"]())
            for step in range(5):
                update(make(m.parameters()), view, store if m is module else None, [Term(Key(0, step), 1.0)], Key(0, step))
        assert tier.read_bytes == 0
        for name, parameter in resident.named_parameters():
            assert torch.equal(module.get_parameter(name).detach(), parameter.detach()), name


def test_whoever_reads_gets_the_weights_of_now() -> None:
    module, resident = net(), net()
    with running(offloaded(module, disk())) as store:
        trained(module, store, lambda p: SGD(p, lr=1e-2), steps=1)
        trained(resident, None, lambda p: SGD(p, lr=1e-2), steps=1)
        x = torch.arange(8).view(2, 4)
        assert torch.equal(module(x), resident(x))  # no probe, no context
        states = module.state_dict()
        assert all(torch.equal(states[name], value) for name, value in resident.state_dict().items())
        assert module[1].weight.dtype is torch.float32
        assert module[1].weight.is_contiguous() and module[1].weight.stride() == (256, 1)
        assert module.to("cpu") is module and isinstance(module[1].weight, StoredParameter)


def test_a_read_past_the_function_protocol_is_nan_and_not_old_weights() -> None:
    module = net()
    offloaded(module, disk())
    with torch._C.DisableTorchFunctionSubclass():
        assert F.linear(torch.ones(1, 256), module[1].weight, module[1].bias).isnan().all()


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(2),
        lambda p: nn.init.zeros_(p),
        lambda p: torch.zeros(p.shape, out=p),
        lambda p: setattr(p, "data", torch.zeros(p.shape)),
        copy.deepcopy,
    ],
)
@torch.no_grad()
def test_writes_are_refused(write: Callable[[Any], Any]) -> None:
    module = net()
    offloaded(module, disk())
    with pytest.raises(OffloadError, match=r"'1\.weight'"):
        write(module[1].weight)


@torch.no_grad()
def test_a_write_into_the_memory_of_a_weight_is_noticed() -> None:
    module = net()
    offloaded(module, disk())
    module[1].weight.data.mul_(2)
    with pytest.raises(OffloadError, match=r"'1\.weight' was written to"):
        module(torch.arange(8).view(2, 4))


def test_moving_a_module_to_where_it_is_reads_nothing() -> None:
    module, tier = net(), disk()
    offloaded(module, tier)
    assert module.to("cpu").to(torch.float32) is module
    assert tier.read_bytes == 0


def test_conversions_of_an_offloaded_module_are_refused() -> None:
    module = net()
    offloaded(module, disk())
    with pytest.raises(OffloadError, match="dtype"):
        module.half()


def test_a_full_disk_stops_the_run_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module, tier = net(), disk()
    with running(offloaded(module, tier)) as store:
        trained(module, store, lambda p: SGD(p, lr=1e-3), steps=1)

        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.pwritev", full)
        with pytest.raises(OffloadError, match="No space left on device"):
            trained(module, store, lambda p: SGD(p, lr=1e-3), steps=2)


def test_tensors_that_are_written_at_a_time_get_rooms_of_their_own() -> None:
    for _ in range(5):
        tier = disk()
        tensors = {f"w{i}": torch.full((4096,), float(i)) for i in range(16)}
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(tier.write, tensors, tensors.values()))
        assert all(torch.equal(tier.read(name), tensor) for name, tensor in tensors.items())
        tier.close()


def test_a_lost_work_file_is_noticed() -> None:
    module, tier = net(), disk()
    with running(offloaded(module, tier)) as store:
        trained(module, store, lambda p: SGD(p, lr=1e-3), steps=1)
        shutil.rmtree("work")
        with pytest.raises(OffloadError, match="moved or deleted"):
            trained(module, store, lambda p: SGD(p, lr=1e-3), steps=1)


def test_forecast_learns_what_follows_and_gives_up_on_chance() -> None:
    forecast = Forecast(["a", "b", "c"])
    assert list(forecast.ahead(3)) == ["a", "b"]
    for item in "axbxc" * 2:  # x is read twice a pass: what follows depends on what came before
        forecast.note(item)
    assert list(forecast.ahead(4)) == ["a", "x", "b", "x"]
    for _ in range(3):
        forecast.wasted("x")
    assert list(forecast.ahead(4)) == ["a", "b"]
