"""``zolightning bench``: every method on one workload, their steps interleaved in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..clock import Clock
from ..console import pick, say

if TYPE_CHECKING:
    from .workload import Spec


@dataclass(frozen=True)
class Bench:
    """Measure time and memory of a ZO step, two forwards, MeZO and backprop. Example: zolightning bench --batch 8 --length 64

    On a GPU: ``zolightning bench --model opt-13b --batch 1 --device cuda --methods forward,reference-mezo,spsa-rademacher``.
    """

    model: str = "smollm2-135m"
    """Random weights of smollm2-135m, smollm2-360m, smollm2-1.7b, llama-7b, llama-13b, llama3.2-1b, llama3.2-3b, llama3-8b,
    llama3-70b, mistral-7b, opt-125m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, opt-175b, tiny-llama or tiny-opt
    (no download); or a Hugging Face id or folder."""
    batch: int = 8
    """The number of examples in a step."""
    length: int = 64
    """The number of tokens in an example."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The dtype of the forward, and of the weights unless there is a master. auto: measured; bf16 with a master, or where this
    machine multiplies matrices much faster in it, else fp32."""
    master: Literal["fp32"] | None = None
    """fp32: the weights are stored in fp32 and the forward runs in dtype under autocast. The two forwards that it is compared
    with have their weights in dtype."""
    logits: Literal["last", "full"] = "last"
    """'last': cross-entropy over the vocabulary at the last position; 'full': at every position."""
    methods: list[str] | str | None = None
    """Names separated by commas: forward, forward-master, reference-mezo, spsa-rademacher, spsa-gaussian, spsa-middle, rank1,
    spsa-graphs and rank1-graphs (CUDA graphs), forward-nf4, qzo-nf4, qzo-nf4-graphs, forward-int8, qzo-int8 and qzo-int8-graphs
    (bitsandbytes layers), lightning, backprop-sgd, backprop-adamw, backprop-checkpointed, lora. Default: all but those with
    graphs or quantised layers and lightning. The forwards, which the others are compared with, always run."""
    repeats: int = 7
    """The number of timed steps of each method."""
    warmup: int = 2
    """The number of steps of each method before the timed ones. A ZO method has taken a fit's first five before, in which it
    looks for state that the module keeps."""
    clock: Clock = "wall"
    """The clock of the seconds. cpu counts the CPU time of all threads, which is fair where other programs share the machine;
    not for a GPU."""
    memory: bool = True
    """Measure peak memory in addition, each method in a process of its own."""
    threads: int | None = None
    """The number of CPU threads. Default: PyTorch's number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to run on; auto is the GPU where there is one."""
    seed: int = 0
    """The seed of weights, batch and perturbations."""
    out: str = "bench.json"
    """The JSON file for all results."""
    csv: str | None = None
    """The CSV file, with a line for each method. Default: beside the JSON file."""
    store: str | None = None
    """An MLflow tracking URI to log to in addition, such as sqlite:///mlflow.db."""

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}")

    def __call__(self) -> None:
        """Measure, print the table and write the files."""
        from ...strategy.onednn import keep_few_shapes
        from .models import check_name
        from .report import log_to_mlflow, text_table, write_csv, write_json
        from .run import run

        check_name(self.model)
        keep_few_shapes()  # for all methods, also in the processes that measure peaks
        chosen = select_methods(self.methods, self.master is not None)
        spec = self._spec()
        if self.clock == "cpu" and (spec.device == "cuda" or "lightning" in chosen):
            raise ValueError("`clock=cpu` counts neither a GPU's work nor the steps of `lightning`; use clock=wall")
        json_path, csv_path = self._outputs()
        facts, rows = run(spec, chosen, repeats=self.repeats, warmup=self.warmup, memory=self.memory, say=say, clock=self.clock)
        write_json(json_path, facts, rows)
        write_csv(csv_path, facts, rows)
        if self.store is not None:
            log_to_mlflow(self.store, facts, rows)
        say("\n" + text_table(rows))
        say(
            f"\nMedian of {self.repeats} interleaved steps in {self.clock} seconds, {spec.threads} CPU threads, noise kernels: "
            f"{facts['machine']['kernels']}; a matrix product reaches {facts['gemm']['gflops']:.0f} GFLOP/s.\n"
            f"{json_path} and {csv_path} have all results."
        )

    def _spec(self) -> Spec:
        """The workload, with the device, the dtype and the threads settled."""
        import torch

        from ...adapt.matmul import fastest_dtype
        from .workload import Spec

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        dtype: str = self.dtype
        if dtype == "auto":
            dtype = "bf16" if self.master or fastest_dtype(torch.device(device)) == torch.bfloat16 else "fp32"
            say(f"dtype {dtype}, the faster one here; --dtype sets another")
        threads = self.threads or torch.get_num_threads()
        return Spec(self.model, self.batch, self.length, dtype, self.master, self.logits, device, threads, self.seed)

    def _outputs(self) -> tuple[Path, Path]:
        """The paths of the JSON and the CSV file."""
        json_path = _output("out", self.out)
        csv_path = json_path.with_suffix(".csv") if self.csv is None else _output("csv", self.csv)
        if csv_path == json_path:
            raise ValueError(f"`out` and `csv` must be two files, got {json_path} for both; let `out` end in .json")
        return json_path, csv_path


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
    """The path, in a folder that exists from here on: a folder that cannot be made is an error before the work begins."""
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"`{option}={name}` is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
