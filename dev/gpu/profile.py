"""compute-sanitizer and ncu over `gpu_check.py --driver`."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess

OURS = ["--kernel-name", "kns=opentq"]
WATCHES = {
    "memcheck": (["memcheck", *OURS], "small"),
    "synccheck": (["synccheck", *OURS], "small"),
    # Restricted to our kernels racecheck dies at matrix products of MLX; watching all, at its attention for prefill.
    "racecheck": (["racecheck"], "decode"),
    "racecheck of prefill": (["racecheck", *OURS], "prefill"),
}
"""Sanitizer and part of the driver, by name."""
METRICS = {
    "dram__bytes_read.sum.per_second": "dram_read_bytes_per_s",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "time_ns",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_active_percent",
    "launch__registers_per_thread": "registers",
}


def start(command: list[str]) -> dict[str, subprocess.Popen]:
    """Every sanitizer over the driver's launches of our kernels, running. Empty where the tool is not installed."""
    if shutil.which("compute-sanitizer") is None:
        return {}
    jobs = {}
    for name, (tool, part) in WATCHES.items():
        watch = ["compute-sanitizer", "--error-exitcode", "9", "--tool", *tool]
        jobs[name] = subprocess.Popen(
            [*watch, *command, "--driver", part], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    return jobs


def collect(log, jobs: dict[str, subprocess.Popen]) -> None:
    """Every tool must have exited clean."""
    log.test("compute-sanitizer is installed", bool(jobs), "not found on PATH")
    for tool, job in jobs.items():
        output = job.communicate()[0]
        summary = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
        print(f"  {tool}: {'; '.join(summary)}", flush=True)
        log.test(f"compute-sanitizer {tool}", job.returncode == 0, output[-1500:])
        log.row("sanitizer", tool=tool, clean=job.returncode == 0, summary="; ".join(summary))


def ncu(log, command: list[str]) -> None:
    """Achieved bandwidth of the decode kernel, as the profiler counts it."""
    if shutil.which("ncu") is None:
        log.test("ncu is installed", False, "not found on PATH")
        return
    watch = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", "regex:opentq_decode", "--launch-skip", "1"]
    watch += ["--launch-count", "1", "--metrics", ",".join(METRICS)]
    job = subprocess.run([*watch, *command, "--driver", "profile"], capture_output=True, text=True)
    lines = [line for line in job.stdout.splitlines() if line.startswith('"')]
    values = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name = METRICS.get(row["Metric Name"])
        if name:
            values[name] = float(row["Metric Value"].replace(",", ""))
            values[name + "_unit"] = row["Metric Unit"]
    log.test("ncu read the decode kernel", bool(values), job.stdout[-800:] + job.stderr[-800:])
    if values:
        log.row("ncu", kernel="decode", n=131072, **values)
        print("  " + ", ".join(f"{k} {v}" for k, v in values.items() if not k.endswith("_unit")), flush=True)
