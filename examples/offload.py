"""Train a model in a quarter of the memory that its weights take, and get the same bits as with all of it.

python examples/offload.py                                       # SmolLM2-135M, about ten minutes on two cores
python examples/offload.py --steps 2 --test 16                   # to see that it runs
python examples/offload.py --model HuggingFaceTB/SmolLM2-1.7B    # any model of the hub, or a folder
python examples/offload.py --offline                             # download nothing

Film reviews, all in a prompt, and ZO steps on the middle layers. Two processes do the same: one has its weights on the disk,
under a limit (RLIMIT_DATA) of a quarter of them above what the libraries took; the other has them in memory. Accuracy, losses
and weights are compared to the bit. The model (93 MB) and the texts come from the Python package index, once; with --offline
and no model in the cache, one of its shape is made of random numbers, which shows memory and bits but no learning.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.commands.bench.models import ARCHITECTURES, random_model
from zolightning.commands.demo.module import PromptClassifier
from zolightning.data import PromptTemplate, collate, encode, film_snippets, load_causal_lm, verbalizer_ids
from zolightning.data.fetch import FetchError
from zolightning.offload import Offload
from zolightning.offload.pretrained import shards

RESERVE = 24_000_000  # of the limit, for activations and Python; the pool has the rest


class Peak(threading.Thread):
    """The most anonymous memory since it began: weights and activations, not the code of libraries."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin = self.most = status("RssAnon")
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, status("RssAnon"))
            time.sleep(0.01)


def status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def model_folder(model: str | None, offline: bool, out: Path) -> str:
    """Where the weights are: they are not loaded here."""
    if model is not None:
        return model
    try:
        from zolightning.data.model import _converted

        return str(_converted(offline))
    except FetchError:
        folder = out / "random"
        if not folder.exists():
            random_model(ARCHITECTURES["smollm2-135m"], torch.float32, torch.device("cpu")).save_pretrained(folder)
        return str(folder)


def train(folder: str, offload: bool, steps: int, test: int, out: Path) -> dict[str, Any]:
    """Test, train and test again in this process."""
    threading.stack_size(1 << 20)
    L.seed_everything(0, verbose=False)
    weights = sum(extent.nbytes for extent in shards(Path(folder)).values())
    limit = weights // 4
    prompt, texts = PromptTemplate(), film_snippets(validation=0, test=test)
    load_causal_lm(folder, stream=True)  # the libraries load what they need, and the weights stay on the disk
    gc.collect()
    peak = Peak()
    if offload:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
    model, tokenizer = load_causal_lm(folder, stream=offload)
    training, _, testing = (encode(tokenizer, part, prompt) for part in texts[:3])
    pad = partial(collate, pad_id=tokenizer.pad_token_id)
    words = verbalizer_ids(tokenizer, prompt, texts.label_names)
    module = PromptClassifier(model.train(), words, partial(torch.optim.SGD, lr=2e-3), decay_steps=steps)
    options = Offload("disk", pool=limit - RESERVE, folder=out / "work") if offload else None
    trainer = L.Trainer(
        strategy=ZOStrategy("default", offload=options, lr=2e-3),
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    )
    shown = DataLoader(testing, 4, collate_fn=pad)
    zero_shot = trainer.test(module, shown, verbose=False)[0]
    trainer.fit(module, DataLoader(training[: 8 * steps], 8, collate_fn=pad))
    trained = trainer.test(module, shown, verbose=False)[0]
    most, found = peak.most, hashlib.sha256()
    for parameter in module.parameters():
        found.update(memoryview(parameter.detach().contiguous().view(torch.uint8).numpy()))
    return {
        "weights": weights,
        "limit": limit if offload else None,
        "peak": most - peak.begin,
        "zero-shot": zero_shot,
        "trained": trained,
        "bits": found.hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M)")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    parser.add_argument("--test", type=int, default=100, help="test examples (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("offload-example"), help="folder of work files and results")
    parser.add_argument("--child", choices=("offloaded", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = model_folder(args.model, args.offline, args.out)
    if args.child:
        print(json.dumps(train(folder, args.child == "offloaded", args.steps, args.test, args.out)))
        return
    results = {}
    for child in ("offloaded", "resident"):
        command = [sys.executable, __file__, "--child", child, "--model", folder, "--out", str(args.out)]
        command += ["--steps", str(args.steps), "--test", str(args.test)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[child] = one = json.loads(done.stdout.splitlines()[-1])
        limit = f", under a limit of {one['limit'] / 1e6:.0f} MB" if one["limit"] else ""
        print(
            f"{child}: test accuracy {one['zero-shot']['test/accuracy']:.1%} -> {one['trained']['test/accuracy']:.1%}; "
            f"peak {one['peak'] / 1e6:.0f} MB above the libraries{limit}; weights {one['weights'] / 1e6:.0f} MB",
            flush=True,
        )
    shutil.rmtree(args.out / "work", ignore_errors=True)
    keys = ("zero-shot", "trained", "bits")
    alike = all(results["offloaded"][key] == results["resident"][key] for key in keys)
    print("accuracy, losses and weights are equal to the bit" if alike else "THEY DIFFER")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
