"""Train inside llama.cpp: control vectors on the demo's own 4-bit GGUF, from forward passes of the inference engine alone.

    pip install 'zolightning[llamacpp]'
    python examples/gguf_engine.py --seeds 0 1 2 --out results.json
    python examples/gguf_engine.py --memory       # peak memory of training beside that of inference
    python examples/gguf_engine.py --positions 0 --export vectors.gguf  # vectors that llama.cpp's own tools load; takes longer

Lets the model choose the words that stand for a label, from 256 film reviews. Then it encodes each text once, and probes
vectors at the prompt's last position with directions for each text. Prints the accuracy on texts that training never saw,
before and after, and the CPU seconds that training took, with the choice of words.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.control_vectors import ControlVectors, export_control_vectors
from zolightning.blackbox.engine import EngineModel
from zolightning.blackbox.label_words import label_words
from zolightning.blackbox.llamacpp import LlamaModel, library
from zolightning.data import Encoded, collate, film_snippets
from zolightning.data.model import default_gguf
from zolightning.data.text import Example

ENDING, WORDS = " It was", (" terrible", " great")
BATCH = 16  # texts that are evaluated together


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


class Task:
    """The texts as tokens, and the engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        gguf = LlamaModel(default_gguf(offline=options.offline))
        texts = film_snippets(validation=200, test=1000, offline=options.offline)

        def encoded(part: list[Example]) -> list[Encoded]:
            return [Encoded(gguf.tokens(example.text + ENDING), example.label) for example in part]

        self.training = encoded(texts.train[: options.steps * options.batch])
        self.held = encoded((texts.validation if options.validate else texts.test)[: options.evaluate])
        known = encoded(texts.train[: max(16, options.examples)])
        prompts, labels = [one.input_ids for one in known], [one.label for one in known]
        started = time.process_time()
        words: list[list[int]] = [[gguf.tokens("A film." + ENDING + word)[-1]] for word in WORDS]
        if options.examples:
            words = label_words(gguf, prompts[: options.examples], labels[: options.examples])
        self.engine = ControlVectors(
            gguf,
            prompts[:16],
            positions=options.positions or None,
            layers=range(options.layers[0], options.layers[1] + 1) if options.layers else None,
            outputs=words,
            sequences=max(BATCH, options.batch),
        )
        self.chosen = time.process_time() - started  # before the first step, and counted
        self.words = [[gguf.text([word]) for word in some] for some in words]

    def evaluate(self, vectors: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Accuracy and loss at each of several vectors; a text is encoded once for all of them."""
        right, loss = dict.fromkeys(vectors, 0), dict.fromkeys(vectors, 0.0)
        for start in range(0, len(self.held), BATCH):
            batch = collate(self.held[start : start + BATCH], 0)
            labels = batch["labels"]
            for name, value in vectors.items():
                logits = self.engine.run({"vectors": value.expand(len(labels), -1)}, batch)
                right[name] += int((logits.argmax(-1) == labels).sum())
                loss[name] += float(F.cross_entropy(logits, labels, reduction="sum"))
        count = len(self.held)
        return {name: {"accuracy": right[name] / count, "loss": loss[name] / count} for name in vectors}


def fit(module: pl.LightningModule, data: Any, options: argparse.Namespace, steps: int) -> None:
    trainer = pl.Trainer(
        # an engine runs each example at its own vectors anyway: all probes in one batch would only take their memory
        strategy=ZOStrategy("reft", eps=options.eps, num_queries=options.queries, one_batch=False),
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)


def train(task: Task, options: argparse.Namespace, seed: int) -> tuple[Tensor, float]:
    """The vectors, and the CPU seconds that they took."""
    pl.seed_everything(seed, verbose=False)
    started = time.process_time()
    model = EngineModel(task.engine)
    data = DataLoader(task.training, options.batch, shuffle=True, collate_fn=lambda items: collate(items, 0))
    fit(Classifier(model, options.lr, options.steps), data, options, options.steps)
    return model.numbers["vectors"].detach(), task.chosen + time.process_time() - started


class Toy(ZOMixin, pl.LightningModule):
    """Has all libraries loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(8))

    def zo_objective(self, batch: Tensor) -> Tensor:
        return ((torch.zeros(len(batch), 1) + self.x) * batch).square().sum(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def peak(options: argparse.Namespace) -> float:
    """MiB that this process takes beyond its libraries: for inference on the held texts, or for training."""

    def most() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    fit(Toy(), DataLoader([torch.zeros(8)] * 64, 16), options, 2)
    library()
    before = most()
    task = Task(options)
    if options.peak_of == "training":
        train(task, options, 0)
    else:
        task.evaluate({"nothing": torch.zeros(1, len(task.engine.numbers["vectors"]))})
    return most() - before


def memory(words: list[str]) -> None:
    """Peak memory of training beside that of inference, each in a process of its own."""
    found = {}
    for of, examples in (("inference", "0"), ("training", "32")):
        own = ["--peak-of", of, "--examples", examples, "--steps", "2", "--evaluate", "32"]
        command = [sys.executable, __file__, *words, *own]
        found[of] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"{of}: {found[of]:.1f} MiB beyond the libraries", flush=True)
    print(f"training takes {found['training'] / found['inference']:.3f} × the memory of inference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--queries", type=int, default=16, help="directions for each text")
    parser.add_argument("--positions", type=int, default=1, help="last positions that are moved; 0: all, as stock tools do")
    parser.add_argument("--examples", type=int, default=256, help="texts that label words are chosen by; 0: terrible, great")
    parser.add_argument("--layers", type=int, nargs=2, help="first and last block with a vector; default: the middle third")
    parser.add_argument("--lr", type=float, default=3.5e-2, help="RMS change of the vectors a step, in sizes of hidden states")
    parser.add_argument("--eps", type=float, default=0.2, help="size of a probe, in sizes of hidden states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate", type=int, default=1000, help="texts to evaluate on")
    parser.add_argument("--validate", action="store_true", help="on the validation texts, for choosing settings")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--peak-of", choices=("inference", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="folder for the trained vectors; those that it has are not trained again")
    parser.add_argument("--export", type=Path, help="with --positions 0: a GGUF file for `llama-cli --control-vector`")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(peak(options))
        return
    if options.memory:
        memory([word for word in sys.argv[1:] if word != "--memory"])
        return
    task = Task(options)
    print(f"label words: {task.words}; {task.chosen:.1f} CPU seconds for them and for the sizes of hidden states", flush=True)
    vectors, seconds = {"before": torch.zeros(1, len(task.engine.numbers["vectors"]))}, {}
    for seed in options.seeds:
        name = f"seed {seed}"
        kept = options.keep / f"seed-{seed}.pt" if options.keep else None
        if kept and kept.exists():
            vectors[name], seconds[name] = torch.load(kept)
        else:
            vectors[name], seconds[name] = train(task, options, seed)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save((vectors[name], seconds[name]), kept)
        print(f"{name}: trained in {seconds[name]:.1f} CPU seconds", flush=True)
    if options.export:
        export_control_vectors(options.export, task.engine, vectors[f"seed {options.seeds[0]}"])
    started = time.process_time()
    results = task.evaluate(vectors)
    print(f"evaluated on {len(task.held)} texts in {time.process_time() - started:.1f} CPU seconds")
    for name, found in results.items():
        print(f"{name}: accuracy {100 * found['accuracy']:.1f} %, loss {found['loss']:.4f}")
    if options.out:
        settings = {
            name: value for name, value in vars(options).items() if name not in ("keep", "export", "out", "memory", "peak_of")
        }
        options.out.write_text(
            json.dumps({"settings": settings, "words": task.words, "cpu_seconds": seconds, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
