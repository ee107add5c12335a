"""Offloaded training of a model of 1.08 B weights, measured: memory, bytes through the block layer, bits, waiting.

python examples/offload_bench.py                          # all rows; 11 GB of disk, about half an hour on two cores
python examples/offload_bench.py --layers 1 --steps 2     # to see that everything runs
python examples/offload_bench.py --rows lockstep frozen
python examples/offload_bench.py --rows write-every-8 --steps 16

The model is a Llama of random bfloat16 weights, written to --folder once, one tensor in memory at a time; all weights
are trained, four tokens a step, so that the disk is what a step waits for. Each row is a process of its own, which may take
no more memory than what it had after its imports and two steps of a tiny model, the pool, and 30 MB (RLIMIT_DATA). Another
process then makes the same steps in memory, and has to come to the same losses and weights. The row "compute" runs --tokens
a step in turns with the same model in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from zolightning import Session, ZOConfig
from zolightning.engine.deferred import Deferred
from zolightning.offload import Offload, StoredParameter, attach, from_pretrained

SPARE = 30_000_000
ROWS_HASHED = 1024
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
CONFIG = ZOConfig(estimator="spsa", structure="dense", select="all", normalize=False, eps=3e-3, lr=1e-6, seed=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of running a step."""

    name: str
    title: str
    options: tuple[tuple[str, Any], ...] = ()
    estimator: str = "spsa"
    one_batch: bool = False
    frozen: bool = False
    """Only the second half of the layers is trained."""


ROWS = {
    row.name: row
    for row in (
        Row("lockstep", "two forwards in lockstep"),
        Row("two-passes", "two forwards, one after another", options=(("lockstep", 1),)),
        Row("one-batch", "both probes in one batch", one_batch=True),
        Row("per-example", "a direction for each example", estimator="per_example", one_batch=True),
        Row("frozen", "lockstep, half of the layers frozen", frozen=True),
        Row("write-every-8", "lockstep, written every 8 steps", options=(("write_every", 8),)),
    )
}


def make_model(folder: Path, layers: int) -> None:
    """A folder as Hugging Face's, written past the page cache."""
    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text())["num_hidden_layers"] == layers:
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False, max_position_embeddings=512)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at := at + 2 * shape.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library writes it: weights begin on their boundaries
    generator = torch.Generator().manual_seed(7)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            whole = torch.empty(shape, dtype=torch.bfloat16)
            whole.fill_(1) if len(shape) == 1 else whole.normal_(0, 0.02, generator=generator)
            file.write(memoryview(whole.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    config.save_pretrained(folder)


class Fit:
    """A few steps of a row on the model of a folder."""

    def __init__(self, row: Row, folder: Path, work: Path | None, tokens: int, start: bool = True) -> None:
        """`work`: folder of the work files; None: the model is in memory. `start`: let the store read at once."""
        import transformers

        torch.manual_seed(0)
        if work is not None:
            self.model = from_pretrained(transformers.AutoModelForCausalLM, folder)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        if row.frozen:
            layers = self.model.model.layers
            self.model.requires_grad_(False)
            layers[len(layers) // 2 :].requires_grad_(True)
        options = Offload("disk", folder=work, **dict(row.options))
        self.store = attach(self.model, options, torch.device("cpu"), work) if work is not None else None
        self.row, self.tokens, self.losses = row, tokens, []
        config = CONFIG.override(estimator=row.estimator, structure="auto" if row.estimator == "per_example" else "dense")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        extra = {"apply": Deferred(self.store)} if self.store is not None else {}
        self.session = Session(self.model, SGD(trained, lr=1e-6), config, repeatable=row.one_batch, **extra)
        if self.store is not None and start:
            self.store.start()

    def step(self, number: int) -> None:
        ids = torch.randint(0, 256, (2, self.tokens // 2), generator=torch.Generator().manual_seed(number))
        self.losses += self.session.estimate(self.loss, ids).losses
        self.session.update()

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits.float()
        each = F.cross_entropy(logits.transpose(1, 2), ids.roll(1, 1), reduction="none").mean(1)
        return each if self.row.one_batch else each.double().mean()

    def bits(self) -> str:
        """A hash of all weights."""
        found = hashlib.sha256()
        for _, parameter in self.model.named_parameters():
            for at in range(0, len(parameter), ROWS_HASHED):  # all of an embedding would not fit under the limit
                found.update(memoryview(parameter[at : at + ROWS_HASHED].detach().contiguous().view(torch.uint8).numpy()))
        return found.hexdigest()[:16]

    def close(self) -> None:
        self.session.close()
        if self.store is not None:
            self.store.stop()
            self.store.tier.close()


def status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def block_bytes() -> tuple[int, int]:
    """Read and written by this process, as the block layer counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def in_page_cache(files: Iterator[Path]) -> int:
    found = subprocess.run(["fincore", "-bnro", "RES", *map(str, files)], capture_output=True, text=True, check=True)
    return sum(map(int, found.stdout.split()))


def measure(row: Row, folder: Path, work: Path | None, steps: int) -> dict[str, Any]:
    """Run the row in this process, in memory without `work`."""
    threading.stack_size(1 << 20)
    with tempfile.TemporaryDirectory() as tiny:
        warm_up(row, Path(tiny), work is not None)
    for path in folder.glob("*.safetensors"):  # a run in memory leaves it in the page cache
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, data = status("VmRSS"), status("VmData")
    Path("/proc/self/clear_refs").write_text("5")
    fit = Fit(row, folder, work, tokens=4, start=False)
    pool = fit.store.pool if fit.store is not None else 0
    if fit.store is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data + pool + SPARE,) * 2)
        fit.store.start()
    moved, waited, seconds = [], [], []
    for number in range(steps):
        fit.step(number)
        moved.append(block_bytes())
        seconds.append((time.perf_counter(), time.process_time()))
        waited.append(fit.store.waited if fit.store is not None else 0.0)
    if fit.store is not None:
        fit.store.flush()
    moved.append(block_bytes())
    peak = status("VmHWM")
    written = fit.store.tier.written_bytes if fit.store is not None else 0
    away = [p for p in fit.model.parameters() if isinstance(p, StoredParameter)]
    streamed = sum(p.nbytes for p in away)
    cached = in_page_cache([*folder.glob("*.safetensors"), *work.glob("weights-*.bin")]) if work is not None else 0
    result = {
        "weights": sum(p.numel() for p in fit.model.parameters()),
        "largest": max((p.nbytes for p in away), default=0),
        "streamed": streamed,
        "trained": sum(p.nbytes for p in away if p.requires_grad),
        "pool": pool,
        "peak": peak - before,
        "read": [b[0] - a[0] for a, b in pairwise(moved)],
        "written": [b[1] - a[1] for a, b in pairwise(moved)],
        "written_in_all": written,
        "wall": [b[0] - a[0] for a, b in pairwise(seconds)],
        "cpu": [b[1] - a[1] for a, b in pairwise(seconds)],
        "waited": [b - a for a, b in pairwise(waited)],
        "page_cache": cached,
        "direct": fit.store is None or all(f.direct for f in [*fit.store.tier._files.values(), *fit.store.tier._work]),
        "losses": fit.losses,
        "bits": fit.bits(),
    }
    fit.close()
    return result


def warm_up(row: Row, folder: Path, offload: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}, num_hidden_layers=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    fit = Fit(row, folder, folder / "work" if offload else None, tokens=4)
    fit.step(0)
    fit.step(1)
    fit.close()


def compute(folder: Path, work: Path, steps: int, tokens: int) -> dict[str, Any]:
    """Steps of many tokens, offloaded and in memory in turns."""
    fits = [Fit(ROWS["lockstep"], folder, place, tokens) for place in (work, None)]
    cpu, wall, waited = [[], []], [[], []], []
    for number in range(1 + steps):
        for place, fit in enumerate(fits):
            began, began_cpu, had = time.perf_counter(), time.process_time(), fits[0].store.waited
            fit.step(number)
            wall[place].append(time.perf_counter() - began)
            cpu[place].append(time.process_time() - began_cpu)
            waited += [fits[0].store.waited - had] if place == 0 else []
    result = {
        "tokens": tokens,
        "cpu": [part[1:] for part in cpu],
        "wall": [part[1:] for part in wall],
        "ratio": sum(cpu[0][1:]) / sum(cpu[1][1:]),
        "waiting": sum(waited[1:]) / sum(wall[0][1:]),
        "equal": fits[0].losses == fits[1].losses,
    }
    for fit in fits:
        fit.close()
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """In Markdown; bytes are those of a step but the first, which tries the step on its batch."""
    lines = [
        "| | steps | peak above imports MB | pool MB | read a step | written a step | waiting | CPU s a step | in memory | "
        "page cache MB | same bits |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    mean = lambda many: sum(many) / len(many) if many else float("nan")  # noqa: E731
    for name, r in results.items():
        if name == "compute":
            lines += [
                "",
                f"{r['tokens']} tokens a step, in turns with the model in memory: {r['ratio']:.3f} × its CPU seconds, waiting "
                f"{r['waiting']:.1%}, losses {'equal' if r['equal'] else 'NOT EQUAL'}.",
            ]
            continue
        twin, count = r["in_memory"], len(r["wall"]) + 1
        lines.append(
            f"| {ROWS[name].title} | {count} | {r['peak'] / 1e6:.0f} | {r['pool'] / 1e6:.0f} | "
            f"{mean(r['read'][:-1]) / r['streamed']:.4f} × | {r['written_in_all'] / count / r['trained']:.4f} × | "
            f"{sum(r['waited']) / sum(r['wall']):.0%} | {mean(r['cpu']):.1f} | {mean(twin['cpu']):.1f} | "
            f"{r['page_cache'] / 1e6:.2f} | {'yes' if [r['losses'], r['bits']] == [twin['losses'], twin['bits']] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "compute"], default=[*ROWS, "compute"])
    parser.add_argument("--layers", type=int, default=14, help="of the Llama; 14 make 1.07 B weights (default: 14)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a row (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, help="of a step of the row 'compute' (default: 128)")
    parser.add_argument("--folder", type=Path, default=Path("offload-bench"), help="of the model, work files and results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, work = args.folder / f"model-{args.layers}", args.folder / "work"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if args.child:
        row, where = args.child
        away = work if where == "disk" else None
        run = compute(model, work, args.steps, args.tokens) if row == "compute" else measure(ROWS[row], model, away, args.steps)
        print(json.dumps(run))
        return
    make_model(model, args.layers)
    path = args.folder / f"results-{args.layers}.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def child(name: str, where: str) -> dict[str, Any]:
        shutil.rmtree(work, ignore_errors=True)
        options = {"--layers": args.layers, "--steps": args.steps, "--tokens": args.tokens, "--folder": args.folder}
        command = [sys.executable, __file__, "--child", name, where, *(str(part) for pair in options.items() for part in pair)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    for name in args.rows:
        results[name] = child(name, "disk")
        if name != "compute":
            results[name]["in_memory"] = child(name, "memory")
        path.write_text(json.dumps(results))
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()
