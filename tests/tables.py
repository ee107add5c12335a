"""The tables of measured figures in the pages, from the raw results beside them. ``make tables`` writes them again.

A page says before a table: ``<!-- results.json: zero-shot reft lora -->``, a file beside the page and its methods in order
(none: all). The table's own header says which columns it shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from zolightning.commands.demo.report import rows
from zolightning.commands.demo.run import Result
from zolightning.commands.tables import markdown

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- (?P<file>\S+\.json):(?P<names>[^>]*) -->\n(?P<header>\|.*)\n(?:\|.*\n)+", re.MULTILINE)


def pages() -> Iterator[Path]:
    """The pages that have such a table."""
    for page in sorted(ROOT.rglob("*.md")):
        ours = not any(part.startswith(".") or part == "build" for part in page.relative_to(ROOT).parts)
        if ours and MARK.search(page.read_text()):
            yield page


def rebuilt(page: Path) -> str:
    """The page's text with its tables as the raw results have them."""

    def table(found: re.Match[str]) -> str:
        results = [Result(**r) for r in json.loads((page.parent / found["file"]).read_text())["results"]]
        names = found["names"].split() or list(dict.fromkeys(r.method for r in results))
        header = [cell.strip() for cell in found["header"].strip("| ").split("|")]
        chosen = [r for name in names for r in results if r.method == name]
        lines = markdown(header, rows(chosen, header))
        return f"<!-- {found['file']}:{found['names']} -->\n{lines}\n"

    return MARK.sub(table, page.read_text())


if __name__ == "__main__":
    for page in pages():
        new = rebuilt(page)
        if new != page.read_text():
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: tables written again")
