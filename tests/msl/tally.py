"""One line at the end of a test run: how many kernel executions in the emulator passed.

A test that launches kernels leaves their number in its report (`user_properties`), which also travels from the workers
of pytest-xdist to the process that prints.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import launch

MUTANT = "metal mutant"
LAUNCHES = "metal launches"


def leave(node: Any, before: int) -> None:
    """Put the launches since number `before` into the report of test `node`."""
    names = Counter(name for name, _ in launch.launches[before:])
    node.user_properties.append((LAUNCHES, dict(names)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Sums over tests that passed in all their phases; silent when none launched a kernel."""
    stats = terminalreporter.stats
    bad = {report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])}
    launched: Counter[str] = Counter()
    mutants = 0
    for report in stats.get("", []):  # where pytest files the teardown of a test
        if report.when == "teardown" and report.nodeid not in bad:
            for name, value in report.user_properties:
                launched.update(value if name == LAUNCHES else {})
                mutants += name == MUTANT
    if not launched:
        return
    kinds = ", ".join(f"{n:,} {name.removeprefix('opentq_')}" for name, n in sorted(launched.items()))
    line = f"Metal: {launched.total():,} kernel executions in the emulator passed ({kinds})"
    terminalreporter.write_line(line + (f"; {mutants} broken kernels were caught" if mutants else ""))
