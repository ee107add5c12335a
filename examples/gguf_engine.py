"""Train inside llama.cpp: control vectors on the demo's own 4-bit GGUF, from forward passes of the inference engine alone.

    pip install 'zolightning[llamacpp]'
    python examples/gguf_engine.py --seeds 3 --out results.json

Reads film reviews, encodes each text once, and probes vectors at the prompt's last position with a direction for each
example. Prints the accuracy on texts that training never saw, before and after, and the CPU seconds it took.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.control_vectors import ControlVectors
from zolightning.blackbox.engine import EngineModel
from zolightning.blackbox.llamacpp import LlamaModel
from zolightning.data import Encoded, collate, film_snippets
from zolightning.data.model import default_gguf
from zolightning.data.text import Example

ENDING, WORDS = " It was", (" terrible", " great")


class Classifier(ZOMixin, pl.LightningModule):
    """The word that llama.cpp would say next, of two."""

    def __init__(self, model: EngineModel, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def zo_prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.prepare(batch)

    def zo_objective(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch), batch["labels"], reduction="none")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def accuracy(model: EngineModel, items: list[Encoded]) -> tuple[float, float]:
    """(accuracy, loss) of the engine's answers."""
    right, loss = 0, 0.0
    for start in range(0, len(items), 16):
        batch = collate(items[start : start + 16], 0)
        logits = model(batch)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
    return right / len(items), loss / len(items)


def train(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    gguf = LlamaModel(default_gguf(offline=options.offline))
    texts = film_snippets(validation=200, test=1000, offline=options.offline)

    def encoded(part: list[Example]) -> list[Encoded]:
        return [Encoded(gguf.tokens(example.text + ENDING), example.label) for example in part]

    training = encoded(texts.train[: options.steps * options.batch])
    held = encoded(texts.validation if options.validate else texts.test)[: options.evaluate]
    words = [gguf.tokens("A film." + ENDING + word)[-1] for word in WORDS]
    started = time.process_time()
    engine = ControlVectors(
        gguf, [item.input_ids for item in training[:16]], outputs=words, sequences=options.batch, positions=options.positions
    )
    model = EngineModel(engine)
    module = Classifier(model, options.lr, options.steps)
    data = DataLoader(training, options.batch, shuffle=True, collate_fn=lambda items: collate(items, 0))
    trainer = pl.Trainer(
        strategy=ZOStrategy("reft", eps=options.eps, num_queries=options.queries),
        max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    spent = time.process_time() - started
    result = {"seed": seed, "cpu_seconds": round(spent, 1), **vars(options)}
    for name, value in zip(("accuracy", "loss"), accuracy(model, held), strict=True):
        result[name] = round(value, 4)
    torch.nn.init.zeros_(model.numbers["vectors"])
    result["accuracy_before"] = round(accuracy(model, held[: options.before])[0], 4) if options.before else None
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--queries", type=int, default=8, help="directions for each text")
    parser.add_argument("--positions", type=int, default=1, help="last positions of the prompt that are moved")
    parser.add_argument("--lr", type=float, default=4e-2, help="RMS change of the vectors a step, in sizes of hidden states")
    parser.add_argument("--eps", type=float, default=0.2, help="size of a probe, in sizes of hidden states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate", type=int, default=1000, help="texts to evaluate on")
    parser.add_argument("--before", type=int, default=0, help="texts on which the model without vectors is evaluated")
    parser.add_argument("--validate", action="store_true", help="on the validation texts, for choosing settings")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows.append(train(options, seed))
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
