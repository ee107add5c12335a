"""Kill a training run again and again; it ends with the very weights of a run that nobody touched.

python examples/interrupted.py --steps 40 --kills 3

Every step is a checkpoint here, of a few kilobytes: LedgerCheckpointIO keeps a position in the replay ledger instead of
weights. The script trains the demo's model once without and once with interruptions (SIGKILL, at random moments), compares
the weights by hash, and rebuilds them a third time from the ledger alone. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from zolightning import ZOStrategy
from zolightning.commands.demo.module import PromptClassifier
from zolightning.data import PromptTemplate, collate, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.ledger import base_path, fingerprint, load_base, read, replay
from zolightning.ledger.format import Step
from zolightning.strategy.ledger_io import LedgerCheckpointIO

BATCH = 8


class Stream:
    """Batches in a fixed order. Its state is a position, so that a run can go on in the middle of an epoch."""

    def __init__(self, items: list, pad_id: int) -> None:
        self.items, self.pad_id, self.at = items, pad_id, 0

    def __len__(self) -> int:
        return len(self.items) // BATCH

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while self.at < len(self):
            self.at += 1
            yield collate(self.items[(self.at - 1) * BATCH : self.at * BATCH], self.pad_id)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Pace(Callback):
    """Tells the parent process how far training is, and how long the steps take."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(f"step {trainer.global_step} {time.perf_counter() - self.started:.3f}", flush=True)


def worker(folder: Path, steps: int) -> None:
    """Train to the end, from the newest checkpoint in the folder if there is one."""
    L.seed_everything(0, verbose=False)
    model, tokenizer = load_causal_lm()
    texts, prompt = film_snippets(), PromptTemplate()
    module = PromptClassifier(
        model, verbalizer_ids(tokenizer, prompt, texts.label_names), lambda parameters: torch.optim.SGD(parameters, lr=2e-3)
    )
    saved = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer = L.Trainer(
        strategy=ZOStrategy(ledger=folder / "ledger.zo"),
        plugins=[LedgerCheckpointIO()],
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), Pace()],
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, Stream(encode(tokenizer, texts.train, prompt), tokenizer.pad_token_id), ckpt_path=saved[-1] if saved else None
    )
    print(f"weights {fingerprint(module.named_parameters())}", flush=True)


def train(folder: Path, steps: int, kill_after: float | None = None) -> tuple[str, list[float]]:
    """A worker process: the hash of its final weights, "" if it was killed, and the seconds of its steps."""
    command = [sys.executable, __file__, "--worker", str(folder), "--steps", str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    seconds: list[float] = []
    for line in process.stdout:
        word, *values = line.split()
        if word == "weights":
            process.wait()
            return values[0], seconds
        if word == "step":
            seconds.append(float(values[1]))
            if kill_after is not None and len(seconds) > kill_after:
                time.sleep(random.random() * seconds[-1])
                process.send_signal(signal.SIGKILL)
                print(f"  killed after step {values[0]}", flush=True)
                break
    if process.wait() not in (0, -signal.SIGKILL):
        sys.exit(f"the worker failed: run `{' '.join(command)}` to see why")
    return "", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
    parser.add_argument("--kills", type=int, default=3, help="interruptions (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("interrupted"), help="folder of the two runs, new (default: interrupted)"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.steps)
        return
    if args.out.exists():
        sys.exit(f"{args.out} is there already; give another folder with --out")
    quiet, troubled = args.out / "uninterrupted", args.out / "interrupted"
    print("training without interruption …", flush=True)
    expected, seconds = train(quiet, args.steps)
    print("training with interruptions …", flush=True)
    for _ in range(args.kills):
        train(troubled, args.steps, kill_after=random.randrange(1, max(2, args.steps // (args.kills + 1))))
    found, _ = train(troubled, args.steps)

    ledger = read(troubled / "ledger.zo")
    parameters = load_base(base_path(troubled, ledger.header.base))
    started = time.perf_counter()
    replay(ledger, parameters)
    took = time.perf_counter() - started
    rebuilt = fingerprint(parameters.items())
    checkpoint = max(path.stat().st_size for path in troubled.glob("*.ckpt"))
    weights = sum(p.numel() * p.element_size() for p in parameters.values())
    print(f"weights, uninterrupted: {expected}\nweights, interrupted:   {found}\nweights, replayed:      {rebuilt}")
    step = sum(end - start for (start, end), record in zip(ledger.spans, ledger, strict=True) if isinstance(record, Step))
    print(f"ledger: {len(ledger.data):,} bytes, {step / ledger.steps:.0f} a step of {BATCH} directions")
    print(f"checkpoint: {checkpoint:,} bytes instead of {weights:,}")
    print(f"replay: {took:.1f} s for {sum(seconds):.1f} s of training, {sum(seconds) / took:.0f} times as fast")
    sys.exit(0 if expected == found == rebuilt else "NOT THE SAME")


if __name__ == "__main__":
    main()
