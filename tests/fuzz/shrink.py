"""Make a failing case small: without each thing that is done, with fewer tokens, a plainer shape and a plainer spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .case import Case


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = 300) -> Case:
    """The smallest case found for which `fails` is still true, after at most so many tries."""
    progress = True
    while progress and tries > 0:
        progress = False
        for smaller in _smaller(case):
            tries -= 1
            if fails(smaller):
                case, progress = smaller, True
                break
            if tries <= 0:
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are a little less, what saves most first."""
    ops = case.ops
    for size in (len(ops) // 2, 1):
        for start in range(0, len(ops), size) if size else ():
            yield replace(case, ops=ops[:start] + ops[start + size :])
    plain = {"gqa": 1, "kv_heads": 1, "dtype": "float32", "scale": 1.0, "window": 0, "given": False, "dims": (64, 64)}
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    head, *options = case.spec.split(":")
    for i in range(len(options)):
        yield replace(case, spec=":".join([head, *options[:i], *options[i + 1 :]]))
    for i, op in enumerate(ops):
        for j, part in enumerate(op):
            for less in _less(part):
                yield replace(case, ops=(*ops[:i], [*op[:j], less, *op[j + 1 :]], *ops[i + 1 :]))


def _less(part) -> Iterator:
    if isinstance(part, int):
        yield from sorted({0, 1, 2, 64, part // 2, part - 1} & set(range(part)))
    elif isinstance(part, list):
        for i, value in enumerate(part):
            if len(part) > 1:
                yield part[:i] + part[i + 1 :]
            for less in _less(value):
                yield [*part[:i], less, *part[i + 1 :]]
    elif isinstance(part, dict):
        for name in part.keys() - {"times", "seed"}:
            yield {key: value for key, value in part.items() if key != name}
