"""Quantised models and the ways to train them: which bits, which method, at what memory.

python examples/quantized.py                                     # a few steps of each, to see that everything runs
python examples/quantized.py --steps 150 --seeds 3 --test 1000 --validation 200 --threads 1    # figures
python examples/quantized.py --methods qzo-nf4 qlora --steps 100

The film-review task of ``zolightning demo``. Every run is a process of its own and is recorded in MLflow; table and picture go
to --out, and a run whose result is there already, of the same settings, is not repeated: interrupt it, or start it again with
more seeds. The rows:
plain weights by ZO, also rounded afterwards; QZO, which trains the scales of NF4 or int8 layers and never their codes;
vectors at the prompt's end of the frozen NF4 model by ZO; LoRA on it by ZO and by backprop (QLoRA), with about the arithmetic
of the ZO runs; ZeroQAT, weights that are rounded to 4 or 3 bits while they are trained by ZO, tested as real codes. Test
examples are looked at once, at the end of a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_model, save_model

from zolightning import ZOStrategy
from zolightning.adapt.fakequant import export_quantized, fake_quantize
from zolightning.adapt.quantize import quantize
from zolightning.commands.demo.main import prepare, settle_precision
from zolightning.commands.demo.methods import Method
from zolightning.commands.demo.report import write
from zolightning.commands.demo.run import Result, Task, run_alone, settings
from zolightning.commands.tables import by_method, markdown, spread
from zolightning.records.mlflow_logger import DEFAULT_STORE

HEADER = ("method", "seeds", "accuracy %", "test loss", "weights MB", "peak memory MB", "CPU s", "forwards", "examples")


@dataclass(frozen=True)
class Quantized(Method):
    """A method on a model of fewer bits."""

    kind: str | None = None
    """bitsandbytes layers: 'nf4' or 'int8'."""

    bits: int | None = None
    """Bits of zolightning.adapt.fakequant, 64 weights a scale; codes when it is tested."""

    settings: tuple[tuple[str, Any], ...] = ()
    """What differs from the recipe."""

    after: str | None = None
    """Row whose trained weights this one starts from."""

    weights: Path | None = None
    """Where they are, or where this row leaves its own."""

    def strategy(self) -> Any:
        own = {} if self.lr is None else {"lr": self.lr}
        return "auto" if self.recipe is None else ZOStrategy(self.recipe, **{**own, **dict(self.settings)})

    @property
    def narrow(self) -> bool:
        return True

    def prepare(self, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        model = model.train().to(dtype)
        if self.after is not None and self.weights is not None:
            load_model(model, self.weights)
        if self.kind is not None:
            quantize(model, self.kind, backprop=self.recipe is None)  # type: ignore[arg-type]
        if self.bits is not None:
            fake_quantize(model, self.bits)
            if self.recipe != "zeroqat":
                export_quantized(model)
        if self.lora:
            config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
            model = inject_adapter_in_model(config, model)
        return model if self.steps else self.finish(model)

    def finish(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.weights is not None and self.after is None:
            save_model(model, str(self.weights))
        return export_quantized(model) if self.recipe == "zeroqat" else model


def methods(steps: int, backprop_steps: int, batch_size: int, seeds: int) -> list[Quantized]:
    """The rows. A step of backprop costs three forwards, one of ZO two."""
    none, nf4, int8 = Quantized("", ""), Quantized("", "", kind="nf4"), Quantized("", "", kind="int8")
    shared = {"batch_size": batch_size, "seeds": seeds}
    zo = {**shared, "steps": steps, "decay": True}
    one_direction = (("estimator", "spsa"), ("structure", "dense"))
    lora = {"lora": True, "recipe": "default", "settings": (("select", "re:lora_"),)}
    rounded = {"after": "zo", "seeds": seeds}
    return [
        replace(none, name="zero-shot", title="zero-shot, not quantised"),
        replace(none, name="zo", title="ZO, not quantised", recipe="default", lr=2e-3, **zo),
        replace(nf4, name="zero-shot-nf4", title="zero-shot, NF4"),
        replace(nf4, name="qzo-nf4", title="QZO on NF4", recipe="qzo", lr=2e-2, **zo),
        replace(nf4, name="qzo-nf4-batch", title="QZO on NF4, a direction for the batch", recipe="qzo", lr=2e-2,
                settings=one_direction, **zo),
        replace(nf4, name="qzo-nf4-paper", title="QZO on NF4, paper recipe", recipe="qzo-paper", **{**zo, "decay": False}),
        replace(nf4, name="reft-nf4", title="vectors (ReFT) by ZO on NF4", recipe="reft", interventions=True, **zo),
        replace(nf4, name="lora-zo", title="LoRA by ZO on NF4", lr=1e-2, **lora, **zo),
        replace(nf4, name="qlora", title="QLoRA (backprop) on NF4", lora=True, lr=5e-4, steps=backprop_steps, **shared),
        replace(int8, name="zero-shot-int8", title="zero-shot, int8"),
        replace(int8, name="qzo-int8", title="QZO on int8", recipe="qzo", lr=2e-2, **zo),
        *(row for bits, lr in ((4, 2e-3), (3, 8e-3)) for row in (  # a coarser grid wants longer steps
            replace(none, name=f"ptq{bits}", title=f"zero-shot, rounded to {bits} bits", bits=bits),
            replace(none, name=f"zo-ptq{bits}", title=f"ZO, then rounded to {bits} bits", bits=bits, **rounded),
            replace(none, name=f"zeroqat{bits}", title=f"ZeroQAT, {bits} bits", bits=bits, recipe="zeroqat", lr=lr, **zo),
        )),
        replace(none, name="qzo3", title="QZO on 3-bit codes", bits=3, recipe="qzo", lr=2e-2, **zo),
        replace(none, name="reft3", title="vectors (ReFT) by ZO on 3-bit codes", bits=3, recipe="reft",
                interventions=True, **zo),
        replace(none, name="zeroqat3-probes", title="ZeroQAT, 3 bits, probes through the rounding", bits=3, recipe="zeroqat",
                lr=1e-3, settings=one_direction, **zo),
    ]  # fmt: skip


def rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """The table's cells, one row a method."""
    return [
        (
            runs[0].title,
            str(len(runs)),
            spread([100 * r.accuracy for r in runs], 1),
            spread([r.loss for r in runs], 3),
            f"{runs[0].weights / 1e6:.0f}",
            f"{max(r.peak_memory for r in runs) / 1e6:.0f}",
            spread([r.cpu_seconds for r in runs], 0),
            f"{runs[0].forward_passes:,}",
            f"{runs[0].examples:,}",
        )
        for runs in by_method(results)
    ]


def described(task: Task, method: Quantized, after: Quantized | None, threads: int | None) -> dict[str, Any]:
    """What the result of a run depends on, but for its seed."""
    rows = {
        role: {name: value for name, value in asdict(row).items() if name not in ("seeds", "weights")}
        for role, row in (("method", method), ("after", after))
        if row is not None
    }
    found: dict[str, Any] = json.loads(json.dumps({**settings(task), **rows, "threads": threads}))  # as it is read back
    return found


def result_of(task: Task, method: Quantized, after: Quantized | None, seed: int, threads: int | None) -> Result:
    """The run's result, which is kept from before if it came of the same settings."""
    path = Path(task.out, "runs", f"{method.name}-{seed}.json")
    note, wanted = path.with_suffix(".settings"), described(task, method, after, threads)
    complete = path.exists() and note.exists() and (method.weights is None or method.weights.exists())
    if complete and json.loads(note.read_text()) == wanted:
        return Result.load(path)
    path.unlink(missing_ok=True)  # before its note: a result is never beside the settings of another
    note.write_text(json.dumps(wanted, indent=1))
    return run_alone(task, method, seed, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="names of rows (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each ZO method (default: 5)")
    parser.add_argument("--backprop-steps", type=int, help="steps of QLoRA (default: two thirds of --steps)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step (default: 16)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each trained row (default: 1)")
    parser.add_argument("--validation", type=int, default=50, help="validation examples (default: 50)")
    parser.add_argument("--test", type=int, default=100, help="test examples (default: 100)")
    parser.add_argument("--max-length", type=int, default=128, help="longest prompt in tokens (default: 128)")
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M from the package index)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "32-true", "bf16-true"),
        help="dtype of what is not quantised and of the products (default: the one measured fastest here)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--store", default=DEFAULT_STORE, help=f"MLflow tracking URI (default: {DEFAULT_STORE})")
    parser.add_argument("--out", default="zolightning-quantized", help="folder of the results (default: %(default)s)")
    args = parser.parse_args()

    backprop_steps = args.backprop_steps or max(1, 2 * args.steps // 3)
    known = {m.name: m for m in methods(args.steps, backprop_steps, args.batch_size, args.seeds)}
    if min(args.steps, args.batch_size, args.seeds) < 1:
        parser.error(f"--steps, --batch-size and --seeds must be >= 1, got {args.steps}, {args.batch_size} and {args.seeds}")
    unknown = [name for name in args.methods or () if name not in known]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(known)}")
    task = Task(
        model=args.model, data=None, text="text", label="label", template="{text} It was", verbalizers=(" terrible", " great"),
        validation=args.validation, test=args.test, validations=2, max_length=args.max_length,
        precision=settle_precision(args.precision),
        store=args.store, experiment="zolightning-quantized", out=args.out, offline=False,
    )  # fmt: skip
    prepare(task, args.batch_size)
    names = set(args.methods or known)
    names |= {after for name in names if (after := known[name].after)}
    out, results = Path(args.out), dict[tuple[str, int], Result]()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for name in (name for name in known if name in names and seed < known[name].seeds):
            after = known.get(known[name].after or "")
            weights = out / "runs" / f"{known[name].after or name}-{seed}.safetensors"
            keeps = after or name in {m.after for m in known.values()}
            method = replace(known[name], weights=weights if keeps else None)
            results[name, seed] = result_of(task, method, after, seed, args.threads)
            print(" ".join(rows([results[name, seed]])[0]), flush=True)
    ordered = [results[name, seed] for name in known for seed in range(args.seeds) if (name, seed) in results]
    image = write(ordered, out, settings(task) | {"threads": args.threads})
    table = markdown(HEADER, rows(ordered))
    (out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\npicture: {image}")


if __name__ == "__main__":
    main()
