"""Find a picture that only a rater has in mind: the rater orders six candidates a round, and never gives a number.

    python examples/ranking.py                      # an automatic rater, 24 seeds, beside best-of
    python examples/ranking.py --error 0.5          # one that errs by half the spread of the candidates
    python examples/ranking.py --person             # you, at the terminal
    python examples/ranking.py --page runs/digit    # you, in the browser: `zolightning rank runs/digit`

A decoder from 16 numbers to 8 × 8 pictures is trained on scikit-learn's digits first, in a few seconds. What is trained by
ranking are the 16 numbers. Printed is the share of the squared distance to the hidden picture that is left. With `--page`
either side may be ended and started again: rankings that were given are not asked for again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from zolightning.blackbox.person import Person
from zolightning.engine.session import Session
from zolightning.methods.config import ZOConfig
from zolightning.methods.ranking import EndOfRanking, Oracle, Ranking, Terminal, by_score
from zolightning.types import Candidate

LATENTS, SHADES = 16, " .:-=+*#%@"


def decoder() -> nn.Module:
    """16 numbers of mean 0 and variance 1 → a picture: the second half of an autoencoder."""
    torch.manual_seed(0)
    pictures = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, LATENTS), nn.BatchNorm1d(LATENTS, affine=False))
    decode = nn.Sequential(nn.Linear(LATENTS, 64), nn.Tanh(), nn.Linear(64, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decode.parameters()], lr=3e-3)
    for _ in range(30):
        for batch in torch.split(pictures[torch.randperm(len(pictures))], 64):
            optimizer.zero_grad()
            nn.functional.mse_loss(decode(encoder(batch)), batch).backward()
            optimizer.step()
    return decode.requires_grad_(False).eval()


class Picture(nn.Module):
    """What is searched."""

    def __init__(self, decode: nn.Module) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(LATENTS))
        self.decode = decode

    def forward(self) -> Tensor:
        return self.decode(self.latents * 1.0)


def ascii_picture(picture: Tensor) -> str:
    rows = (picture.view(8, 8).clamp(0, 0.999) * len(SHADES)).long().tolist()
    return "\n".join("".join(2 * SHADES[level] for level in row) for row in rows)


def search(decode: nn.Module, oracle: Oracle, options: argparse.Namespace, seed: int) -> Picture:
    """Train the latents on rankings alone, until the rater stops; the rate falls as the candidates come close."""
    module = Picture(decode)
    optimizer = torch.optim.SGD([module.latents], lr=options.lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.decay)
    estimator = Ranking(oracle, options.candidates, options.top, options.eps)
    session = Session(
        module, optimizer, ZOConfig(estimator=estimator, noise="gaussian", seed=seed, structure="dense"), warn=lambda _: None
    )
    for _ in range(options.rounds):
        try:
            session.estimate(lambda _: Candidate(module()))
        except EndOfRanking as end:
            print(end)
            break
        session.update()
        schedule.step()
    return module


def best_of(decode: nn.Module, oracle: Oracle, options: argparse.Namespace, seed: int) -> Picture:
    """The plain way: go to the candidate that was ranked first."""
    module, generator = Picture(decode), torch.Generator().manual_seed(seed)
    for number in range(options.rounds):
        step = 0.3 * (1 / 3) ** (number / max(1, options.rounds - 1))
        moved = module.latents + step * torch.randn(options.candidates, LATENTS, generator=generator)
        first = oracle([decode(one) for one in moved], 1)[0]
        module.latents.data.copy_(moved[first if isinstance(first, int) else first[0]])
    return module


def rater(target: Tensor, error: float, seed: int) -> Oracle:
    """Orders by distance to the hidden picture, with an error in units of the candidates' spread."""
    generator = torch.Generator().manual_seed(seed)

    def oracle(candidates: Sequence[Any], top: int) -> Any:
        distances = torch.stack([(candidate - target).square().sum() for candidate in candidates])
        seen = distances + error * distances.std() * torch.randn(len(distances), generator=generator)
        return by_score(lambda number: seen[number].item())(range(len(candidates)), top)

    return oracle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rankings")
    parser.add_argument("--candidates", type=int, default=6, help="pictures a round")
    parser.add_argument("--top", type=int, default=3, help="how many of them are ordered")
    parser.add_argument("--eps", type=float, default=0.3, help="how far candidates are from the latents")
    parser.add_argument("--lr", type=float, default=0.35, help="RMS change of a latent in the first round")
    parser.add_argument("--decay", type=float, default=0.9, help="by which that falls from round to round")
    parser.add_argument("--error", type=float, default=0.0, help="of the rater, in spreads of the candidates")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--person", action="store_true", help="ask you, at the terminal")
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="ask you, on the page that `zolightning rank FOLDER` serves"
    )
    options = parser.parse_args()
    decode = decoder()
    if options.person:
        found = search(decode, Terminal(ascii_picture), options, 0)
        print("where your rankings led:\n" + ascii_picture(found()))
        return
    if options.page:
        person = Person(options.page, lambda picture: picture.view(8, 8), "Think of a digit. Which pictures are most like it?")
        found = search(decode, person, options, 0)
        liked = {True: "better", False: "worse", None: "no better"}[person.prefers(Picture(decode)(), found())]
        person.close(f"Shown blind, the picture after training was {liked} than the one before.")
        print(f"where your rankings led, {liked} than the picture before:\n" + ascii_picture(found()))
        return
    ways: dict[str, Callable[..., Picture]] = {f"top {options.top} ranked": search, "best-of": best_of}
    for name, way in ways.items():
        left = []
        for seed in range(options.seeds):
            target = decode(torch.randn(LATENTS, generator=torch.Generator().manual_seed(1000 + seed)))
            found = way(decode, rater(target, options.error, seed), options, seed)
            start = (decode(torch.zeros(LATENTS)) - target).square().sum()
            left.append(((found() - target).square().sum() / start).item())
        shares = torch.tensor(left)
        print(f"{name:14} {shares.mean():.3f} ± {shares.std():.3f} of the squared distance left, {options.seeds} seeds")


if __name__ == "__main__":
    main()
