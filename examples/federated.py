"""Ten clients with two classes of digits each, which send projected gradients; beside them FedAvg by backprop.

python examples/federated.py                    # one seed of both, about a minute of CPU time
python examples/federated.py --seeds 0 1 2 3 4  # the table in examples/federated/README.md
python examples/federated.py --epsilon 8        # noise on clipped coefficients: differential privacy for each picture

The digits are scikit-learn's (1,797 pictures of 8 × 8); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from zolightning import ZOConfig, ZOMixin
from zolightning.federated import simulate
from zolightning.methods.private import PrivateSPSA, noise_for

Shard = tuple[Tensor, Tensor]
CLIENTS = 10


class Digits(ZOMixin, nn.Module):
    """A classifier of 8 × 8 pictures."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        sizes = [64, hidden, 10] if hidden else [64, 10]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [nn.Tanh()] * (i > 0) + [nn.Linear(inputs, outputs)]
        self.net = nn.Sequential(*layers)

    def zo_objective(self, batch: Shard) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none")


def data(seed: int) -> tuple[list[Shard], Shard]:
    """A shard of two neighbouring classes for each client, half of the training pictures of either, and the test set."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 8 - 0.6, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    halves = [torch.tensor_split(train[y[train] == label], 2) for label in range(10)]
    shards = [torch.cat([halves[c][0], halves[(c + 1) % 10][1]]) for c in range(CLIENTS)]
    return [(x[s], y[s]) for s in shards], (x[test], y[test])


def accuracy(module: nn.Module, test: Shard) -> float:
    with torch.no_grad():
        return 100 * float((module.net(test[0]).argmax(-1) == test[1]).double().mean())


def by_coefficients(args: argparse.Namespace, seed: int) -> dict[str, float]:
    shards, test = data(seed)
    torch.manual_seed(seed)
    module = Digits(args.hidden)
    structure = "rank1" if args.epsilon else "dense"  # examples that are clipped read directions for themselves
    estimator = private(args) if args.epsilon else "one_sided"
    config = ZOConfig(estimator, select="all", structure=structure, lr=args.lr, optimizer=args.optimizer, seed=seed)
    began = time.process_time()
    done = simulate(
        module, [[shard] for shard in shards], config, rounds=args.rounds, local_steps=args.local_steps, queries=args.queries,
        schedule=lambda number: math.cos(math.pi / 2 * number / args.rounds),
        evaluate=lambda module: accuracy(module, test), every=max(1, args.rounds // 5),
    )  # fmt: skip
    return {
        "accuracy": list(done.values.values())[-1],
        "up_mb": done.bytes_up / 1e6,
        "down_mb": done.bytes_down / 1e6,
        "cpu_seconds": time.process_time() - began,
        **{f"after_{number + 1}": value for number, value in done.values.items()},
    }


def private(args: argparse.Namespace) -> PrivateSPSA:
    """Noise for this budget over all rounds; inf: the clip only."""
    noise = 0.0 if math.isinf(args.epsilon) else noise_for(args.epsilon, args.rounds)
    return PrivateSPSA(1e-3, args.queries, clip=args.clip, noise=noise)


def by_backprop(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """FedAvg, arXiv:1602.05629: all weights of all clients up in each round."""
    shards, test = data(seed)
    torch.manual_seed(seed)
    module = Digits(args.hidden)
    size = 4 * sum(p.numel() for p in module.parameters())
    examples = sum(len(y) for _, y in shards)
    found, began = {}, time.process_time()
    for number in range(args.fedavg_rounds):
        ends = []
        for shard in shards:
            local = copy.deepcopy(module)
            optimizer = torch.optim.SGD(local.parameters(), lr=args.fedavg_lr)
            for _ in range(args.fedavg_steps):
                optimizer.zero_grad()
                local.zo_objective(shard).mean().backward()
                optimizer.step()
            ends.append(nn.utils.parameters_to_vector(local.parameters()).detach() * (len(shard[1]) / examples))
        nn.utils.vector_to_parameters(torch.stack(ends).sum(0), module.parameters())
        up = (number + 1) * size * CLIENTS
        if up <= 1.2e6:
            found["accuracy_at_1.2_mb"] = accuracy(module, test)
    return found | {
        "accuracy": accuracy(module, test),
        "up_mb": args.fedavg_rounds * size * CLIENTS / 1e6,
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden", type=int, default=32, help="width of a hidden layer; 0: none")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--queries", type=int, default=20, help="directions of a step, shared by the clients")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--epsilon", type=float, default=0.0, help="of each client's examples, at delta 1e-5; inf: clip only")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of an example's projected gradients")
    parser.add_argument("--fedavg-rounds", type=int, default=50)
    parser.add_argument("--fedavg-steps", type=int, default=5)
    parser.add_argument("--fedavg-lr", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--only", choices=["coefficients", "backprop"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for name, run in (("coefficients", by_coefficients), ("backprop", by_backprop)):
            if args.only in (None, name):
                rows.append({"method": name, "seed": seed} | run(args, seed))
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
                if args.out:
                    args.out.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))


if __name__ == "__main__":
    main()
