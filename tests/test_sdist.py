"""The source archive: all that a clone has, and nothing that only lies about in a working folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77' (the project's build backend)")

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "dashboard", "examples", "tests", "zolightning")
FILES = (
    *("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt"),
    *(".editorconfig", ".gitignore", ".pre-commit-config.yaml"),
)
JUNK = (".venv/lib/x.py", "build/lib/x.py", "mlflow.db", "lightning_logs/x.csv", "zolightning/__pycache__/x.cpython-311.pyc")
MADE = ("PKG-INFO", "setup.cfg", "zolightning.egg-info/")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the project in a folder of their own, with what work leaves in a folder."""
    folder = tmp_path_factory.mktemp("sdist") / "clone"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache"))
    return folder


def test_it_has_all_files_of_a_clone_and_no_others(clone: Path) -> None:
    expected = {path.relative_to(clone).as_posix() for path in clone.rglob("*") if path.is_file()}
    for name in JUNK:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("")
    script = "from setuptools import build_meta; print(build_meta.build_sdist('../out'))"
    (clone.parent / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=clone, capture_output=True, text=True, check=True)
    archive = clone.parent / "out" / done.stdout.split()[-1]
    with tarfile.open(archive) as bundle:
        found = {member.name.partition("/")[2] for member in bundle if member.isfile()}
    assert {name for name in found if not name.startswith(MADE)} == expected
    assert set(MADE[:2]) <= found
