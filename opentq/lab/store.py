"""Who runs which trial: Optuna's storage hands trials out, and the JSONL file says what is done.

A result is written to the JSONL file, flushed to the disk, and only then told to Optuna. So whatever is killed when, a
trial is in one of three states: waiting; running in a process that lives; or running in one that is dead, and then the
file says whether it was finished. `recover` settles the third kind, so that no trial is lost or run twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import records
from ..errors import UserError
from .measures import Settings, defaults
from .study import Study, key

HOST = socket.gethostname()


def need_optuna() -> Any:
    """The optuna module. Raises UserError when it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError("opentq lab needs Optuna: pip install 'opentq[lab]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Store:
    """One study's trials (Optuna) and results (JSONL) under a folder."""

    def __init__(self, study: Study, folder: Path):
        self.study = study
        self.folder = folder
        self.results = folder / f"{study.name}.jsonl"
        records.make_folder(folder, "--folder")
        self.url = study.storage or f"sqlite:///{folder / study.name}.db"
        optuna = need_optuna()
        from sqlalchemy.exc import SQLAlchemyError

        directions = ["minimize"] * (len(study.search.objectives) if study.search else 1)
        sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, constant_liar=True)
        try:
            self.optuna = optuna.create_study(
                storage=self.url, study_name=study.name, load_if_exists=True, directions=directions, sampler=sampler
            )
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
            raise UserError(
                f"the study database {self.url} can't be used ({type(error).__name__}: {str(error).splitlines()[0]}); "
                f"if it is damaged, move it away: finished trials are in {self.results} and are not run again"
            ) from error

    def done(self) -> dict[str, dict[str, Any]]:
        """Finished trials by key."""
        if not self.results.exists():
            return {}
        return {r["key"]: r for r in records.read([self.results]) if r["kind"] == "trial"}

    def enqueue(self) -> int:
        """Queue every trial of the sweep that is neither done nor known; returns how many there are to do."""
        known = {t.user_attrs.get("key") for t in self.optuna.get_trials(deepcopy=False) if t.state.name != "FAIL"}
        done = self.done()
        waiting = 0
        for settings in self.study.trials:
            k = key(settings)
            if k not in done:
                waiting += 1
                if k not in known:
                    self.optuna.enqueue_trial({}, user_attrs={"key": k, "settings": json.dumps(settings)})
        return waiting

    def recover(self) -> int:
        """Settle trials whose process is dead; returns how many go back into the queue."""
        again, done = 0, self.done()
        for trial in self._in_state("RUNNING"):
            worker = trial.user_attrs.get("worker")
            if worker and (worker[0] != HOST or alive(worker[1], worker[2])):
                continue
            k = trial.user_attrs.get("key")
            if k in done:
                self._tell(trial.number, done[k])
            else:
                self.optuna.tell(trial.number, state=self._state("FAIL"))
                again += k is not None
        return again

    def claim(self) -> tuple[Any, Settings] | None:
        """The next trial for this process, or None when nothing is left."""
        with self._turn():
            return self._next()

    def _next(self) -> tuple[Any, Settings] | None:
        while self._in_state("WAITING"):
            trial = self.optuna.ask()
            trial.set_user_attr("worker", [HOST, os.getpid(), born(os.getpid())])
            if "settings" in trial.user_attrs:
                return trial, json.loads(trial.user_attrs["settings"])
            # A worker of another machine was quicker, and Optuna made a new trial instead.
            self.optuna.tell(trial, state=self._state("FAIL"))
        return self._search()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One worker of this machine at a time: SQLite locks no rows, and two may be handed the same trial."""
        with (self.folder / f"{self.study.name}.turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _search(self) -> tuple[Any, Settings] | None:
        search = self.study.search
        if search is None:
            return None
        taken = [
            t for t in self.optuna.get_trials(deepcopy=False) if "search" in t.user_attrs and t.state.name != "FAIL"
        ]
        if len(taken) >= search.trials:
            return None
        trial = self.optuna.ask()
        trial.set_user_attr("worker", [HOST, os.getpid(), born(os.getpid())])
        trial.set_user_attr("search", True)
        chosen = {name: trial.suggest_categorical(name, values) for name, values in search.parameters.items()}
        settings = {**defaults(search.fixed["measure"]), **search.fixed, **chosen}
        trial.set_user_attr("key", key(settings))
        return trial, settings

    def finish(self, trial: Any, settings: Settings, result: dict[str, Any], seconds: float) -> None:
        """Write the result down, then tell Optuna."""
        k = key(settings)
        record = records.record("trial", key=k, settings=settings, result=result, seconds=round(seconds, 2))
        records.append(self.results, [record])
        self._tell(trial.number, record)

    def _tell(self, number: int, record: dict[str, Any]) -> None:
        search = self.study.search
        names = search.objectives if search else []
        numbers = [record["result"].get(n) for n in names] or [record["seconds"]]
        if any(x is None for x in numbers):
            numbers = [float("inf")] * len(numbers)
        self.optuna.tell(number, numbers)

    def fail(self, trial: Any, settings: Settings, error: str) -> None:
        """Write down that a trial can't be run; it counts as done."""
        record = records.record("trial", key=key(settings), settings=settings, result={}, error=error, seconds=0.0)
        records.append(self.results, [record])
        self.optuna.tell(trial, state=self._state("FAIL"))

    def _in_state(self, name: str) -> list[Any]:
        return self.optuna.get_trials(deepcopy=False, states=(self._state(name),))

    @staticmethod
    def _state(name: str) -> Any:
        return need_optuna().trial.TrialState[name]


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """One runner per study on this machine. The lock goes with the process, however that ends."""
    records.make_folder(folder, "--folder")
    with (folder / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"study {name!r} is already running here (process {file.read().strip()})") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def born(pid: int) -> str:
    """When a process started, so that a reused process id is not taken for the old one; "" when it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.exists() and Path("/proc/self").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[19]
        except OSError:
            return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "running"


def alive(pid: int, since: str) -> bool:
    return born(pid) == since != ""


def check_database(path: Path) -> None:
    """Raise UserError when an SQLite file is damaged."""
    if not path.exists():
        return
    try:
        with sqlite3.connect(path) as db:
            db.execute("pragma schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run again: finished trials are kept") from error
