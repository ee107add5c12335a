"""The Trainer of ``train.py`` under Ray Train, which finds machines, starts the ranks, and starts them again after a fault.

pip install "zolightning[ray]"        # in an environment of its own
python ray_train.py --workers 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer
from train import Accident, fit

from zolightning import ZOStrategy


def work(settings: dict) -> None:
    """One rank: Ray has made the process group, and says which rank this is."""
    context = ray.train.get_context()
    local = context.get_local_world_size()
    strategy = ZOStrategy(parallel=settings["parallel"], cluster_environment=RayLightningEnvironment())
    first = not (settings["out"] / "last.ckpt").exists()
    accidents = [Accident(settings["die_at"])] if settings["die_at"] is not None and first else []
    trainer = fit(
        settings["out"], strategy, settings["steps"], accidents, devices=local, num_nodes=context.get_world_size() // local
    )
    ray.train.report({"accuracy": float(trainer.callback_metrics.get("accuracy", "nan")), "step": trainer.global_step})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="ranks, as many on each machine")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--parallel", default="data", help="data, query, sign or data+sign")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="of checkpoints and ledger, seen by all machines")
    parser.add_argument("--die-at", type=int, help="step at which the last rank is killed, once")
    args = parser.parse_args()
    here = str(Path(__file__).parent)
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}})
    trainer = TorchTrainer(
        work,
        train_loop_config={**vars(args), "out": args.out.absolute()},
        scaling_config=ScalingConfig(num_workers=args.workers),
        run_config=RunConfig(storage_path=str(args.out.absolute()), failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()
    print(f"checkpoints and ledger are in {args.out}")


if __name__ == "__main__":
    main()
