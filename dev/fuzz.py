"""Random lives of caches (`tests/fuzz`), many of them, in many processes.

    python dev/fuzz.py --cases 3000 --backend any --jobs 16
    python dev/fuzz.py --backend native --replay '{"seed": 7, "spec": "int4", ...}'

A failing case is cut down and printed with what went wrong, and goes on; the last line has the figures. Ends with
status 0 if all cases passed, 1 if any failed, 128 + N on signal N. Needs mlx, mlx-lm and numpy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODES = {"any": "", "native": "native", "tiled": "tiled"}
LIMIT_S = 300


def main() -> int:
    args = _arguments()
    if args.jobs > 1:  # a process uses one core
        for name in ("OPENTQ_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    if args.replay:
        return _replay(args.replay, MODES[args.backend])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    return Pool(args).run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed; the others follow")
    parser.add_argument("--backend", choices=MODES, default="any", help="kernels: any, native forced, tiled forced")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--replay", help="live this case instead, as a failure printed it")
    args = parser.parse_args()
    if args.cases < 1 or args.jobs < 1:
        parser.error("--cases and --jobs must be at least 1")
    return args


class Stopped(Exception):
    """A signal came."""


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # one is enough
    raise Stopped(number)


def _replay(text: str, mode: str) -> int:
    from tests.fuzz import trial
    from tests.fuzz.case import Case

    report = trial.examine(Case.read(text), mode, small=True)
    print(report or "passed")
    return 1 if report else 0


def _work(pipe: Connection, mode: str) -> None:
    """A process: takes seeds, gives what went wrong (or None) and who served."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all, and the parent ends us
    from tests.fuzz import trial

    while (seed := pipe.recv()) is not None:
        trial.served.clear()
        report = trial.run(seed, mode)
        pipe.send((report, dict(trial.served)))


class Worker:
    """A process and the seed that it is busy with."""

    def __init__(self, mode: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, mode), daemon=True)
        self.process.start()
        theirs.close()
        self.seed: int | None = None
        self.since = 0.0

    def give(self, seed: int) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.pipe.send(seed)

    def result(self) -> tuple[str | None, dict[str, int]]:
        """What it found; a process that died is a failure of the seed it was busy with."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"the process died with exit code {self.process.exitcode}", {}

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class Pool:
    """Seeds go out to processes, results come back."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.seeds = iter(range(args.first, args.first + args.cases))
        self.passed, self.failed = 0, 0
        self.served: Counter[str] = Counter()
        self.start = time.monotonic()
        self.workers: list[Worker] = []

    def run(self) -> int:
        status = 0
        try:
            for _ in range(min(self.args.jobs, self.args.cases)):
                self._busy(Worker(MODES[self.args.backend]))
            while self.workers:
                ready = wait([w.pipe for w in self.workers], timeout=1)
                for worker in list(self.workers):
                    if worker.pipe in ready:
                        self._finished(worker)
                    elif time.monotonic() - worker.since > LIMIT_S:
                        self._failure(worker, f"no end in {LIMIT_S} s")
                        self._replace(worker)
                self._progress()
        except Stopped as stopped:
            status = 128 + stopped.args[0]
        finally:
            for worker in self.workers:
                worker.end()
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        done = self.passed + self.failed
        by = ", ".join(f"{name} {count:,}" for name, count in sorted(self.served.items())) or "none"
        print(
            f"{self.passed:,} passed, {self.failed:,} failed of {self.args.cases:,} cases from seed {self.args.first}, "
            f"--backend {self.args.backend}; attention calls judged: {by}; {time.monotonic() - self.start:.0f} s, "
            f"{self.args.jobs} processes" + ("" if done == self.args.cases else "; stopped")
        )
        return status or int(self.failed > 0)

    def _busy(self, worker: Worker) -> None:
        """Give a process its next seed, or let it go."""
        if worker not in self.workers:
            self.workers.append(worker)
        seed = next(self.seeds, None)
        if seed is None:
            self.workers.remove(worker)
            worker.end()
        else:
            worker.give(seed)

    def _finished(self, worker: Worker) -> None:
        report, served = worker.result()
        self.served.update(served)
        if report is None:
            self.passed += 1
        else:
            self._failure(worker, report)
        if worker.process.is_alive():
            self._busy(worker)
        else:
            self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.end()
        self._busy(Worker(MODES[self.args.backend]))

    def _failure(self, worker: Worker, report: str) -> None:
        self.failed += 1
        print(f"FAILED seed {worker.seed}, --backend {self.args.backend}: {report}\n", flush=True)

    def _progress(self) -> None:
        if sys.stderr.isatty():
            done, seconds = self.passed + self.failed, time.monotonic() - self.start
            text = f"\r\033[K{done:,} of {self.args.cases:,} cases, {self.failed} failed, {seconds:.0f} s"
            print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
