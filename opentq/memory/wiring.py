"""`--wire auto|off|BYTES`: the wired limit of this process on a Mac, set with care and restored; elsewhere nothing.

What is wired, macOS cannot take from the GPU: without it the weights of a large model may be paged out between two
turns. But wired memory is lost to everybody else, and raising the limit has panicked Macs (ml-explore/mlx#3186). So
`auto` sets it only where the plan needs it, to what the plan needs, never above the working set that Metal recommends;
`off` never touches it. mlx-lm, left alone, wires all that is recommended whenever it generates: inside `wired` it does
not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..hosts.mlx_lm.wired import hands_off
from . import device, plan
from .device import GIB, Device
from .loaded import layer_plans, weight_bytes

NEEDED = 0.5
"""The share of the recommended working set from which on a plan needs wired memory. Judged, not measured: below it
macOS has as much again to give to others before it would page anything out."""

Wire = str | int
"""`auto`, `off`, or bytes."""


def parse_wire(text: str) -> Wire:
    """`auto`, `off`, or a size such as 24GB. Raises UserError."""
    word = text.strip().lower()
    if word in ("auto", "off"):
        return word
    try:
        return device.parse_memory(text)
    except UserError:
        raise UserError(f"--wire {text!r} is not known: use auto, off, or a size such as 24GB") from None


def needs(models: Sequence[Any], tokens: int, step: int = plan.PREFILL_STEP) -> int:
    """Bytes of loaded models and of their caches at `tokens` of context."""
    width = device.here().float_bytes
    return sum(weight_bytes(m) + plan.price(layer_plans(m), tokens, width, step) for m in models)


def limit(needed: int, wire: Wire, machine: Device) -> tuple[int | None, str]:
    """The limit to set, or None to leave it alone, and one line that says so. Raises UserError."""
    if machine.kind != "mac":
        if isinstance(wire, int):
            raise UserError(f"--wire {wire / GIB:.1f} GiB: only Macs have a wired limit, and this is {machine.name}")
        return None, ""
    most = f"{machine.usable / GIB:.1f} GiB that macOS recommends"
    if isinstance(wire, int):
        if wire > machine.usable:
            raise UserError(
                f"--wire {wire / GIB:.1f} GiB is above the {most}; raise that first: {machine.sysctl(wire)}"
            )
        return wire, f"wired limit {wire / GIB:.1f} GiB, as asked, until this ends"
    if wire == "off":
        return None, "wired limit left alone (--wire off)"
    wanted = needed + device.MARGIN
    if wanted < NEEDED * machine.usable:
        return None, f"wired limit left alone: {wanted / GIB:.1f} GiB of the {most} need none"
    chosen = min(wanted, machine.usable)
    return chosen, f"wired limit {chosen / GIB:.1f} GiB of the {most}, until this ends (--wire off leaves it alone)"


@contextlib.contextmanager
def wired(needed: Callable[[], int], wire: Wire = "auto", say: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Wire what `needed()` says, by the rule of `wire`, and restore the old limit on the way out.

    Args:
        needed: bytes of the plan; asked only on a Mac under `auto`.
        wire: from `parse_wire`.
        say: takes the line that says what was done; default: standard error.
    """
    machine = device.here()
    chosen, line = limit(needed() if machine.kind == "mac" and wire == "auto" else 0, wire, machine)
    if line:
        (say or _to_stderr)(f"opentq: {line}")
    if machine.kind != "mac":
        yield
        return
    with hands_off():
        before = None if chosen is None else mx.set_wired_limit(chosen)
        try:
            yield
        finally:
            if before is not None:
                mx.synchronize()  # the limit must not change under work that still runs
                mx.set_wired_limit(before)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def explain(machine: Device, raised: int) -> str:
    """What `opentq doctor` says of a Mac's wired limit; `raised` is `iogpu.wired_limit_mb`, 0 where nobody set it."""
    told = f"set to {raised} MB" if raised else "macOS's default"
    return (
        f"{machine.usable / GIB:.1f} of {machine.memory / GIB:.0f} GiB for the GPU ({told}); opentq wires what a plan "
        f"needs from {NEEDED * machine.usable / GIB:.1f} GiB on, only while it runs; --wire off never does"
    )
