"""FZooS and FedZO on FZooS's quadratic: 300 weights, five clients, queries until the gap to the optimum is 0.05.

python examples/federated_surrogate.py                      # one seed of both
python examples/federated_surrogate.py --seeds 0 1 2 3 4    # the table in examples/federated/README.md
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zolightning import ZOConfig, ZOMixin
from zolightning.federated import simulate
from zolightning.methods.surrogate import Surrogate

WEIGHTS, CLIENTS = 300, 5


class Quadratic(ZOMixin, nn.Module):
    """f_i(x) = (0.1/d)·(a_i·y² + b_i·y + 1), y = 20·clip(x, 0, 1) − 10; the batch holds a_i and b_i."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)

    def zo_objective(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        a, b = batch
        y = 20 * self.x.clamp(0, 1) - 10
        return 0.1 / WEIGHTS * (a @ y**2 + b @ y + 1)


def problem(seed: int) -> tuple[list[list[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor], Tensor]:
    """Each client's function, their mean, and the start; Dirichlet coefficients as in FZooS's experiments."""
    draw = np.random.default_rng(seed)
    a, b = (1 + draw.dirichlet([1 / CLIENTS] * CLIENTS, WEIGHTS) - 1 / CLIENTS for _ in range(2))
    shards = [[(torch.tensor(a[:, i]), torch.tensor(b[:, i]))] for i in range(CLIENTS)]
    return shards, (torch.tensor(a.mean(1)), torch.tensor(b.mean(1))), torch.tensor(draw.uniform(size=WEIGHTS))


def run(config: ZOConfig, queries: int, rounds: int, local_steps: int, decay: float, seed: int) -> dict[str, float]:
    """Queries, of all clients together, to a gap of 0.05, and at the end the gap and the weights outside of the box, which have
    no gradient and stay there.
    """
    shards, mean, start = problem(seed)
    module = Quadratic(start)
    y = -mean[1] / (2 * mean[0])  # inside of the box
    best = float(0.1 / WEIGHTS * (mean[0] @ y**2 + mean[1] @ y + 1))

    def gap(module: nn.Module) -> float:
        with torch.no_grad():
            return float(module.zo_objective(mean)) - best

    began = time.process_time()
    done = simulate(
        module, shards, config, rounds=rounds, local_steps=local_steps, evaluate=gap, every=1,
        schedule=lambda number: 1 / (1 + decay * number),
    )  # fmt: skip
    spent = [(number + 1) * local_steps * queries * CLIENTS for number in done.values]
    reached = [n for n, value in zip(spent, done.values.values(), strict=True) if value <= 0.05]
    return {
        "to_0.05": reached[0] if reached else math.nan,
        "queries": spent[-1],
        "gap": list(done.values.values())[-1],
        "outside": int(((module.x < 0) | (module.x > 1)).sum()),
        "up_kb": done.bytes_up / 1e3,
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.5], help="of FZooS")
    parser.add_argument("--decay", type=float, nargs="+", default=[0.0], help="of both: the rate is lr/(1 + decay·round)")
    parser.add_argument("--correction", type=float, nargs="+", default=[0.0], help="gamma of FZooS")
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--fedzo-queries", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--fedzo-lr", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--fedzo-rounds", type=int, default=60)
    parser.add_argument("--only", choices=["fzoos", "fedzo"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []

    def show(**row: object) -> None:
        rows.append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows))

    plain = {"select": "all", "structure": "dense", "normalize": False}
    for seed in args.seeds:
        if args.only != "fedzo":
            for lr, decay, gamma in product(args.lr, args.decay, args.correction):
                surrogate = Surrogate(args.eps, WEIGHTS, correction=gamma)
                config = ZOConfig(surrogate, lr=lr, seed=seed, **plain)
                found = run(config, surrogate.probes + 1, args.rounds, args.local_steps, decay, seed)
                show(method="fzoos", lr=lr, decay=decay, correction=gamma, seed=seed, **found)
        if args.only != "fzoos":
            for queries, lr, decay in product(args.fedzo_queries, args.fedzo_lr, args.decay):
                config = ZOConfig("one_sided", num_queries=queries, eps=args.eps, lr=lr, seed=seed, **plain)
                rounds = max(1, args.fedzo_rounds * 6 // (queries + 1))
                found = run(config, queries + 1, rounds, args.local_steps, decay, seed)
                show(method="fedzo", num_queries=queries, lr=lr, decay=decay, seed=seed, **found)


if __name__ == "__main__":
    main()
