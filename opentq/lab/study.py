"""A study file: which trials to run, and what is expected of them before they run.

`[[sweep]]` blocks are grids: every list of a block is an axis, and every combination is one trial. `[search]` adds
trials that Optuna chooses. `[[hypotheses]]` each compare a metric between two settings; they are entered into the
record before the first trial.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .measures import MEASURES, Settings, defaults

RELATIONS = ("<", ">")


@dataclass(frozen=True)
class Hypothesis:
    """A comparison stated before the run: `metric` of trials `a` is `<` or `>` `factor` times that of `b`.

    Attributes:
        id: short name.
        says: the expectation in words.
        metric: a number that trials report.
        a, b: settings that tell the two sides; all other settings are paired.
        than: a number to compare with, in place of a side b.
        where: settings that both sides share.
        relation: `<` or `>`.
        factor: margin; 1 is none.
        replicate: setting over which a finding must repeat to become a claim.
    """

    id: str
    says: str
    metric: str
    where: Settings
    a: Settings = field(default_factory=dict)
    b: Settings = field(default_factory=dict)
    than: float | None = None
    relation: str = "<"
    factor: float = 1.0
    replicate: str = "seed"


@dataclass(frozen=True)
class Search:
    """Trials chosen by Optuna: `parameters` are lists to choose from, `objectives` metrics to minimise."""

    trials: int
    fixed: Settings
    parameters: dict[str, list[Any]]
    objectives: list[str]


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    path: Path
    storage: str
    trials: tuple[Settings, ...]
    hypotheses: tuple[Hypothesis, ...]
    search: Search | None = None


def key(settings: Settings) -> str:
    """What identifies a trial: a digest of its settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path) -> Study:
    """Read a study file. Raises UserError naming the entry that is wrong."""
    if not path.exists():
        raise UserError(f"there is no study file {path}")
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    head = data.get("study")
    if not isinstance(head, dict) or not head.get("name"):
        raise UserError(f"{path} needs a [study] table with a name")
    blocks = data.get("sweep", [])
    trials = {key(s): s for number, block in enumerate(blocks, 1) for s in _grid(block, f"{path}, sweep {number}")}
    hypotheses = tuple(_hypothesis(h, path) for h in data.get("hypotheses", []))
    search = _search(data["search"], path) if "search" in data else None
    if not trials and search is None:
        raise UserError(f"{path} has no [[sweep]] and no [search]: there is nothing to run")
    return Study(head["name"], path, head.get("storage", ""), tuple(trials.values()), hypotheses, search)


def _grid(block: Settings, where: str) -> list[Settings]:
    measure = block.get("measure")
    if measure not in MEASURES:
        raise UserError(f"{where}: measure {measure!r} is not known: use {', '.join(MEASURES)}")
    own = defaults(measure)
    if unknown := set(block) - set(own):
        raise UserError(f"{where}: {measure} takes no {', '.join(sorted(unknown))}; it takes {', '.join(own)}")
    axes = {k: v if isinstance(v, list) else [v] for k, v in block.items()}
    found = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [{**own, **s} for s in found]


def _hypothesis(table: Settings, path: Path) -> Hypothesis:
    name = table.get("id", "?")
    try:
        found = Hypothesis(**{**table, "where": table.get("where", {})})
    except TypeError as error:
        raise UserError(f"{path}, hypothesis {name!r}: {str(error).rpartition('__init__() ')[2]}") from error
    if found.relation not in RELATIONS:
        raise UserError(f"{path}, hypothesis {name!r}: relation {found.relation!r} must be one of {RELATIONS}")
    if (found.than is None) == (not found.b):
        raise UserError(f"{path}, hypothesis {name!r}: give either settings b or a number than")
    return found


def _search(table: Settings, path: Path) -> Search:
    try:
        search = Search(**table)
    except TypeError as error:
        raise UserError(f"{path}, [search]: {str(error).rpartition('__init__() ')[2]}") from error
    if search.fixed.get("measure") not in MEASURES:
        raise UserError(f"{path}, [search]: fixed.measure must be one of {', '.join(MEASURES)}")
    return search
