"""How the default recipe was chosen: which weights, which directions, which step size, at equal steps.

python examples/choose_recipe.py --steps 100   # about five minutes a setting on two cores

Prints accuracy and loss on 200 validation examples; the test examples are not looked at.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.commands.demo.module import PromptClassifier, PromptData
from zolightning.data import PromptTemplate, encode, film_snippets, load_causal_lm, verbalizer_ids

SETTINGS = {
    "per example, middle third, lr 1e-3": (1e-3, {}),
    "per example, middle third, lr 2e-3": (2e-3, {}),
    "per example, middle third, lr 3e-3": (3e-3, {}),
    "per example, five middle blocks, lr 3e-3": (3e-3, {"select": "blocks:12-16"}),
    "per example, all blocks, lr 1e-3": (1e-3, {"select": "re:layers"}),
    "one rank-1 direction, middle third, lr 1e-3": (1e-3, {"estimator": "spsa", "structure": "rank1"}),
    "one dense direction, middle third, lr 1e-3": (1e-3, {"estimator": "spsa", "structure": "dense"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each setting (default: 100)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches and the perturbations (default: 0)")
    args = parser.parse_args()

    texts, prompt = film_snippets(), PromptTemplate()
    for name, (lr, overrides) in SETTINGS.items():
        L.seed_everything(args.seed, verbose=False)
        model, tokenizer = load_causal_lm()
        train, validation = (encode(tokenizer, part, prompt) for part in (texts.train[:6000], texts.validation[:200]))
        data = PromptData(train, validation, [], tokenizer.pad_token_id, args.batch_size, args.seed)
        candidates = verbalizer_ids(tokenizer, prompt, texts.label_names)
        module = PromptClassifier(model, candidates, lambda p, lr=lr: torch.optim.SGD(p, lr=lr), decay_steps=args.steps)
        monitor = ZOMonitor(name)
        trainer = L.Trainer(
            strategy=ZOStrategy(**overrides),
            max_steps=args.steps,
            limit_val_batches=0,
            logger=mlflow_logger(name, experiment="choose-recipe"),
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)
        trainer.limit_val_batches = 1.0
        found = trainer.validate(module, data, verbose=False)[0]
        accuracy, loss = 100 * found["val/accuracy"], found["val/loss"]
        print(f"{name:45}  {accuracy:5.1f} %  loss {loss:.3f}  {monitor.train_seconds:4.0f} s", flush=True)


if __name__ == "__main__":
    main()
