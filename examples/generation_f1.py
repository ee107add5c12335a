"""Train on the F1 of generated text: the probes let the model answer, score the answers, and see nothing else.

The task: say the words of feeling in a sentence of a film review. They are those of the sentence that the VADER lexicon
rates, so "a gorgeous, witty, seductive movie." wants "gorgeous witty seductive". The prompt begins with an answered sentence,
or more of them (`--shown`), encoded once for all. Teacher forcing and cross-entropy play no part: each probe generates with
`model.generate`, and the loss of a sentence is 1 - F1 of its answer. All that is trained is vectors at the prompt's ending, or
four numbers that are added to the logits of kinds of tokens (`--train bias`).

python examples/generation_f1.py
python examples/generation_f1.py --train bias --shown 10 --steps 40 --batch 32 --queries 1 --lr 0.1

The model and the texts (95 MB) come from the Python package index, once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning import ZOMixin, ZOMonitor, ZOStrategy
from zolightning.adapt.interventions import at_prompts, idle, interventions
from zolightning.adapt.matmul import fastest_dtype
from zolightning.commands.demo.module import PromptData, intervene_at_ending
from zolightning.data import (
    VADER,
    Beginning,
    Encoded,
    Example,
    common_ending,
    encode_text,
    fetch,
    film_snippets,
    generate_answers,
    load_causal_lm,
    tokens_written,
)
from zolightning.data.archives import read_tar_member
from zolightning.objectives import exact_match, text_errors, token_f1
from zolightning.objectives.text import TextScore

ANSWERED = "Sentence: {text}\nWords of feeling: {answer}\n\n"
ASKED = "Sentence: {text}\nWords of feeling:"
SHOWN = ("a dull, unfunny mess.", "dull unfunny mess")
SCORES = {"f1": token_f1, "exact_match": exact_match}


def lexicon() -> set[str]:
    """The words that VADER rates at least 1.5 away from neutral."""
    table = read_tar_member(fetch(VADER), "vaderSentiment-2.5/vaderSentiment/vader_lexicon.txt").decode()
    rows = (line.split("\t") for line in table.splitlines() if line)
    return {word for word, rating, *_ in rows if word.isalpha() and abs(float(rating)) >= 1.5}


def questions(part: Iterable[Example], words: set[str]) -> list[tuple[str, str]]:
    """(sentence, its rated words) of the short sentences with one to three."""
    found = []
    for text, _ in part:
        rated = [w for w in (word.strip(".,;:!?'\"()-") for word in text.split()) if w.lower() in words]
        if 1 <= len(rated) <= 3 and 4 <= len(text.split()) <= 14:
            found.append((text, " ".join(rated)))
    return found


class Answering(ZOMixin, L.LightningModule):
    """A language model trained on a score of the text that it writes; ``batch["labels"]`` are places in ``wanted``.

    Args:
        model: with interventions, or other trained numbers that the text before the last token does not pass.
        tokenizer: the model's.
        beginning: the tokens that all prompts begin with; batches have the others.
        wanted: the right answers.
        scores: of an answer, by name; the first is trained on.
        length: most tokens of an answer.
        lr: RMS change of a step at the start.
        share: of the training that is over, from the steps so far; the rate falls along a cosine.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        beginning: Beginning,
        wanted: list[str],
        scores: Mapping[str, TextScore],
        length: int,
        lr: float,
        share: Callable[[int], float],
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.beginning, self.wanted = model, tokenizer, beginning, wanted
        self.scores, self.length, self.lr, self.share = scores, length, lr, share
        self.history: list[dict[str, float]] = []

    def forward(self, batch):
        batch = batch if "text" in batch else self.begun(batch)
        with at_prompts(self.model):
            return generate_answers(self.model, self.tokenizer, batch, self.length, self.adjust(batch))

    def begun(self, batch):
        """The batch, going on from the beginning."""
        return self.beginning(batch)

    def adjust(self, batch):
        """The change of the logits of an answer, see `generate_answers`; None: there is none."""

    def zo_prepare(self, batch):  # the text before the vectors: encoded once for all probes
        made = interventions(self.model)
        with idle(made):
            return encode_text(self.model, self.begun(batch), made[0].positions if made else 1)

    def zo_objective(self, batch):
        return text_errors(self(batch), self.references(batch), next(iter(self.scores.values())))  # (B,): 1 - score

    def references(self, batch):
        return [[self.wanted[i]] for i in batch["labels"].tolist()]

    def on_train_batch_end(self, *_):
        self.log("tokens_written", float(tokens_written()))

    def _score(self, batch, stage):
        answers, references = self(batch), self.references(batch)
        for name, score in self.scores.items():
            value = 1 - text_errors(answers, references, score).mean()
            self.log(f"{stage}/{name}", value, batch_size=len(answers), prog_bar=True)
        return zip(answers, references, strict=True)

    def validation_step(self, batch, batch_idx):
        answered = self._score(batch, "val")
        if batch_idx == 0:
            print(*(f"{answer!r}, wanted {right!r}" for answer, (right,) in list(answered)[:4]), sep="\n")

    def on_validation_epoch_end(self):
        values = self.trainer.callback_metrics
        self.history.append({"step": self.global_step} | {name: float(values[f"val/{name}"]) for name in self.scores})
        print(f"step {self.global_step}:", ", ".join(f"{name} {self.history[-1][name]:.1%}" for name in self.scores))

    def test_step(self, batch, batch_idx):
        self._score(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * min(1.0, self.share(step)))) / 2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CopyBias(nn.Module):
    """Adds a trained number to the logit of each token of a kind, see ``KINDS``; of several kinds the last one counts.

    Args:
        joints: tokens between two words of a list.
        end: the token of a line break.
        scale: logits for a trained number of 1.
    """

    KINDS = ("in the sentence", "a joint", "written already", "the end")

    def __init__(self, joints: list[int], end: int, scale: float = 2.0) -> None:
        super().__init__()
        self.joints, self.end, self.scale = joints, end, scale
        self.numbers = nn.Parameter(torch.zeros(len(self.KINDS)))

    def forward(self, sentence: Tensor, written: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, vocabulary) of the next token, from the sentence's tokens (B, n) and those written so far (B, m)."""
        kind = torch.zeros_like(logits, dtype=torch.long).scatter_(1, sentence, 1)
        kind[:, self.joints] = 2
        kind.scatter_(1, written, 3)
        kind[:, self.end] = 4
        rows = torch.add(logits.new_zeros(len(logits), len(self.KINDS)), self.numbers, alpha=self.scale)  # each row's own
        return logits + F.pad(rows, (1, 0)).gather(1, kind)


class Copying(Answering):
    """The same with ``model.bias``, a :class:`CopyBias`; ``ending`` tokens of a prompt come after its sentence."""

    def __init__(self, *args: Any, ending: int) -> None:
        super().__init__(*args)
        self.ending = ending

    def adjust(self, batch):
        return partial(self.model.bias, batch["sentence"])

    def begun(self, batch):
        """With the tokens of its sentences, one again and again in place of padding."""
        tokens = batch["input_ids"][:, : -self.ending]
        here = batch["attention_mask"][:, : -self.ending].bool()
        return super().begun(batch) | {"sentence": torch.where(here, tokens, tokens[:, -1:])}


class Prompts:
    """Prompts that all begin alike, and the right answers.

    Args:
        tokenizer: the model's.
        template: the prompt, with a space and {text} at the text's place.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template, self.wanted = tokenizer, template, list[str]()
        self.beginning: list[int] = tokenizer(template.split(" {text}")[0])["input_ids"]

    def __call__(self, part: Iterable[tuple[str, str]]) -> list[Encoded]:
        """The tokens of each (text, right answer) behind the beginning."""
        items = []
        for text, answer in part:
            tokens = self.tokenizer(self.template.replace("{text}", text))["input_ids"]
            items.append(Encoded(tokens[len(self.beginning) :], len(self.wanted)))
            self.wanted.append(answer)
        return items


def draw(result: dict, path: Path) -> None:
    """F1 of the validation sentences against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot([h["step"] for h in result["history"]], [100 * h["f1"] for h in result["history"]], "o-", label="validation")
    ends = [100 * result[name]["test/f1"] for name in ("zero_shot", "tested")]
    axes.plot([0, result["steps"]], ends, "D", color="#d62728", label="test, before and after")
    axes.axhline(100 * result["copying"], color="#7f7f7f", linestyle="--", label="the whole sentence as the answer")
    axes.set(xlabel="step", ylabel="F1 of generated answers, %", ylim=(0, 1.15 * axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=("vectors", "bias"), default="vectors", help="the trained numbers")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument("--batch", type=int, default=16, help="sentences a step (default: 16)")
    parser.add_argument("--queries", type=int, default=4, help="directions for each sentence (default: 4)")
    parser.add_argument("--lr", type=float, default=4e-2, help="RMS change of a step at the start (default: 4e-2)")
    parser.add_argument("--eps", type=float, default=0.4, help="perturbation scale (default: 0.4)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model (default: the one measured fastest here)"
    )
    parser.add_argument(
        "--shown", type=int, default=0, help="training sentences that the prompt shows, in place of one (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=int, default=50, help="sentences of the curve (default: 50)")
    parser.add_argument("--test", type=int, default=150, help="sentences for reporting (default: 150)")
    parser.add_argument("--out", type=Path, default=Path("generation-f1"), help="folder of the results")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model, tokenizer = load_causal_lm()
    words, texts = lexicon(), film_snippets(validation=1000, test=2000)
    found = [questions(part, words) for part in texts[:3]]
    shown, train = found[0][: args.shown] or [SHOWN], found[0][args.shown :]
    validation, test = found[1][: args.validation], found[2][: args.test]
    encode = Prompts(tokenizer, "".join(ANSWERED.format(text=text, answer=answer) for text, answer in shown) + ASKED)
    prompts = [encode(part) for part in (train, validation, test)]
    data = PromptData(*prompts, tokenizer.pad_token_id, batch_size=args.batch, seed=args.seed)
    model = model.to(getattr(torch, args.dtype) if args.dtype else fastest_dtype()).train()
    beginning = Beginning(model, encode.beginning)
    parts = (model, tokenizer, beginning, encode.wanted, SCORES, 6, args.lr, lambda step: step / args.steps)
    if args.train == "vectors":
        intervene_at_ending(model, prompts[0], tokenizer.pad_token_id)
        module = Answering(*parts)
    else:
        joints = [tokenizer(text)["input_ids"][0] for text in (",", " and", ".")]
        model.requires_grad_(False).bias = CopyBias(joints, tokenizer("\n")["input_ids"][0])
        module = Copying(*parts, ending=common_ending(prompts[0]))
    trainer = L.Trainer(
        strategy=ZOStrategy("reft", select="all", lr="module", ledger=False, eps=args.eps, num_queries=args.queries),
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 6),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the first point: zero-shot
        logger=False,
        callbacks=[ZOMonitor()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    zero_shot = trainer.test(module, data, verbose=False)[0]
    started, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, data)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu  # the validations included
    tested = trainer.test(module, data, verbose=False)[0]
    copying = sum(token_f1(text, [answer]) for text, answer in test) / len(test)
    result = {k: v for k, v in vars(args).items() if k != "out"} | {
        "zero_shot": zero_shot, "tested": tested, "copying": copying, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(), "history": module.history,
    }  # fmt: skip
    if args.train == "bias":
        result["bias"] = dict(zip(CopyBias.KINDS, (model.bias.scale * model.bias.numbers).tolist(), strict=True))
        print("added to the logits:", ", ".join(f"{value:+.2f} {kind}" for kind, value in result["bias"].items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"f1-seed{args.seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(f"test F1 {zero_shot['test/f1']:.1%} -> {tested['test/f1']:.1%}; the whole sentence would be {copying:.1%}; {path}")


if __name__ == "__main__":
    main()
