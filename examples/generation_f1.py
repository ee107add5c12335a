"""Train on the F1 of generated text: the probes let the model answer, score the answers, and see nothing else.

The task: say the words of feeling in a sentence of a film review. They are those of the sentence that the VADER lexicon
rates, so "a gorgeous, witty, seductive movie." wants "gorgeous witty seductive". The prompt shows one answered sentence, which
the untrained model tends to repeat. Teacher forcing, cross-entropy and logits play no part: each probe generates with
`model.generate`, and the loss of a sentence is 1 - F1 of its answer.

python examples/generation_f1.py

The model and the texts (95 MB) come from the Python package index, once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOMonitor, ZOStrategy
from zolightning.data import VADER, fetch, film_snippets, generate_answers, load_causal_lm
from zolightning.data.archives import read_tar_member
from zolightning.objectives import exact_match, text_errors, token_f1

TEMPLATE = "Sentence: {text}\nWords of feeling:"
SHOWN = "Sentence: a dull, unfunny mess.\nWords of feeling: dull unfunny mess\n\n"


class Question(NamedTuple):
    """A prompt and the answer that is wanted."""

    prompt: str
    answer: str


def lexicon() -> set[str]:
    """The words that VADER rates at least 1.5 away from neutral."""
    table = read_tar_member(fetch(VADER), "vaderSentiment-2.5/vaderSentiment/vader_lexicon.txt").decode()
    rows = (line.split("\t") for line in table.splitlines() if line)
    return {word for word, rating, *_ in rows if word.isalpha() and abs(float(rating)) >= 1.5}


def questions(part: list, words: set[str], limit: int) -> list[Question]:
    """Short sentences with two to four rated words."""
    found = []
    for text, _ in part:
        rated = [w for w in (word.strip(".,;:!?'\"()-") for word in text.split()) if w.lower() in words]
        if 2 <= len(rated) <= 4 and len(text.split()) <= 20:
            found.append(Question(SHOWN + TEMPLATE.format(text=text), " ".join(rated)))
    return found[:limit]


class Answering(ZOMixin, L.LightningModule):
    """A language model trained on the F1 of what it says."""

    def __init__(self, model: torch.nn.Module, tokenizer, data: list[Question], lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.data, self.lr, self.steps = model, tokenizer, data, lr, steps
        self.history: list[dict[str, float]] = []

    def forward(self, batch):
        return generate_answers(self.model, self.tokenizer, batch, max_new_tokens=8)

    def zo_objective(self, batch):
        return text_errors(self(batch), [[self.data[i].answer] for i in batch["index"].tolist()])  # (B,): 1 - F1

    def _score(self, batch, stage):
        answers = self(batch)
        wanted = [[self.data[i].answer] for i in batch["index"].tolist()]
        for name, score in (("f1", token_f1), ("exact_match", exact_match)):
            value = 1 - text_errors(answers, wanted, score).mean()
            self.log(f"{stage}/{name}", value, batch_size=len(answers), prog_bar=True)
        return answers, wanted

    def validation_step(self, batch, batch_idx):
        answers, wanted = self._score(batch, "val")
        if batch_idx == 0:
            print(
                *(f"{answer!r}, wanted {right!r}" for answer, (right,) in list(zip(answers, wanted, strict=True))[:4]), sep="\n"
            )

    def on_validation_epoch_end(self):
        values = self.trainer.callback_metrics
        self.history.append({"step": self.global_step} | {k: float(values[f"val/{k}"]) for k in ("f1", "exact_match")})

    def test_step(self, batch, batch_idx):
        self._score(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-3, help="RMS change per weight and step at the start")
    parser.add_argument("--eps", type=float, default=2e-2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--validation", type=int, default=40)
    parser.add_argument("--test", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("generation-f1"), help="folder of the results")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model, tokenizer = load_causal_lm()
    tokenizer.padding_side = "left"
    words = lexicon()
    parts = film_snippets(validation=1000, test=2000)
    sizes = {"train": 2000, "validation": args.validation, "test": args.test}
    split = {name: questions(getattr(parts, name), words, size) for name, size in sizes.items()}
    data = [question for part in split.values() for question in part]
    print({name: len(part) for name, part in split.items()})

    def collate(items):
        return {**tokenizer([data[i].prompt for i in items], padding=True, return_tensors="pt"), "index": torch.tensor(items)}

    def loader(name, **settings):
        first = {"train": 0, "validation": len(split["train"]), "test": len(data) - len(split["test"])}[name]
        return DataLoader(range(first, first + len(split[name])), collate_fn=collate, **settings)

    generator = torch.Generator().manual_seed(args.seed)
    train = loader("train", batch_size=args.batch, shuffle=True, drop_last=True, generator=generator)
    validation, test = (loader(name, batch_size=50) for name in ("validation", "test"))
    module = Answering(model, tokenizer, data, args.lr, args.steps)
    trainer = L.Trainer(
        strategy=ZOStrategy(eps=args.eps, ledger=False),
        precision=args.precision,
        max_steps=args.steps,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        logger=False,
        callbacks=[ZOMonitor()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    zero_shot = trainer.test(module, test, verbose=False)[0]
    started = time.perf_counter()
    trainer.fit(module, train, validation)
    seconds = time.perf_counter() - started
    tested = trainer.test(module, test, verbose=False)[0]
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result = {**settings, "zero_shot": zero_shot, "tested": tested, "seconds": seconds, "history": module.history}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"f1-seed{args.seed}.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"test F1 {zero_shot['test/f1']:.1%} -> {tested['test/f1']:.1%}; {path}")


if __name__ == "__main__":
    main()
