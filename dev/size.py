"""Lines per folder of the files named on standard input: `make size`."""

import sys
from collections import Counter
from pathlib import Path

lines: Counter[str] = Counter()
files: Counter[str] = Counter()
longest: dict[str, tuple[int, str]] = {}
for name in sys.stdin.read().split():
    count = len(Path(name).read_text().splitlines())
    folder = str(Path(name).parent)
    lines[folder] += count
    files[folder] += 1
    longest[folder] = max(longest.get(folder, (0, "")), (count, Path(name).name))
for folder in sorted(lines):
    count, name = longest[folder]
    print(f"{folder:<24} {files[folder]:>3} files {lines[folder]:>6} lines   longest {name} ({count})")
print(f"{'total':<24} {sum(files.values()):>3} files {sum(lines.values()):>6} lines")
