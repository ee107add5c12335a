"""Zeroth-order training without a Trainer: a plain PyTorch loop, and the same through Lightning Fabric.

python examples/bare_loop.py             # a plain loop
python examples/bare_loop.py --fabric    # Fabric moves the model and sets the precision

A few minutes on two cores; the model (93 MB) and the texts come from the Python package index, once.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from zolightning import Session, recipes
from zolightning.data import (
    PromptTemplate,
    candidate_logits,
    collate,
    encode,
    film_snippets,
    load_causal_lm,
    verbalizer_ids,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fabric", action="store_true", help="let Lightning Fabric move the model")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_causal_lm()
    texts, prompt = film_snippets(validation=200), PromptTemplate()
    train, validation = (encode(tokenizer, part, prompt) for part in texts[:2])
    words = verbalizer_ids(tokenizer, prompt, texts.label_names)
    forward, to_device = model, lambda batch: batch
    if args.fabric:
        from lightning.fabric import Fabric

        fabric = Fabric(devices=1)
        forward, to_device = fabric.setup_module(model), fabric.to_device

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A loss for each example: each gets a direction of its own."""
        return F.cross_entropy(candidate_logits(forward, batch, words), batch["labels"], reduction="none")

    def accuracy() -> float:
        with torch.no_grad():
            hits = [
                (candidate_logits(forward, batch, words).argmax(-1) == batch["labels"]).float().mean()
                for batch in map(to_device, DataLoader(validation, 20, collate_fn=pad))
            ]
        return float(torch.stack(hits).mean())

    def pad(items: list) -> dict[str, torch.Tensor]:
        return collate(items, tokenizer.pad_token_id)

    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    session = Session(model, optimizer, recipes.DEFAULT, inform=print)
    loader = DataLoader(train, 16, shuffle=True, collate_fn=pad)
    print(f"accuracy before training: {accuracy():.3f}")
    for batch in islice(chain.from_iterable(repeat(loader)), args.steps):
        session.estimate(losses, to_device(batch))
        record = session.update()
        if record.step % 10 == 0:
            print(f"step {record.step}: loss {record.loss:.4f}, projected gradient {record.projected_grad:.2f}")
    session.close()
    print(f"accuracy after {args.steps} steps: {accuracy():.3f}")


if __name__ == "__main__":
    main()
