"""The demo's language model and its vectors, trained by clients that keep their film reviews; beside them one process.

python examples/federated_films.py                     # the table in examples/federated/README.md
python examples/federated_films.py --rounds 3 --test 32 --texts 8    # to see that it runs

SmolLM2-135M is frozen, and all clients train the vectors at the prompt's end (the recipe 'reft', a direction for each text).
Each client encodes its own texts once, since no vector takes part in that. The one process has the batches of all clients side
by side, in the order in which the clients' own keys number them: the same directions, so the same steps up to the order of sums
in a forward. The model (93 MB) and the texts (2.5 MB) come from the Python package index, once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.adapt.interventions import interventions
from zolightning.commands.demo.module import PromptClassifier, intervene_at_ending
from zolightning.data import Encoded, PromptTemplate, collate, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.federated import simulate

Batch = dict[str, Any]


class Films:
    """The model, and the texts of all clients and of the test, encoded."""

    def __init__(self, args: argparse.Namespace) -> None:
        L.seed_everything(args.seed, verbose=False)
        texts, prompt = film_snippets(args.seed, validation=0, test=args.test, offline=args.offline), PromptTemplate()
        model, tokenizer = load_causal_lm(offline=args.offline)
        self._pad = tokenizer.pad_token_id
        training = encode(tokenizer, texts.train[: args.clients * args.texts], prompt)
        intervene_at_ending(model, training, self._pad)
        self.module = PromptClassifier(
            model, verbalizer_ids(tokenizer, prompt, texts.label_names), lambda p: SGD(p, lr=args.lr)
        )
        shards = [training[client :: args.clients] for client in range(args.clients)]
        self.shards = [self._batches(shard, args.batch) for shard in shards]
        self.whole = self._batches(training, args.batch * args.clients)  # text i is of client i mod clients
        test = encode(tokenizer, sorted(texts.test, key=lambda example: len(example.text)), prompt)
        self._test = self._batches(test, 32)

    @torch.no_grad()
    def _batches(self, items: list[Encoded], size: int) -> list[Batch]:
        batches = [collate(items[start : start + size], self._pad) for start in range(0, len(items), size)]
        return [self.module.zo_prepare(batch) or batch for batch in batches]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Accuracy in percent and mean loss over the test texts."""
        hits = loss = count = 0.0
        for batch in self._test:
            logits, labels = self.module(batch), batch["labels"]
            hits += float((logits.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return {"accuracy": 100 * hits / count, "loss": loss / count}

    def vectors(self) -> torch.Tensor:
        """A copy of all of them."""
        return nn.utils.parameters_to_vector(each.vectors for each in interventions(self.module.model)).detach().clone()


def federated(films: Films, args: argparse.Namespace) -> dict[str, float]:
    began = time.process_time()
    done = simulate(
        films.module, films.shards, ZOStrategy("reft", lr=args.lr, seed=args.seed), rounds=args.rounds, keys="own",
        schedule=lambda number: (1 + math.cos(math.pi * number / args.rounds)) / 2,
        on_round=lambda each, values: print(f"round {each.number + 1}: loss {each.loss:.4f}", end="\r", flush=True),
    )  # fmt: skip
    refused = [reason for each in done.rounds for reason in each.refused.values()]
    if refused:
        raise SystemExit(f"a client was left out: {refused[0]}")
    sent = {"up_kb_a_client": done.bytes_up / args.clients / 1e3, "down_kb_a_client": done.bytes_down / args.clients / 1e3}
    opening = len(next(iter(done.clients.values())).opening.pack())
    return sent | {"opening_kb": opening / 1e3, "cpu_seconds": time.process_time() - began}


def one_process(films: Films, args: argparse.Namespace) -> dict[str, float]:
    began = time.process_time()
    films.module.decay_steps = args.rounds
    trainer = L.Trainer(
        strategy=ZOStrategy("reft", lr=args.lr, seed=args.seed), max_steps=args.rounds, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(films.module, DataLoader(films.whole, batch_size=None))  # type: ignore[arg-type]
    return {"cpu_seconds": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--texts", type=int, default=64, help="of each client")
    parser.add_argument("--batch", type=int, default=4, help="texts of a client in a round")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--lr", type=float, default=4e-2)
    parser.add_argument("--test", type=int, default=400, help="texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    if args.texts % args.batch:
        parser.error(f"--texts must be a multiple of --batch, got {args.texts} and {args.batch}")
    rows: list[dict[str, Any]] = []

    def show(method: str, found: dict[str, float]) -> None:
        rows.append({"method": method} | {name: round(value, 6) for name, value in (found | films.score()).items()})
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))

    films = Films(args)
    start = films.vectors()
    show("before", {"trained_weights": len(start), "cpu_seconds": time.process_time()})
    show("clients", federated(films, args))
    theirs = films.vectors()
    nn.utils.vector_to_parameters(start, (each.vectors for each in interventions(films.module.model)))
    sent = one_process(films, args)
    apart = float((films.vectors() - theirs).norm() / theirs.norm())
    show("one process", sent | {"vectors_apart": apart})


if __name__ == "__main__":
    main()
