"""The examples that train on scores, end to end on the demo's model: a few steps, on real texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("example", "options", "scores"),
    [
        ("accuracy_only.py", ["--objective", "accuracy"], ["accuracy", "loss"]),
        ("accuracy_only.py", ["--objective", "soft_accuracy", "--train", "weights", "--batch", "4"], ["accuracy", "loss"]),
        ("generation_f1.py", ["--batch", "2", "--validation", "4"], ["f1", "exact_match"]),
        ("generation_f1.py", ["--train", "bias", "--batch", "2", "--validation", "4"], ["f1", "exact_match"]),
    ],
)
@pytest.mark.integration
def test_a_few_steps(example: str, options: list[str], scores: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / example), "--steps", "2", "--test", "8", "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    for part in ("zero_shot", "tested"):
        assert all(f"test/{name}" in result[part] for name in scores), result[part]
    assert result["history"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.integration
def test_json_is_trained_on_and_scored(tmp_path: Path) -> None:
    options = [
        "--methods",
        "few-shot",
        "zo",
        "--seconds",
        "5",
        "--test",
        "8",
        "--batch",
        "4",
        "--out",
        str(tmp_path / "json.json"),
    ]
    command = [sys.executable, str(EXAMPLES / "json_rewards.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    untrained, trained = json.loads((tmp_path / "json.json").read_text())
    assert 0 <= untrained["exact"] <= untrained["score"] <= 1
    assert trained["steps"] >= 1
    assert trained["tokens"] > untrained["tokens"] == 0
