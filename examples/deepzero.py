"""Train small networks from scratch without backprop: SPSA, groups of weights, coordinates, beside backprop.

    python examples/deepzero.py --out results.json
    python examples/deepzero.py --data mnist --seeds 0 1 --forwards 4000
    python examples/deepzero.py --only reuse resnet

DeepZero, arXiv:2310.02025, on scikit-learn's digits (8 × 8) and on 5,000 digits of MNIST (14 × 14). All methods get the same
forwards, and the table has their accuracy after the same CPU seconds too. Steps are normalised but in the row of the paper's
settings, and their size falls along a cosine; it comes from a grid, tried on a validation part of the training data
with a seed of its own and a quarter of the forwards. Each finished run is printed and kept in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning import Groups, Session, ZOConfig
from zolightning.commands.tables import markdown, spread
from zolightning.data.mnist import mnist_5k
from zolightning.methods.recipes import DEEPZERO

BATCH, LOOKS, BACKPROP = 128, 20, 3
"""Examples of a batch; evaluations of a run; forwards that a step of backprop counts as."""

RGE = ZOConfig(estimator="one_sided", num_queries=64, select="all", structure="dense", optimizer="momentum")
TENTH = Groups("size", 0.9, 50, "grasp")
RATES, PLAIN = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (3e-2, 1e-1, 3e-1, 1.0)
"""For normalised steps, and for steps of the gradient's size."""


@dataclass(frozen=True)
class Method:
    """A row of the table; without settings it is backprop."""

    title: str
    rates: tuple[float, ...]
    config: ZOConfig | None = None


METHODS = {
    "spsa": Method("SPSA, 1 direction", RATES, RGE.override(estimator="spsa", num_queries=1)),
    "rge": Method("SPSA, 64 directions", RATES, RGE),
    "size": Method("64 groups of one size", RATES, RGE.override(structure=Groups("size"))),
    "even": Method("64 groups, even over parameters", RATES, RGE.override(structure=Groups("even"))),
    "gradient": Method("64 groups, allocated by gradient", RATES, RGE.override(structure=Groups("gradient"))),
    "cge": Method("coordinates of a tenth", RATES, DEEPZERO.override(structure=TENTH, normalize=True)),
    "deepzero": Method("the same, steps as in the paper", PLAIN, DEEPZERO.override(structure=TENTH)),
    "backprop": Method("backprop", PLAIN),
}


@dataclass(frozen=True)
class Data:
    """Images (n, 1, h, w) and labels, in three parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(name: str, offline: bool) -> Data:
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    else:
        images, labels = mnist_5k(offline)
        images = F.avg_pool2d(images[:, None], 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    count = len(order)
    train, validation, test = order.split([count * 6 // 10, count // 10, count - count * 6 // 10 - count // 10])
    return Data(*((images[rows], labels[rows]) for rows in (train, validation, test)))


def cnn(widths: Sequence[int] = (4, 4, 8)) -> nn.Sequential:
    """Three convolutions and a linear layer."""
    a, b, c = widths
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """A block of two convolutions, beside which the input goes on."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.stride, self.out = out // inside, out
        self.branch = nn.Sequential(
            nn.Conv2d(inside, out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, 0, self.out - short.shape[1]))
        return F.relu(self.branch(x) + short, inplace=True)


def resnet20() -> nn.Sequential:
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Residual(a, b) for a, b in pairwise(widths)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def accuracy(net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((net(part[0]).argmax(1) == part[1]).double().mean())


def steps(net: nn.Module, config: ZOConfig | None, lr: float, data: Data, seed: int, forwards: int) -> Iterator[int]:
    """Train step by step; gives the forwards until then, those of setting up included. At ``forwards`` the rate is 0."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    session = config and Session(
        net, optimizer, config.override(lr="module", seed=seed), repeatable=False, inform=lambda line: None
    )
    spent = 0

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal spent
        spent += 1 if session else BACKPROP
        return F.cross_entropy(net(batch[0]), batch[1])

    while True:
        rows = torch.randint(len(data.train[0]), (BATCH,), generator=draw)
        batch = data.train[0][rows], data.train[1][rows]
        optimizer.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(math.pi * min(1.0, spent / forwards)))
        if session is not None:
            session.estimate(loss, batch)
            session.update()
        else:
            optimizer.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield spent


def run(method: Method, lr: float, data: Data, seed: int, forwards: int, part: tuple[Tensor, Tensor]) -> list[list[float]]:
    """(forwards, CPU seconds of training, accuracy) along the way; not finite weights are at chance."""
    torch.manual_seed(seed)
    net, spent, seconds, curve = cnn(), 0, 0.0, []
    training = steps(net, method.config, lr, data, seed, forwards)
    while spent < forwards:
        begun = time.process_time()
        try:
            spent = next(training)
        except RuntimeError as error:  # the loss was not finite for too long
            print(f"  lr {lr}: {error}")
            return [*curve, [forwards, seconds, 0.1]]
        seconds += time.process_time() - begun
        if spent >= forwards * (len(curve) + 1) / LOOKS or spent >= forwards:
            curve.append([spent, seconds, accuracy(net, part)])
    return curve


def compare(name: str, data: Data, keys: Sequence[str], seeds: Sequence[int], forwards: int, keep: Any) -> None:
    for key in keys:
        method = METHODS[key]
        tried = {lr: run(method, lr, data, 1000, forwards // 4, data.validation)[-1][2] for lr in method.rates}
        lr = max(tried, key=lambda rate: tried[rate])
        for seed in seeds:
            curve = run(method, lr, data, seed, forwards, data.test)
            print(f"{name} {key} lr {lr} seed {seed}: {100 * curve[-1][2]:.1f} % in {curve[-1][1]:.1f} CPU s", flush=True)
            keep({"data": name, "method": key, "lr": lr, "tried": tried, "seed": seed, "curve": curve})


def reuse_ratio(keep: Any, rounds: int = 5, queries: int = 200) -> None:
    """A step's CPU seconds with all forwards whole and with kept features, interleaved, and whether their losses are equal."""
    torch.manual_seed(0)
    x, y = torch.rand(256, 1, 8, 8), torch.randint(10, (256,))
    rows: dict[str, list[float]] = {"whole": [], "reuse": []}
    losses: dict[str, Any] = {}
    sessions = {}
    for kind, room in (("whole", 0.0), ("reuse", 256.0)):
        torch.manual_seed(1)
        net = cnn((16, 32, 32))
        config = RGE.override(num_queries=queries, structure=Groups("size", reuse=room), normalize=False, seed=1, lr=0.0)
        session = Session(net, torch.optim.SGD(net.parameters(), lr=0.0), config, repeatable=False, inform=lambda line: None)
        sessions[kind] = session, net
    for turn in range(rounds + 1):
        for kind, (session, net) in sessions.items():
            begun = time.process_time()
            estimate = session.estimate(lambda batch, net=net: F.cross_entropy(net(batch[0]), batch[1]), (x, y))
            if turn:  # the first one compares
                rows[kind].append(time.process_time() - begun)
            losses[kind] = estimate and estimate.losses
            session.update()
    ratios = [whole / reuse for whole, reuse in zip(rows["whole"], rows["reuse"], strict=True)]
    equal = losses["whole"] == losses["reuse"]
    print(f"reuse: {fmean(ratios):.2f} x faster ({min(ratios):.2f} to {max(ratios):.2f}), equal bit for bit: {equal}")
    keep({"reuse": ratios, "equal": equal, "seconds": rows, "queries": queries})


def resnet_epoch(keep: Any, queries: int = 24, batch: int = 256) -> None:
    """One step of a few groups on ResNet-20's shape, and what an epoch of the recipe would take by arithmetic."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    seconds = {}
    for kind, room in (("whole", 0.0), ("reuse", 2048.0)):
        net = resnet20()
        config = RGE.override(num_queries=queries, structure=Groups("size", sparsity=0.9, reuse=room), seed=1, lr=1e-3)
        session = Session(net, torch.optim.SGD(net.parameters(), lr=0.1), config, repeatable=False, inform=lambda line: None)
        for _ in range(2):  # the first one compares
            begun = time.process_time()
            session.estimate(lambda batch, net=net: F.cross_entropy(net(batch[0]), batch[1]), (x, y))
            seconds[kind] = (time.process_time() - begun) / (queries + 1)
            session.update()
    weights = sum(p.numel() for p in net.parameters())
    each, per_epoch = round(0.1 * weights) + 1, 50_000 // batch
    hours = {kind: value * each * per_epoch / 3600 for kind, value in seconds.items()}
    print(
        f"resnet-20: {weights} weights, {each} forwards a step, {per_epoch} steps an epoch; "
        f"CPU s a forward {seconds}, hours {hours}"
    )
    keep({"resnet": seconds, "weights": weights, "forwards": each, "steps": per_epoch, "hours": hours})


def at_seconds(curve: Sequence[Sequence[float]], seconds: float) -> float:
    """The accuracy of the last look by then."""
    return max((look for look in curve if look[1] <= seconds), key=lambda look: look[1], default=[0, 0, 0.1])[2]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by method: after all forwards, and after the CPU seconds of the fastest method without gradients."""
    tables = []
    for name in dict.fromkeys(r["data"] for r in results if "data" in r):
        runs = [r for r in results if r.get("data") == name]
        budget = min((r["curve"][-1][1] for r in runs if r["method"] != "backprop"), default=0.0)
        rows = []
        for key in dict.fromkeys(r["method"] for r in runs):
            own = [r for r in runs if r["method"] == key]
            ends = spread([100 * r["curve"][-1][2] for r in own], 1)
            there = fmean(100 * at_seconds(r["curve"], budget) for r in own)
            seconds = fmean(r["curve"][-1][1] for r in own)
            rows.append([METHODS[key].title, str(own[0]["lr"]), ends, f"{there:.1f}", f"{seconds:.1f}"])
        forwards = f"after {runs[0]['curve'][-1][0]:,.0f} forwards"
        tables.append(markdown((name, "lr", forwards, f"after {budget:.1f} CPU s", "CPU s in all"), rows))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist"), default=["digits"])
    parser.add_argument("--only", nargs="+", choices=("compare", "reuse", "resnet"), default=["compare", "reuse", "resnet"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--forwards", type=int, default=16_000)
    parser.add_argument("--offline", action="store_true", help="take MNIST from the cache only")
    parser.add_argument("--out", type=Path, help="where the results are kept, and added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out and options.out.exists() else []

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        if options.out:
            options.out.write_text(json.dumps(results))

    if "reuse" in options.only:
        reuse_ratio(keep)
    if "resnet" in options.only:
        resnet_epoch(keep)
    if "compare" in options.only:
        for name in options.data:
            compare(name, load(name, options.offline), options.methods, options.seeds, options.forwards, keep)
    print(table(results))


if __name__ == "__main__":
    main()
