"""Write opentq/evaluate/entries.tsv: names and one-sentence descriptions out of Python's and Debian's documentation.

    python dev/entries.py

Python's are the first sentences of docstrings of the standard library, Debian's the summaries of installed packages; on
another machine the file comes out differently, so that it is kept in the repository.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import zlib
from pathlib import Path

OUT = Path(__file__).parents[1] / "opentq" / "evaluate" / "entries.tsv"
MODULES = """
argparse ast base64 binascii bisect calendar collections configparser contextlib copy csv datetime decimal difflib dis
email.utils filecmp fileinput fnmatch fractions functools gettext glob gzip hashlib heapq hmac html inspect ipaddress
itertools json keyword linecache locale logging math mimetypes operator os os.path pathlib pickle pkgutil platform
pprint queue random re secrets shelve shlex shutil signal socket sqlite3 statistics string struct subprocess tarfile
tempfile threading time timeit tokenize traceback types unicodedata urllib.parse uuid warnings weakref zipfile zlib
""".split()  # noqa: SIM905
EACH = 150
"""Entries of each source."""


def python() -> dict[str, str]:
    found = {}
    for module in MODULES:
        for name, thing in vars(importlib.import_module(module)).items():
            text = inspect.getdoc(thing) if callable(thing) and not name.startswith("_") else None
            home = getattr(thing, "__module__", None) or module
            if text and home.lstrip("_") in (module, "posixpath", "genericpath", "builtins"):
                found.setdefault(f"{module}.{name}", sentence(text.partition("\n\n")[0]))
    return found


def debian() -> dict[str, str]:
    """Extended descriptions say more than summaries: their first sentence."""
    form = "${Package}\\t${Description}\\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    found = {}
    for entry in re.split(r"\n(?! )", listed):  # lines of a description that follow its summary begin with a space
        name, _, text = entry.partition("\t")
        body = text.partition("\n")[2].replace("\n ", "\n")
        if not re.search(r"^lib|-dev$|-common$|-data$|-\d", name):
            found[f"the package {name}"] = sentence(body.partition("\n.\n")[0])
    return found


def sentence(text: str) -> str:
    words = " ".join(text.split())
    return re.split(r"(?<=[a-z)])\.(?: |$)", words, maxsplit=1)[0].strip()


def fit(found: dict[str, str]) -> list[tuple[str, str]]:
    """Entries of a useful length whose description is their own and does not name them, in an order by checksum."""
    descriptions = list(found.values())
    good = [
        (name, text)
        for name, text in found.items()
        if 40 <= len(text) <= 160
        and descriptions.count(text) == 1
        and text.isascii()
        and "\t" not in text
        and re.split(r"[. ]", name)[-1].lower() not in text.lower()
        and "->" not in text
    ]
    return sorted(good, key=lambda entry: zlib.crc32(entry[0].encode()))[:EACH]


if __name__ == "__main__":
    rows = [("python", *e) for e in fit(python())] + [("debian", *e) for e in fit(debian())]
    OUT.write_text("".join("\t".join(row) + "\n" for row in rows))
    print(f"{len(rows)} entries in {OUT}")
