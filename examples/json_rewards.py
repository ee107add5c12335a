"""Train a language model to write JSON by a program's score of it, beside prompts that are searched for, and GRPO on LoRA.

python examples/json_rewards.py                               # zeroth order, one seed, seven minutes on one core
python examples/json_rewards.py --methods zo prompts grpo labels --seeds 0 1 2      # GRPO needs `pip install trl`

The model reads a sentence of a film review behind four answered ones, and writes an object of three fields: whether it is rated
good or bad, whether it is short or long (more than 16 words), and whether it says film, movie or story. A program parses the
answer and counts the fields that are right; methods see that score and nothing else, but for the last, and train for the same
CPU seconds:

zo       a number added to the logit of each of the six values, by SPSA with a direction of its own for each sentence; probes
         generate greedily
prompts  best of n: answered examples drawn at random from the training sentences, the best by the score of 64 others
grpo     GRPO on LoRA (arXiv:2402.03300) by trl, with its defaults but for the settings in this file
labels   LoRA by backprop on the right answers, which a score does not tell: the model's ceiling
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from generation_f1 import Answering, Prompts
from torch import Tensor, nn

from zolightning import ZOMonitor, ZOStrategy
from zolightning.commands.demo.module import PromptData
from zolightning.commands.tables import markdown, spread
from zolightning.data import (
    Beginning,
    Encoded,
    Example,
    collate,
    film_snippets,
    generate_answers,
    load_causal_lm,
    tokens_written,
)
from zolightning.records.memory import MemoryMeter

WORDS = {"film", "movie", "story"}
SHOTS = (
    Example("a dull, unfunny mess.", 0),
    Example(
        "a portrait of a family that keeps its secrets until the very last minute, and its heart for a long time after that.",
        1,
    ),
    Example("for two hours nothing happens to anyone that you would care about, and then a dog dies and this film ends.", 0),
    Example("it is a story told with wit.", 1),
)
LENGTH = 18
"""Most tokens of an answer; the right ones have 15, with the line break at their end."""


def right(example: Example) -> str:
    """The answer that the program wants."""
    words = example.text.split()
    says = any(word.strip(".,;:!?'\"()-").lower() in WORDS for word in words)
    values = {
        "rating": ("bad", "good")[example.label],
        "length": "long" if len(words) > 16 else "short",
        "film": "yes" if says else "no",
    }
    return json.dumps(values, separators=(",", ":"))


def fields(answer: str, references: Sequence[str]) -> float:
    """A quarter for JSON with an object, and one for each field that is right."""
    (wanted,) = map(json.loads, references)
    try:
        found = json.loads(answer)
    except ValueError:
        return 0.0
    return (1 + sum(found.get(name) == value for name, value in wanted.items())) / 4 if isinstance(found, dict) else 0.0


def line(answer: str) -> str:
    """Its first one."""
    return answer.split("\n", 1)[0].strip()


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether the object is the right one."""
    return float(fields(answer, references) == 1)


SCORES = {"score": fields, "exact": exact}


def template(shots: Sequence[Example]) -> str:
    """The prompt: answered sentences, and one to answer."""
    answered = "".join(f"Sentence: {shot.text}\nJSON: {right(shot)}\n\n" for shot in shots)
    return answered + "Sentence: {text}\nJSON:"


@dataclass
class Task:
    """A model, sentences, and the settings."""

    model: Any
    tokenizer: Any
    train: list[Example]
    seed: int
    options: argparse.Namespace

    def score(self, part: Sequence[Example], shots: Sequence[Example] = SHOTS) -> tuple[float, float]:
        """Share of exact answers, and the mean score, of the model as it is."""
        prompts, scores = Prompts(self.tokenizer, template(shots)), []
        items = sorted(prompts([(example.text, right(example)) for example in part]), key=lambda item: len(item.input_ids))
        beginning = Beginning(self.model, prompts.beginning)
        for start in range(0, len(items), 64):
            batch = beginning(collate(items[start : start + 64], self.tokenizer.pad_token_id))
            answers = generate_answers(self.model, self.tokenizer, batch, LENGTH)
            wanted = [prompts.wanted[place] for place in batch["labels"].tolist()]
            scores += [fields(answer, [one]) for answer, one in zip(answers, wanted, strict=True)]
        return fmean(score == 1 for score in scores), fmean(scores)


class Clock(L.Callback):
    """Ends a fit after some CPU seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.process_time()

    def share(self) -> float:
        """Of the seconds that are over."""
        return (time.process_time() - self.begun) / self.seconds

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = self.share() >= 1


class TokenBias(nn.Module):
    """Adds one trained number to the logit of each of some tokens; a forward hook of the output embedding.

    Args:
        tokens: their ids.
        scale: logits for a trained number of 1.
    """

    def __init__(self, tokens: Sequence[int], scale: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor(tokens))
        self.scale, self.numbers = scale, nn.Parameter(torch.zeros(len(tokens)))

    def forward(self, head: nn.Module, args: Any, out: Tensor) -> Tensor:
        moved = torch.add(out[:, -1, self.tokens], self.numbers, alpha=self.scale)
        return out.index_copy(-1, self.tokens, moved[:, None])


def zo(task: Task) -> dict[str, Any]:
    """The bias of the values by forwards."""
    options, prompts = task.options, Prompts(task.tokenizer, template(SHOTS))
    items = prompts([(example.text, right(example)) for example in task.train])
    beginning, model = Beginning(task.model, prompts.beginning), task.model.requires_grad_(False)
    values = sorted({value for answer in prompts.wanted[:100] for value in json.loads(answer).values()})
    model.bias = TokenBias([token for value in values for token in task.tokenizer(value)["input_ids"]])
    model.lm_head.register_forward_hook(model.bias)
    clock = Clock(options.seconds)
    module = Answering(model, task.tokenizer, beginning, prompts.wanted, SCORES, LENGTH, options.lr, lambda step: clock.share())
    trainer = L.Trainer(
        strategy=ZOStrategy(
            lr="module", eps=options.eps, num_queries=options.queries, select="all", ledger=False, seed=task.seed
        ),
        max_steps=-1,
        callbacks=[clock, ZOMonitor()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, PromptData(items, [], [], task.tokenizer.pad_token_id, options.batch, task.seed))
    return {"steps": trainer.global_step, "bias": dict(zip(values, model.bias.numbers.tolist(), strict=True))}


def prompts_of(task: Task) -> dict[str, Any]:
    """The best of n draws of answered examples."""
    draw, clock, best, tried = random.Random(task.seed), Clock(task.options.seconds), (-1.0, SHOTS), 0
    while clock.share() < 1:
        shots = tuple(draw.sample(task.train, len(SHOTS)))
        best, tried = max(best, (task.score(draw.sample(task.train, 64), shots)[1], shots)), tried + 1
    return {"tried": tried, "shots": best[1]}


def asked(example: Example) -> str:
    """The prompt of a sentence."""
    return template(SHOTS).replace("{text}", example.text)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")


def grpo(task: Task) -> dict[str, Any]:
    """LoRA by GRPO: groups of sampled answers, their scores less the group's mean, and backprop."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"GRPO needs another package: pip install trl ({error})") from error
    from transformers import TrainerCallback

    clock = Clock(task.options.seconds)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock.share() >= 1

    def reward(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
        return [fields(line(answer), [one]) for answer, one in zip(completions, wanted, strict=True)]

    rows = [{"prompt": asked(example), "wanted": right(example)} for example in task.train]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, use_cpu=True, bf16=False, per_device_train_batch_size=16, num_generations=8, max_completion_length=LENGTH,
            learning_rate=task.options.grpo_lr, lr_scheduler_type="constant", max_steps=10_000, save_strategy="no",
            report_to="none", seed=task.seed, disable_tqdm=True, logging_steps=1000,
        )  # fmt: skip
        trainer = GRPOTrainer(
            task.model, reward, config, Dataset.from_list(rows), processing_class=task.tokenizer, callbacks=[Stop()],
            peft_config=lora(),
        )  # fmt: skip
        trainer.train()
    task.model.eval()
    return {"steps": trainer.state.global_step}


def labels(task: Task) -> dict[str, Any]:
    """LoRA by backprop on the right answers."""
    from peft import get_peft_model

    task.model = get_peft_model(task.model, lora())
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad])
    draw, clock, steps = random.Random(task.seed), Clock(task.options.seconds), 0
    while clock.share() < 1:
        items, wanted = [], []
        for example in draw.sample(task.train, 16):
            before = task.tokenizer(asked(example))["input_ids"]
            answer = task.tokenizer(f" {right(example)}\n")["input_ids"]
            items.append(Encoded(before + answer, 0))
            wanted.append(torch.tensor([-100] * len(before) + answer))
        batch, last = collate(items, task.tokenizer.pad_token_id), LENGTH + 1
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = task.model(**inputs, logits_to_keep=last + 1).logits[:, :-1]
        optimizer.param_groups[0]["lr"] = task.options.labels_lr * (1 + math.cos(math.pi * min(1.0, clock.share()))) / 2
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), torch.cat([one[-last:] for one in wanted])).backward()
        optimizer.step()
        steps += 1
    task.model = task.model.merge_and_unload().eval()
    return {"steps": steps}


METHODS = {"few-shot": lambda task: {}, "zo": zo, "prompts": prompts_of, "grpo": grpo, "labels": labels}


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for method in dict.fromkeys(one["method"] for one in results):
        own = [one for one in results if one["method"] == method]
        shares = [spread([100 * one[name] for one in own], 1) for name in ("exact", "score")]
        spent = (f"{fmean(one[name] for one in own) / 1e9:.2f}" for name in ("peak", "generation"))
        rest = (f"{fmean(one[name] for one in own):,.0f}" for name in ("cpu_seconds", "tokens"))
        rows.append([method, str(len(own)), *shares, *spent, *rest])
    header = ("method", "seeds", "exact %", "score %", "peak GB", "generation GB", "CPU s", "tokens written")
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["zo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of training of each run (default: 300)")
    parser.add_argument("--test", type=int, default=300, help="sentences for reporting (default: 300)")
    parser.add_argument("--validation", action="store_true", help="report on validation sentences, for choosing settings")
    parser.add_argument("--batch", type=int, default=64, help="sentences a step of zo (default: 64)")
    parser.add_argument("--queries", type=int, default=1, help="directions of zo for each sentence (default: 1)")
    parser.add_argument("--lr", type=float, default=0.1, help="RMS change of a step of zo at the start (default: 0.1)")
    parser.add_argument("--eps", type=float, default=0.4, help="perturbation scale of zo (default: 0.4)")
    parser.add_argument("--grpo-lr", type=float, default=1e-4, help="learning rate of GRPO's LoRA (default: 1e-4)")
    parser.add_argument("--labels-lr", type=float, default=5e-4, help="learning rate of the labels' LoRA (default: 5e-4)")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--out", type=Path, help="where the results are kept, and added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = film_snippets(validation=400, test=1000, offline=options.offline)
    part = (texts.validation if options.validation else texts.test)[: options.test]
    results: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for method in options.methods:
        for seed in options.seeds:
            L.seed_everything(seed, verbose=False)
            task = Task(*load_causal_lm(offline=options.offline), texts.train, seed, options)
            meter, begun, written = MemoryMeter(task.model, torch.device("cpu")), time.process_time(), tokens_written()
            found = METHODS[method](task)
            found |= {"peak": meter.peak(), "cpu_seconds": time.process_time() - begun, "tokens": tokens_written() - written}
            meter = MemoryMeter(task.model, torch.device("cpu"))
            exact, score = task.score(part, found.pop("shots", SHOTS))
            found |= {"generation": meter.peak(), "seconds": options.seconds}
            results.append({"method": method, "seed": seed, "exact": exact, "score": score, **found})
            print(results[-1], flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
