"""`opentq lab run`: worker processes take trials from the store until none is left."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

from .. import records
from ..errors import UserError
from . import measures
from .store import Store, check_database, locked
from .study import Study, load


def run(path: Path, workers: int, folder: Path, say: Callable[[str], None] = print) -> int:
    """Run what is left of a study; returns how many trials are finished in all.

    Raises UserError when the study is already running here, its file or database is damaged, or a worker died.
    """
    study = load(path)
    with locked(folder, study.name):
        check_database(folder / f"{study.name}.db")
        store = Store(study, folder)
        state_hypotheses(study, store)
        again = store.recover()
        todo = store.enqueue()
        say(
            f"{study.name}: {len(store.done())} trials done, {todo} to do" + (f", {again} interrupted" if again else "")
        )
        context = multiprocessing.get_context("spawn")
        parent = os.getpid()
        crew = [context.Process(target=work, args=(path, folder, parent)) for _ in range(workers)]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        bad = [p.exitcode for p in crew if p.exitcode]
        if bad:
            raise UserError(f"{len(bad)} workers ended with {bad}; run the same command again to go on")
        done = store.done()
        say(f"{study.name}: {len(done)} trials done, {sum('error' in r for r in done.values())} of them refused")
    return len(done)


def state_hypotheses(study: Study, store: Store) -> None:
    """Enter hypotheses into the record before their trials; each is written once."""
    known = set()
    if store.results.exists():
        known = {r["id"] for r in records.read([store.results]) if r["kind"] == "hypothesis"}
    fresh = [h for h in study.hypotheses if h.id not in known]
    records.append(store.results, [records.record("hypothesis", **vars(h)) for h in fresh])


def work(path: Path, folder: Path, parent: int) -> None:
    """One worker: claim, measure, write down, until nothing is left or the runner is gone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENTQ_THREADS", "1")
    store = Store(load(path), folder)
    while os.getppid() == parent and (claimed := store.claim()):
        trial, settings = claimed
        start = time.perf_counter()
        try:
            result = measures.run(settings)
        except UserError as error:
            # The combination is impossible (a codec that can't serve a head dim): that is a result.
            store.fail(trial, settings, str(error))
            continue
        store.finish(trial, settings, result, time.perf_counter() - start)
