"""The README's tables, made from `results/*.jsonl`: `python dev/tables.py` rewrites them, `--check` fails if they are stale.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a function of this file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def records(name: str) -> list[dict[str, Any]]:
    file = ROOT / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__] = function
    return function


def main() -> int:
    stale = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text()
        new = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)",
            lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}",
            text,
            flags=re.S,
        )
        if new != text:
            stale.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv:
                file.write_text(new)
    if stale and "--check" in sys.argv:
        print(f"stale tables in {', '.join(stale)}: run python dev/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
