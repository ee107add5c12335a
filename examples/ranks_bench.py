"""Several ranks on this machine: time and bytes of an exchange, scaling efficiency, and a slow network.

python examples/ranks_bench.py                      # two ranks, each pinned to a core
python examples/ranks_bench.py --ranks 4            # four ranks on the cores there are
python examples/ranks_bench.py --ranks 8 --delay 0.1 --rate 1e6 --width 64 --batch 8 --steps 5 --rounds 3

Efficiency is the time of a step of processes that do not talk to each other, each pinned to a core, over the time of a step of
the same processes as ranks: both on the same model and batches, at the same time on all cores, in rounds that take turns. CPU
seconds are given as well, since wall time is a matter of the machine's other work. With a delay the ranks are in network
namespaces, see ranks/slow_network.py, and the gradients that DDP would sum travel over the same links.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks.slow_network import SlowNetwork, address
from torch import nn
from torch.optim import SGD

from zolightning import Session, ZOConfig
from zolightning.parallel import Parallel, Team

CONFIG = ZOConfig(estimator="spsa", structure="dense", select="all", lr=1e-4, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, >= 2")
    parser.add_argument("--width", type=int, default=1024, help="of the model's three square layers")
    parser.add_argument("--batch", type=int, default=512, help="examples of each rank")
    parser.add_argument("--steps", type=int, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of either kind")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds from one rank to another")
    parser.add_argument("--rate", type=float, default=0.0, help="bits a second of each rank's link; 0: as it is")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that the network loses")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments)
    else:
        launch(arguments)


def launch(arguments: argparse.Namespace) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with TemporaryDirectory() as folder:
        shared = {"MASTER_PORT": str(port), "WORLD_SIZE": str(arguments.ranks), "OUT": folder, "OMP_NUM_THREADS": "1"}
        shared["MASTER_ADDR"] = address(0) if arguments.delay else "127.0.0.1"
        environments = [{**os.environ, **shared, "RANK": str(rank)} for rank in range(arguments.ranks)]
        command = [sys.executable, *sys.argv]
        if arguments.delay:
            network = SlowNetwork(arguments.ranks, arguments.delay, arguments.rate, arguments.loss)
            ranks = network.start(command, environments)
        else:
            ranks = [subprocess.Popen(command, env=environment) for environment in environments]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
        show(arguments, [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(arguments.ranks)])


def work(arguments: argparse.Namespace) -> None:
    """One rank: rounds by itself and rounds with the others, in turns."""
    torch.set_num_threads(1)
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo")
    slow = Team(Parallel(check_every=1000))
    steps = {"alone": stepper(arguments, None), "ranks": stepper(arguments, slow)}
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "ranks": []}
    for step in steps.values():
        step()  # set-up
    traffic = slow.exchange.traffic
    before = (traffic.sent, traffic.calls, traffic.seconds)
    for _ in range(arguments.rounds):
        for kind, step in steps.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps):
                step()
            times[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
    sent, calls, seconds = (
        now - then for now, then in zip((traffic.sent, traffic.calls, traffic.seconds), before, strict=True)
    )
    bare = []
    for _ in range(5 if arguments.delay else 50):
        dist.barrier()
        began = time.perf_counter()
        slow.exchange.gather(b"0" * 44)
        bare.append(time.perf_counter() - began)
    found = {"times": times, "sent": sent, "calls": calls, "seconds": seconds, "bare": statistics.median(bare)}
    if arguments.delay:
        gradients = torch.zeros(weights_of(arguments))
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradients)
        found["ddp"] = time.perf_counter() - began
    (Path(os.environ["OUT"]) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def stepper(arguments: argparse.Namespace, ranks: Team | None) -> Callable[[], None]:
    width = arguments.width
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())))
    session = Session(net, SGD(net.parameters(), lr=1.0), CONFIG, ranks=ranks)
    x, y = torch.randn(arguments.batch, width), torch.randn(arguments.batch, width)

    def step() -> None:
        session.estimate(lambda batch: F.mse_loss(net(batch[0]), batch[1]), (x, y))
        session.update()

    return step


def weights_of(arguments: argparse.Namespace) -> int:
    return int(3 * arguments.width * (arguments.width + 1))


def show(arguments: argparse.Namespace, found: list[dict]) -> None:  # type: ignore[type-arg]
    weights = weights_of(arguments)
    size, steps = arguments.ranks, arguments.steps
    wall, cpu = [], []
    for number in range(arguments.rounds):
        alone, ranks = ([rank["times"][kind][number] for rank in found] for kind in ("alone", "ranks"))
        wall.append(max(t for t, _ in alone) / max(t for t, _ in ranks))
        cpu.append(sum(c for _, c in alone) / sum(c for _, c in ranks))
    longest = [max(rank["times"]["ranks"][i][0] for rank in found) / steps for i in range(arguments.rounds)]
    own, each = found[0]["sent"] / found[0]["calls"], statistics.median(longest)
    ddp = 2 * (size - 1) / size * 4 * weights
    print(f"{size} ranks, {weights:,} weights, {arguments.batch} examples a rank, {arguments.rounds} rounds of {steps} steps")
    print(f"step: {1e3 * each:.1f} ms; payload {own:.0f} bytes a step and rank; DDP's ring sends {ddp:,.0f} bytes in float32")
    mean = 1e3 * found[0]["seconds"] / found[0]["calls"]
    print(f"exchange: {1e3 * found[0]['bare']:.2f} ms when all are ready, {mean:.2f} ms a step with waiting")
    print(f"efficiency, wall: {statistics.median(wall):.3f} ({min(wall):.3f}-{max(wall):.3f})")
    print(f"efficiency, CPU seconds: {statistics.median(cpu):.3f} ({min(cpu):.3f}-{max(cpu):.3f})")
    if arguments.delay:
        print(f"DDP's gradients on the same links: {max(rank['ddp'] for rank in found):.1f} s a step, measured with all_reduce")
        for count in (weights, 125_000_000):
            hops, rate = 2 * (size - 1), arguments.rate or float("inf")
            by_ring = hops * (arguments.delay + 8 * 4 * count / size / rate)
            print(f"by arithmetic, 2(R - 1)·(delay + bytes / R / rate), {count:,} weights: {by_ring:,.1f} s a step")


if __name__ == "__main__":
    main()
