"""Train a model in a quarter of the memory that its weights take, and get the same bits as with all of it.

python examples/offload.py                                     # SmolLM2-135M, about ten minutes on two cores; Linux
python examples/offload.py --steps 2 --test 16                 # to see that it runs
python examples/offload.py --share 0.15                        # a limit of 15 % of the weights
python examples/offload.py --model HuggingFaceTB/SmolLM2-1.7B  # any model of the hub, or a folder with config.json
python examples/offload.py --offline                           # download nothing

Film reviews in a prompt, and ZO steps with a direction for each example. Two processes do the same: one has the weights on the
disk and may take no more memory than a share of their bytes (RLIMIT_DATA), counted from what it had after the libraries had run
a step of a tiny model; the other has them in memory. Accuracies, losses and weights are compared to the bit. The model (93 MB)
and the texts come from the Python package index, once.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zolightning import ZOStrategy
from zolightning.data import PromptTemplate, collate, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.data.candidates import last_states
from zolightning.ledger import fingerprint
from zolightning.offload import Offload, from_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Task(NamedTuple):
    """Encoded prompts, the ids of the label words, and how prompts become a batch."""

    training: list[Any]
    testing: list[Any]
    words: torch.Tensor
    pad: Any


class Sentiment(L.LightningModule):
    """Reads the head's rows of the label words only: no logits of the whole vocabulary, and no whole head in memory."""

    def __init__(self, model: torch.nn.Module, words: torch.Tensor) -> None:
        super().__init__()
        self.model, self.words = model, words

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        head = self.model.get_output_embeddings().weight
        return F.cross_entropy(F.linear(last_states(self.model, batch).float(), head[self.words].float()), batch["labels"])

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        head = self.model.get_output_embeddings().weight
        logits = F.linear(last_states(self.model, batch).float(), head[self.words].float())
        self.log("accuracy", (logits.argmax(-1) == batch["labels"]).float().mean(), batch_size=len(logits))
        self.log("loss", F.cross_entropy(logits, batch["labels"]), batch_size=len(logits))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=2e-3)


class Progress(Callback):
    """A line now and then, and the loss of each step."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps, self.losses, self.began = label, steps, [], time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        done = len(self.losses)
        if done == 1 or done % max(1, self.steps // 6) == 0:
            spent = time.perf_counter() - self.began
            print(f"{self.label}: step {done} of {self.steps}, loss {self.losses[-1]:.4f}, {spent:.0f} s", file=sys.stderr)


def status(key: str) -> int:
    """Bytes of this process: VmRSS in memory now, VmHWM at most, VmData that RLIMIT_DATA counts."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def fitted(task: Task, folder: Path, args: argparse.Namespace, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Test, train, and test again."""
    L.seed_everything(0, verbose=False)
    away = args.child == "offloaded"
    load = partial(from_pretrained, AutoModelForCausalLM) if away else AutoModelForCausalLM.from_pretrained
    module = Sentiment(load(folder, dtype=DTYPES[args.dtype]).eval(), task.words)
    progress = Progress(args.child, args.steps)
    trainer = L.Trainer(
        strategy=ZOStrategy(offload=Offload("disk", folder=out / "work") if away else None),
        max_steps=args.steps,
        accelerator="cpu",
        callbacks=[] if quiet else [progress],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    )
    shown = DataLoader(task.testing, 4, collate_fn=task.pad)
    before = trainer.test(module, shown, verbose=False)[0]
    trainer.fit(module, DataLoader(task.training[: args.batch * args.steps], args.batch, collate_fn=task.pad))
    after = trainer.test(module, shown, verbose=False)[0]
    return {"before": before, "after": after, "losses": progress.losses, "weights": fingerprint(module.named_parameters())}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """The whole task in this process, under the limit where the weights are offloaded."""
    threading.stack_size(1 << 20)
    folder, out = Path(args.model), args.out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt, texts = PromptTemplate(), film_snippets(validation=0, test=args.test)
    training, testing = (encode(tokenizer, part, prompt) for part in (texts.train, texts.test))
    words = verbalizer_ids(tokenizer, prompt, texts.label_names)
    task = Task(training, testing, words, partial(collate, pad_id=tokenizer.pad_token_id))

    tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=2048, num_hidden_layers=2)
    LlamaForCausalLM(tiny).save_pretrained(out / "tiny")
    one = argparse.Namespace(**{**vars(args), "steps": 1})
    fitted(task._replace(testing=testing[:4]), out / "tiny", one, out / "tiny", quiet=True)  # libraries load what they need
    gc.collect()

    began, before, data = time.process_time(), status("VmRSS"), status("VmData")
    if args.child == "offloaded":
        resource.setrlimit(resource.RLIMIT_DATA, (data + args.limit,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the most from now on
    found = fitted(task, folder, args, out)
    return {"peak": status("VmHWM") - before, "seconds": time.process_time() - began} | found


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of the model in this dtype; nothing is loaded."""
    model = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M)")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--share", type=float, default=0.25, help="of the weights' bytes, as the limit (default: 0.25)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--batch", type=int, default=8, help="prompts of a step (default: 8)")
    parser.add_argument("--test", type=int, default=60, help="test prompts (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("offload-example"), help="folder of work files and results")
    parser.add_argument("--child", choices=("offloaded", "resident"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        print(json.dumps(child(args)))
        return
    folder = Path(load_causal_lm(args.model, offline=args.offline, stream=True)[0].name_or_path)
    weights = weight_bytes(folder, DTYPES[args.dtype])
    limit = int(args.share * weights)
    results: dict[str, Any] = {"weights": weights, "limit": limit}
    for name in ("offloaded", "resident"):
        options = {"--child": name, "--model": folder, "--limit": limit, "--out": args.out, "--dtype": args.dtype}
        options |= {"--steps": args.steps, "--batch": args.batch, "--test": args.test}
        command = [sys.executable, __file__, *(str(part) for pair in options.items() for part in pair)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(args.out / "work", ignore_errors=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{weights / 1e6:.0f} MB of weights, a limit of {limit / 1e6:.1f} MB ({args.share:.0%}) above the libraries\n")
    print("| weights | peak above the libraries MB | CPU s | accuracy before | after | test loss after |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in ("offloaded", "resident"):
        r = results[name]
        accuracies = f"{r['before']['accuracy']:.1%} | {r['after']['accuracy']:.1%}"
        print(f"| {name} | {r['peak'] / 1e6:.1f} | {r['seconds']:.0f} | {accuracies} | {r['after']['loss']!r} |")
    keys = ("before", "after", "losses", "weights")
    alike = all(results["offloaded"][key] == results["resident"][key] for key in keys)
    print("\nAccuracies, losses and weights are equal to the bit." if alike else "\nTHEY DIFFER")


if __name__ == "__main__":
    main()
