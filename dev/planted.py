"""What a wrong kernel costs on this machine: speed, one line, and never a token.

    python dev/planted.py

The fused kernels of this machine's back end are made wrong by a sign, behind their own computation. Then `opentq
generate` must print the text of the portable path and say one line, `opentq doctor` must show the verdicts, and under
`OPENTQ_KERNELS=native` the command must stop with an error. Prints what happened; exits with 1 where that is not so.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tiny-llama"


def wrong(function):
    """The same with the sign of its output changed."""

    def changed(*args):
        out = function(*args)
        return (-out[0], *out[1:]) if isinstance(out, tuple) else None if out is None else -out

    return changed


def planted(folder: Path, argv: list[str]) -> None:
    """`opentq ARGV` on a machine whose kernels are wrong, with verdicts in `folder`."""
    from opentq.attention import backends, verdicts
    from opentq.cli.main import main

    real = backends.active()
    make = real.step
    step = make and (lambda *args: None if (launch := make(*args)) is None else wrong(launch))
    broken = dataclasses.replace(real, attend=wrong(real.attend), step=step)
    backends.active = lambda: broken
    verdicts.file = lambda name: folder / f"{name}.jsonl"
    sys.argv = ["opentq", *argv]
    main()


def run(folder: Path, mode: str, *argv: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OPENTQ_KERNELS": mode, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def main() -> int:
    ask = "generate", "--model", str(MODEL), "--kv", "int4", "-m", "12", "The secret code"
    with tempfile.TemporaryDirectory() as folder:
        done, right, native = (run(Path(folder), mode, *ask) for mode in ("", "tiled", "native"))
        doctor = run(Path(folder), "", "doctor")
    said = [line for line in done.stderr.splitlines() if "set aside" in line]
    shown = [line for line in doctor.stdout.splitlines() if "set aside" in line]
    found = {
        "generation goes on": done.returncode == 0 and bool(done.stdout.strip()),
        "with the portable path's text": done.stdout == right.stdout,
        "and says one line": len(said) == 1 and said[0].startswith("opentq: the "),
        "opentq doctor shows the verdicts": len(shown) > 0,
        "native stops with an error": native.returncode == 2 and "Traceback" not in native.stderr,
        "which says what to do": "unset OPENTQ_KERNELS" in native.stderr,
    }
    for line in (*said, *shown, *native.stderr.splitlines()[-1:]):
        print(line)
    for what, holds in found.items():
        print(f"{'ok   ' if holds else 'WRONG'} {what}")
    if not all(found.values()):
        print(done.stdout, done.stderr, right.stdout, native.stderr, doctor.stdout, doctor.stderr, sep="\n")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:]:
        planted(Path(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(main())
