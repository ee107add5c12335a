"""``zolightning bench``: every method on one workload, their steps interleaved in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..console import pick, say


def bench(
    model: str = "smollm2-135m",
    batch: int = 8,
    length: int = 64,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    master: Literal["fp32"] | None = None,
    logits: Literal["last", "full"] = "last",
    methods: list[str] | str | None = None,
    repeats: int = 7,
    warmup: int = 2,
    memory: bool = True,
    threads: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    out: str = "bench.json",
    csv: str | None = None,
    store: str | None = None,
) -> None:
    """Measure time and memory of a ZO step, two forwards, MeZO and backprop. Example: zolightning bench --batch 8 --length 64

    On a GPU: ``zolightning bench --model opt-13b --batch 1 --device cuda --methods forward,reference-mezo,spsa-rademacher``.

    Args:
        model: random weights of smollm2-135m, smollm2-360m, smollm2-1.7b, llama-7b, llama-13b, opt-125m, opt-1.3b, opt-2.7b,
            opt-6.7b, opt-13b, opt-30b, opt-66b, tiny-llama or tiny-opt (no download); or a Hugging Face id or folder.
        batch: The number of examples in a step.
        length: The number of tokens in an example.
        dtype: The dtype of the forward, and of the weights unless there is a master. auto: measured; bf16 with a master, or
            where this machine multiplies matrices much faster in it, else fp32.
        master: fp32: the weights are stored in fp32 and the forward runs in dtype under autocast. The two forwards that it
            is compared with have their weights in dtype.
        logits: 'last': cross-entropy over the vocabulary at the last position; 'full': at every position.
        methods: names separated by commas: forward, forward-master, reference-mezo, spsa-rademacher, spsa-gaussian,
            spsa-middle, rank1, spsa-graphs and rank1-graphs (CUDA graphs), forward-nf4, qzo-nf4, qzo-nf4-graphs, forward-int8,
            qzo-int8 and qzo-int8-graphs (bitsandbytes layers), lightning, backprop-sgd, backprop-adamw, backprop-checkpointed,
            lora. Default: all but those with graphs or quantised layers and lightning. The forwards, which the others are
            compared with, always run.
        repeats: The number of timed steps of each method.
        warmup: The number of steps of each method before the timed ones.
        memory: Measure peak memory in addition, each method in a process of its own.
        threads: The number of CPU threads. Default: PyTorch's number.
        device: The device to run on; auto is the GPU where there is one.
        seed: The seed of weights, batch and perturbations.
        out: The JSON file for all results.
        csv: The CSV file, with a line for each method. Default: beside the JSON file.
        store: An MLflow tracking URI to log to in addition, such as sqlite:///mlflow.db.
    """
    import torch

    from ...adapt.matmul import fastest_dtype
    from ...strategy.onednn import keep_few_shapes
    from .models import check_name
    from .report import log_to_mlflow, text_table, write_csv, write_json
    from .run import run
    from .workload import Spec

    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be >= {least}, got {value}")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` must be >= 1, got {threads}")
    check_name(model)
    keep_few_shapes()  # for all methods, also in the processes that measure peaks
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype == "auto":
        dtype = "bf16" if master or fastest_dtype(torch.device(device)) == torch.bfloat16 else "fp32"
        say(f"dtype {dtype}, the faster one here; --dtype sets another")
    chosen = select_methods(methods, master is not None)
    spec = Spec(model, batch, length, dtype, master, logits, device, threads or torch.get_num_threads(), seed)
    json_path = _output("out", out)
    csv_path = json_path.with_suffix(".csv") if csv is None else _output("csv", csv)
    if csv_path == json_path:
        raise ValueError(f"`out` and `csv` must be two files, got {json_path} for both; let `out` end in .json")

    facts, rows = run(spec, chosen, repeats=repeats, warmup=warmup, memory=memory, say=say)
    write_json(json_path, facts, rows)
    write_csv(csv_path, facts, rows)
    if store is not None:
        log_to_mlflow(store, facts, rows)
    say("\n" + text_table(rows))
    say(
        f"\nMedian of {repeats} interleaved steps, {spec.threads} CPU threads, noise kernels: {facts['machine']['kernels']}; "
        f"a matrix product reaches {facts['gemm']['gflops']:.0f} GFLOP/s.\n{json_path} and {csv_path} have it all."
    )


def select_methods(names: list[str] | str | None, master: bool) -> list[str]:
    """Names of the methods to run, in the order of the table; those that others are compared with are always among them.

    Raises:
        ValueError: unknown name.
    """
    from .methods import DEFAULT_METHODS, FORWARD, FORWARD_MASTER, METHODS

    wanted = set(pick(names, METHODS) or DEFAULT_METHODS)
    if FORWARD_MASTER.name in wanted and not master:
        raise ValueError(f"`methods`: {FORWARD_MASTER.name} is the forward on fp32 masters; it needs master=fp32")
    wanted |= {FORWARD.name, FORWARD_MASTER.name} if master else {FORWARD.name}
    return [name for name in METHODS if name in wanted]


def _output(option: str, name: str) -> Path:
    """The path, in a folder that exists from here on: not after the work is done shall it turn out that it cannot."""
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"`{option}={name}` is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
