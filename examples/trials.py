"""Four ideas for the update of a zeroth-order step, tried on the demo's task beside the default recipe at equal CPU seconds.

    python examples/trials.py --out trials.json                      # two seeds, about an hour on one core
    python examples/trials.py --ideas plain momentum --seconds 60    # a look at one of them

plain       the default recipe: a rank-1 direction for each example, plain SGD on normalised projected gradients
orthogonal  each matrix's step UΣVᵀ becomes UVᵀ at the same norm, through its B × B factors (after ZO-Muon, arXiv:2602.17155)
momentum    the step is Σ_k βᵏ ĝ_{t−k}: the (key, coefficient) terms of the last steps again, no state but those
anchored    weight decay towards the first weights, θ ← θ − lr·λ(θ − θ₀) (arXiv:2605.30148); its drift is in the table
codes       integer codes of 3 bits and an error feedback (QES, arXiv:2602.03120): the trained matrices stay on the grid of
            their first rounding, and the part of a step that rounding loses is added to the next one
rounded     the same codes without feedback: each step is rounded by itself

The learning rate of each idea is chosen from the same rates by the validation loss of a short run, and falls along a cosine.
Each finished run is printed and kept in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from zolightning import Session, recipes
from zolightning.adapt.fakequant import quantize_to_grid
from zolightning.commands.tables import markdown
from zolightning.data import (
    PromptTemplate,
    candidate_logits,
    collate,
    encode,
    film_snippets,
    general_text,
    load_causal_lm,
    text_perplexity,
    verbalizer_ids,
)
from zolightning.data.batches import SimilarLengths
from zolightning.engine.updates import UpdateStats, apply_update
from zolightning.noise import outer_sgd_
from zolightning.space import Leaf, select
from zolightning.space.outer_leaf import OuterLeaf
from zolightning.types import Key, Term

RATES = (2e-3, 4e-3, 8e-3)
BITS, GROUP = 3, 64


class Plain:
    """The step as it is."""

    def __init__(self, leaves: Sequence[nn.Parameter]) -> None:
        self.first = [p.detach().clone() for p in leaves]
        self.now = list(leaves)

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        return apply_update(optimizer, leaves, terms, key, measure=measure)

    @torch.no_grad()
    def drift(self) -> float:
        """RMS of θ − θ₀ over that of θ₀."""
        far = math.fsum(float((a - b).double().square().sum()) for a, b in zip(self.now, self.first, strict=True))
        return math.sqrt(far / math.fsum(float(b.double().square().sum()) for b in self.first))


class Orthogonal(Plain):
    """All singular values of a matrix's step are equal."""

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        lr = float(optimizer.param_groups[0]["lr"])
        some = [term for term in terms if term.coefficient]
        for leaf in leaves:
            if isinstance(leaf, OuterLeaf):
                outer_sgd_(leaf.parameter.detach(), *polar(*leaf.products(some)), leaf.index, lr, 0.0, key)
        return apply_update(optimizer, [leaf for leaf in leaves if not isinstance(leaf, OuterLeaf)], terms, key)


def polar(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of UVᵀ, where leftᵀ right = UΣVᵀ, at the norm of leftᵀ right; (n, rows) and (n, columns), n small."""
    a, b = left.double(), right.double()
    low_a, low_b = (torch.linalg.cholesky(m @ m.T) for m in (a, b))
    u, sizes, vt = torch.linalg.svd(low_a.T @ low_b)
    norm = (sizes.square().sum() / len(sizes)).sqrt()
    new_a = u.T @ torch.linalg.solve_triangular(low_a, a, upper=False)
    new_b = vt @ torch.linalg.solve_triangular(low_b, b, upper=False)
    return (norm * new_a).to(left.dtype).contiguous(), new_b.to(right.dtype).contiguous()


class Momentum(Plain):
    """The steps before count on, less and less."""

    beta, steps = 0.8, 10

    def __init__(self, leaves: Sequence[nn.Parameter]) -> None:
        super().__init__(leaves)
        self.past: deque[Sequence[Term]] = deque(maxlen=self.steps)

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        self.past.appendleft(terms)
        size = math.sqrt(1 - self.beta**2)  # independent steps: the RMS of the sum is that of one
        summed = [Term(t.key, size * self.beta**k * t.coefficient) for k, old in enumerate(self.past) for t in old]
        return apply_update(optimizer, leaves, summed, key, measure=measure)


class Anchored(Plain):
    """The weights are drawn back to the first ones."""

    decay = 10.0

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        stats = super().__call__(optimizer, leaves, terms, key, measure=measure)
        for now, first in zip(self.now, self.first, strict=True):
            now.detach().lerp_(first, self.decay * float(optimizer.param_groups[0]["lr"]))
        return stats


class Codes(Plain):
    """The matrices stay on a grid; the part of a step that rounding loses waits for the next one."""

    feedback = True

    def __init__(self, leaves: Sequence[nn.Parameter]) -> None:
        self.grids = {}
        for p in leaves:
            if p.dim() == 2:
                grid = quantize_to_grid(p.detach().view(len(p), -1, GROUP), BITS, torch.ones(1), torch.ones(1))
                p.detach().copy_(grid.values().view_as(p))
                self.grids[id(p)] = grid.scales, grid.zeros, torch.zeros_like(p)
        super().__init__(leaves)

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        lr = float(optimizer.param_groups[0]["lr"])
        for leaf in leaves:
            if id(leaf.parameter) not in self.grids:
                continue
            weight, (scales, zeros, lost) = leaf.parameter.detach(), self.grids[id(leaf.parameter)]
            wanted = (weight + lost).sub_(leaf.gradient(terms), alpha=lr)
            codes = (wanted.view(len(weight), -1, GROUP) / scales).round_().add_(zeros).clamp_(0, 2**BITS - 1)
            weight.copy_(codes.sub_(zeros).mul_(scales).view_as(weight))
            if self.feedback:
                torch.sub(wanted, weight, out=lost)
        return apply_update(optimizer, [leaf for leaf in leaves if id(leaf.parameter) not in self.grids], terms, key)


class Rounded(Codes):
    """The part that rounding loses is lost."""

    feedback = False


IDEAS: dict[str, type[Plain]] = {
    "plain": Plain,
    "orthogonal": Orthogonal,
    "momentum": Momentum,
    "anchored": Anchored,
    "codes": Codes,
    "rounded": Rounded,
}


class Task:
    """The demo's model and texts."""

    def __init__(self, test: int, offline: bool) -> None:
        self.model, tokenizer = load_causal_lm(offline=offline)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        prompt, texts = PromptTemplate(), film_snippets(validation=120, test=test, offline=offline)
        self.train, self.validation, self.test = (encode(tokenizer, part, prompt) for part in texts[:3])
        self.general = partial(text_perplexity, self.model, tokenizer, general_text())
        self.words, self.pad = verbalizer_ids(tokenizer, prompt, texts.label_names), tokenizer.pad_token_id

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(candidate_logits(self.model, batch, self.words), batch["labels"], reduction="none")

    @torch.no_grad()
    def score(self, items: Sequence[Any]) -> tuple[float, float]:
        """Accuracy and loss."""
        ordered, hits, losses = sorted(items, key=lambda item: len(item.input_ids)), [], []
        for start in range(0, len(ordered), 20):
            batch = collate(ordered[start : start + 20], self.pad)
            logits = candidate_logits(self.model, batch, self.words)
            hits += (logits.argmax(-1) == batch["labels"]).tolist()
            losses += F.cross_entropy(logits, batch["labels"], reduction="none").tolist()
        return fmean(hits), fmean(losses)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        lengths = [len(item.input_ids) for item in self.train]
        while True:
            for rows in SimilarLengths(lengths, 16, torch.Generator().manual_seed(seed)):
                yield collate([self.train[row] for row in rows], self.pad)
            seed += 1_000

    def run(self, idea: str, lr: float, seed: int, seconds: float, items: Sequence[Any]) -> dict[str, Any]:
        """Train for so many CPU seconds and score."""
        self.model.load_state_dict(self.state)
        torch.manual_seed(seed)
        chosen = recipes.DEFAULT.override(lr="module", seed=seed)
        optimizer = SGD(self.model.parameters(), lr=lr)
        made: list[Plain] = []

        def apply(optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, **more: Any) -> UpdateStats:
            return made[0](optimizer, leaves, terms, key, **more)

        session = Session(self.model, optimizer, chosen, apply=apply, inform=lambda line: None)
        trained = select(self.model, chosen.select, dict(self.model.named_parameters()))
        made.append(IDEAS[idea](list(trained.values())))
        spent, steps = 0.0, 0
        for batch in self.batches(seed):
            begun = time.process_time()
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
            session.estimate(self.losses, batch)
            session.update()
            spent, steps = spent + time.process_time() - begun, steps + 1
            if spent >= seconds:
                break
        session.close()
        accuracy, loss = self.score(items)
        return {"accuracy": accuracy, "loss": loss, "steps": steps, "cpu_seconds": spent, "drift": made[0].drift()}


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for idea in dict.fromkeys(one["idea"] for one in results):
        own = [one for one in results if one["idea"] == idea]
        means = {name: fmean(one[name] for one in own) for name in ("loss", "steps", "cpu_seconds", "drift", "perplexity")}
        each = ", ".join(f"{100 * one['accuracy']:.1f}" for one in own)
        accuracy = f"{100 * fmean(one['accuracy'] for one in own):.1f} ({each})"
        rows.append([idea, str(own[0]["lr"]), str(len(own)), accuracy, *(f"{value:.4g}" for value in means.values())])
    return markdown(("idea", "lr", "seeds", "accuracy %", "loss", "steps", "CPU s", "drift", "perplexity"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="to choose from (default: 2e-3 4e-3 8e-3)")
    parser.add_argument("--decay", type=float, default=Anchored.decay, help="λ of anchored (default: 10)")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training of each run (default: 120)")
    parser.add_argument("--test", type=int, default=300, help="test texts (default: 300)")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--out", type=Path, help="where the results are kept, and added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Anchored.decay = options.decay
    results: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    task = Task(options.test, options.offline)
    print(f"perplexity on general text before: {task.general():.2f}", flush=True)
    for idea in options.ideas:
        tried = {}
        if len(options.rates) > 1:
            tried = {lr: task.run(idea, lr, 1000, options.seconds / 3, task.validation)["loss"] for lr in options.rates}
        lr = min(options.rates, key=lambda rate: tried.get(rate, 0.0))
        for seed in options.seeds:
            found = task.run(idea, lr, seed, options.seconds, task.test) | {"perplexity": task.general()}
            results.append({"idea": idea, "lr": lr, "tried": tried, "seed": seed, "decay": options.decay, **found})
            print(f"{idea} lr {lr} seed {seed}: {100 * found['accuracy']:.1f} %, loss {found['loss']:.3f}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
