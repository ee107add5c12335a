"""The step size that ``ZOStrategy()`` finds, beside the best learning rate of a sweep, on ten small modules.

    python examples/benchmarks/step_size.py --steps 200    # ten rates × three seeds × ten modules: ten CPU minutes
    python examples/benchmarks/step_size.py --grid         # unchanged modules: five optimizers × three schedules × ten modules
    python examples/benchmarks/step_size.py --modules gru conv --seeds 5

Every run is the default recipe in the real engine, for the same number of steps. Losses are of examples that are not trained
on. ``--grid`` says how many runs end above the loss that they began with; there should be none.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from zolightning import Session, recipes

Batch = tuple[Tensor, Tensor]
SHARES = (0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Learning rates, as shares of the RMS of the trained weights."""
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD 1e-1": lambda p: SGD(p, lr=1e-1),
    "SGD 1e-2": lambda p: SGD(p, lr=1e-2),
    "SGD 1e-3": lambda p: SGD(p, lr=1e-3),
    "AdamW 1e-3": lambda p: AdamW(p, lr=1e-3),
    "AdamW 2e-5": lambda p: AdamW(p, lr=2e-5),
}
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler | None]] = {
    "none": lambda optimizer, steps: None,
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "warm-up": lambda optimizer, steps: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps))),
}


class Problem(NamedTuple):
    """A module and what it learns.

    Args:
        build: makes the module.
        data: how many examples, and a generator → inputs and targets.
        loss: of outputs and targets; its mean is what trains.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


class Recurrent(nn.Module):
    """The last hidden state of a GRU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[1][0])  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A transformer over the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.places = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.rows(x.view(-1, 8, 8)) + self.places).mean(1))  # type: ignore[no-any-return]


class Language(nn.Module):
    """A Llama of three blocks, of which the default recipe trains the middle one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.transpose(1, 2)  # type: ignore[no-any-return]


def digits(count: int, generator: torch.Generator) -> Batch:
    """Pictures of 8 × 8 and what they show; the last 500 pictures are for tests."""
    x, y = all_digits()
    places = torch.arange(1297, 1797) if count == TEST else torch.randint(0, 1297, (count,), generator=generator)
    return x[places], y[places]


@cache
def all_digits() -> Batch:
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def pictures(count: int, generator: torch.Generator) -> Batch:
    x, _ = digits(count, generator)
    return x, x


def regression(count: int, generator: torch.Generator) -> Batch:
    """A noisy linear function of inputs whose sizes differ by ten."""
    x = torch.randn(count, 32, generator=generator) * torch.logspace(-1, 0, 32)
    weights = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    return x, x @ weights + 0.3 * torch.randn(count, 1, generator=generator)


def remembered(count: int, generator: torch.Generator) -> Batch:
    """Four symbols in eight places of which the third counts, with noise."""
    symbols = torch.randint(0, 4, (count, 8), generator=generator)
    return F.one_hot(symbols, 4).float() + 0.1 * torch.randn(count, 8, 4, generator=generator), symbols[:, -3]


def chain(count: int, generator: torch.Generator) -> Batch:
    """Texts of a Markov chain, and the tokens that come next."""
    table = torch.randn(24, 24, generator=torch.Generator().manual_seed(2)).mul(2).softmax(-1)
    tokens = [torch.randint(0, 24, (count,), generator=generator)]
    for _ in range(12):
        tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=generator)[:, 0])
    text = torch.stack(tokens, 1)
    return text[:, :-1], text[:, 1:]


TEST = 500
PROBLEMS: dict[str, Problem] = {
    "linear": Problem(lambda: nn.Linear(32, 1), regression, F.mse_loss),
    "softmax": Problem(lambda: nn.Linear(64, 10), digits),
    "mlp": Problem(lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), digits),
    "mlp-ln": Problem(lambda: nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)), digits),
    "mlp-bn": Problem(lambda: nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)), digits),
    "autoencoder": Problem(lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 64)), pictures, F.mse_loss),
    "conv": Problem(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 10),
        ),
        digits,
    ),
    "gru": Problem(Recurrent, remembered),
    "transformer": Problem(Patches, digits),
    "llama": Problem(Language, chain),
}  # fmt: skip


class Run(NamedTuple):
    """Losses on the test examples, and the last step's share of the RMS of the trained weights."""

    before: float
    after: float
    share: float


def train(
    name: str, seed: int, steps: int, optimizer: Callable[[Any], Optimizer], schedule: str = "none", share: float | None = None
) -> Run:
    """One fit by the default recipe, at a learning rate of this share of the weights' RMS; None: at the one that it finds."""
    problem = PROBLEMS[name]
    torch.manual_seed(seed)
    model, generator = problem.build(), torch.Generator().manual_seed(100 + seed)
    held_out = problem.data(TEST, torch.Generator().manual_seed(99))

    def loss(batch: Batch) -> Tensor:
        return problem.loss(model(batch[0]), batch[1])

    def tested() -> float:
        model.eval()
        with torch.no_grad():
            value = float(loss(held_out))
        model.train()
        return value

    before = tested()
    steppers = optimizer(model.parameters())
    scheduler = SCHEDULES[schedule](steppers, steps)
    trained = Session(model, steppers).subspace(loss, held_out).view.leaves
    rms = float(torch.cat([leaf.parameter.detach().flatten() for leaf in trained]).square().mean().sqrt())
    config = recipes.DEFAULT.override(seed=seed, lr="auto" if share is None else share * rms)
    session = Session(
        model, steppers, config, schedulers=[scheduler] if scheduler else [], inform=lambda _: None, warn=lambda _: None
    )
    try:
        for _ in range(steps):
            session.estimate(loss, problem.data(32, generator))
            session.update()
            if scheduler is not None:
                scheduler.step()
    except RuntimeError as error:  # twenty steps without a finite loss: the rate was too large by far
        if share is None:
            raise
        logging.getLogger(__name__).info("%s, %g of the RMS: %s", name, share, error)
    last = session.last_record.lrs[0] / rms if session.last_record else math.nan
    after = tested()
    return Run(before, after if math.isfinite(after) else math.inf, last)


def sweep(names: Sequence[str], seeds: int, steps: int, schedule: str) -> Iterator[dict[str, Any]]:
    """For each module the found step size beside every rate, as means over the seeds."""
    plain = OPTIMIZERS["SGD 1e-1"]
    for name in names:
        found = [train(name, seed, steps, plain, schedule) for seed in range(seeds)]
        runs = {share: [train(name, seed, steps, plain, schedule, share).after for seed in range(seeds)] for share in SHARES}
        losses = {share: fmean(ends) for share, ends in runs.items()}
        best = min(losses, key=losses.__getitem__)
        auto = fmean(run.after for run in found)
        yield {
            "module": name, "before": fmean(run.before for run in found), "auto": auto, "best": losses[best], "share": best,
            "ratio": auto / losses[best], "last": fmean(run.share for run in found),
            "auto runs": [run.after for run in found], "sweep": {str(share): ends for share, ends in runs.items()},
        }  # fmt: skip


def grid(names: Sequence[str], seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Unchanged modules under each optimizer and schedule: the loss at the end over that at the start."""
    for name in names:
        for optimizer in OPTIMIZERS:
            for schedule in SCHEDULES:
                for seed in range(seeds):
                    run = train(name, seed, steps, OPTIMIZERS[optimizer], schedule)
                    yield {"module": name, "optimizer": optimizer, "schedule": schedule, "seed": seed, **run._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="optimizers and schedules instead of a sweep")
    parser.add_argument("--modules", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="none", help="of the sweep (default: none)")
    parser.add_argument("--out", type=Path, help="a JSON file for every loss")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = []
    if args.grid:
        print("module       optimizer   schedule  seed  end ÷ start")
        for row in grid(args.modules, args.seeds, args.steps):
            rows.append(row)
            ratio = row["after"] / row["before"]
            print(f"{row['module']:12} {row['optimizer']:11} {row['schedule']:9} {row['seed']:4}  {ratio:.3f}", flush=True)
        above = sum(row["after"] > row["before"] for row in rows)
        print(f"{above} of {len(rows)} runs end above the loss that they began with")
    else:
        print("module        start  found   best of sweep (lr ÷ RMS)  found ÷ best  last step ÷ RMS  CPU s")
        for row in sweep(args.modules, args.seeds, args.steps, args.schedule):
            rows.append(row)
            print(
                f"{row['module']:12} {row['before']:6.3f} {row['auto']:6.3f}  {row['best']:6.3f} ({row['share']:g})".ljust(54)
                + f"{row['ratio']:6.2f}      {row['last']:.3f}  {time.process_time():5.0f}",
                flush=True,
            )
        print(f"within 10 % of the best: {sum(row['ratio'] <= 1.1 for row in rows)} of {len(rows)}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
