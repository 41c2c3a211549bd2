"""Everything that only a GPU can prove about the CUDA kernels, in one go: right, clean, and how fast.

    python dev/gpu_check.py [--quick] [--out results/cuda.jsonl] [--only check,model,time,decode,ncu,full,rivals]

Checks random cases against fp32 attention over the same decoded values while compute-sanitizer (memcheck, racecheck,
synccheck) watches a small driver, generates with a model through the compressed cache, times decode, prefill and
packing beside their rivals in this same process (FlashInfer's and FlashAttention 3 where they are installed), reads the
decode kernel's bandwidth with ncu, and fills the card until allocations fail. `decode`, which runs only when named, is
the part of `time` that compares decode with the rivals. One JSON row per figure, each with the device, versions,
command, date and the hash of the kernel sources; one table of the figures against the goals. Ends with `N passed, 0
failed` (tests; a goal is not a test), and with status 1 if anything failed. CI holds the newest row's hash against the
sources, so a kernel can't change without its proof being renewed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
# The reference must be fp32 arithmetic, not tf32. MLX reads this when it first multiplies.
os.environ["MLX_ENABLE_TF32"] = "0"

import mlx.core as mx  # noqa: E402
import torch  # noqa: E402
from gpu import conform, driver, generate, goals, pages, profile, rivals, timing  # noqa: E402

from opentq.kernels.cuda import launch as cuda  # noqa: E402

PARTS = ("check", "model", "time", "ncu", "full", "rivals")
MORE = ("decode",)


class Log:
    """Passes, failures, and rows on their way to a JSONL file."""

    def __init__(self, out: Path, command: str):
        self.passed = self.failed = 0
        self.out = out
        self.common = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "kernels": cuda.source_hash(),
            **machine(),
        }
        self.rows: list[dict] = []
        out.parent.mkdir(parents=True, exist_ok=True)

    def test(self, what: str, ok: bool, detail: str = "") -> None:
        self.passed += ok
        self.failed += not ok
        if not ok:
            print(f"FAILED {what}: {detail}", flush=True)

    def row(self, what: str, **values) -> None:
        self.rows.append({"what": what, **values, **self.common})
        with self.out.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


def machine() -> dict:
    """Device and versions, as they go into every row."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver_version = (
        subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
    )
    versions = {"mlx": mx.__version__, "python": platform.python_version(), "driver": driver_version}
    return {"device": name, "versions": {**versions, "torch": torch.__version__}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few hundred random cases instead of 10,000")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cuda.jsonl")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS + MORE)}")
    parser.add_argument("--cases", type=int, help="number of random cases")
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not cuda.available():
        print("no NVIDIA GPU of compute capability 9.0 or later answers MLX here", file=sys.stderr)
        return 2
    if options.driver:
        driver.run(options.driver)
        return 0
    parts = options.only.split(",")
    words = ["python dev/gpu_check.py"] + ["--quick"] * options.quick + [f"--only {options.only}"]
    log = Log(options.out, " ".join(words + ([f"--cases {options.cases}"] if options.cases else [])))
    print(f"{log.common['device']}, {log.common['versions']}, kernels {log.common['kernels']}", flush=True)
    command = [sys.executable, __file__]

    def check() -> None:
        """Sanitizers and conformance at the same time: neither is a timing."""
        watched = profile.start(command)
        conform.collect(log, conform.start(command, options.cases or (300 if options.quick else 10_000), options.quick))
        pages.run(log)
        profile.collect(log, watched)

    def full() -> None:
        """A card without room, in a process of its own."""
        done = subprocess.run([*command, "--driver", "exhaust"], capture_output=True, text=True, timeout=120)
        print(done.stdout, flush=True)
        log.test("allocations fail as errors", done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:])
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
        log.row("full card", clean=done.returncode == 0, errors=lines)

    @functools.cache
    def ways() -> list[rivals.Way]:
        return rivals.usable(command)

    steps = {
        "check": check,
        "model": lambda: generate.run(log),
        "time": lambda: timing.run(log, torch, options.quick, ways()),
        "decode": lambda: timing.run_decode(log, torch, ways()),
        "ncu": lambda: profile.ncu(log, command),
        "full": full,
        "rivals": lambda: timing.run_slow_rivals(log),
    }
    for part in parts:
        start = time.perf_counter()
        steps[part]()
        print(f"[{part}: {time.perf_counter() - start:.0f} s]", flush=True)
    if "time" in parts:
        print(goals.table(log.rows))
    log.row("summary", parts=parts, passed=log.passed, failed=log.failed, quick=options.quick)
    print(f"{log.passed} passed, {log.failed} failed")
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())
