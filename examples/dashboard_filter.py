"""How long the list of runs takes to follow a key in its filter: a real server, and headless Chromium.

python examples/dashboard_store.py big.db --runs 1000 --points 60     # once; a few minutes
python examples/dashboard_filter.py big.db

Each key is pressed while the page Curves is open, 0.15 s after the one before; the time runs from the key's event in the page
to the first frame with the list as the whole text means it. The goal is 100 ms for 95 % of the keys, at 1,000 runs, on two CPU
cores that do nothing else: the load average is printed beside the figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import find_chromium, open_browser, serve  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TEXTS = ("mezo lr<1e-2 seed>100 -killed", "/default-seed1/ loss>0.1", "adamw or recipe=spsa val/accuracy>80%")
_WATCH = """() => {
  const field = document.querySelector(".zo-filter"), list = document.querySelector(".zo-runs");
  window.pressed = new Map();
  window.taken = [];
  field.addEventListener("input", () => pressed.set(field.value, performance.now()));
  new MutationObserver(() => {
    const began = pressed.get(list.dataset.follows);
    requestAnimationFrame(() => taken.push(performance.now() - began));
  }).observe(list, { attributeFilter: ["data-follows"] });
}"""


def measure(browser: Browser, store: Path, log: Path, delay: float) -> tuple[NDArray[np.float64], int]:
    """Milliseconds of each key, and how many runs there are."""
    with serve(f"sqlite:///{store.resolve()}", log) as server:
        page = browser.new_page()
        page.goto(f"{server.url}/curves?key=train/loss")
        page.wait_for_function("document.querySelectorAll('.zo-run').length > 0", timeout=120_000)
        page.wait_for_timeout(5000)
        page.evaluate(_WATCH)
        for text in TEXTS:
            page.locator(".zo-filter").fill("")
            page.wait_for_timeout(3000)
            page.locator(".zo-filter").press_sequentially(text, delay=1000 * delay)
            page.wait_for_timeout(3000)
        return np.array(page.evaluate("taken")), page.locator(".zo-run").count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="an SQLite store; it is only read")
    parser.add_argument("--delay", type=float, default=0.15, help="seconds between two keys (default 0.15)")
    args = parser.parse_args()
    if find_chromium() is None:
        parser.error("no Chromium found: apt-get install chromium")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        taken, runs = measure(browser, args.store, Path(folder) / "server.log", args.delay)
    middle, most, worst = np.percentile(taken, [50, 95, 100])
    keys = sum(map(len, TEXTS)) + len(TEXTS)  # a key that is overtaken by the next has no list of its own
    print(f"{runs:,} runs, {len(taken)} of {keys} keys: median {middle:.0f} ms, p95 {most:.0f} ms, worst {worst:.0f} ms")
    print(f"load average before {load:.1f}, after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
