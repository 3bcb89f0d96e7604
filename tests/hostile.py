"""What becomes of a study with garbage in its database: every public reader runs, and is watched.

Run as a script, this file is a worker: ``hostile.py FIRST LAST`` does the cases with these seeds and prints a
line of JSON for each. A worker is its own process because its audit hook cannot be taken off again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from garbage import MARK, spoil
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage
from specimen import (
    CUT_OFF_AT,
    CutOff,
    Specimen,
    command_in_haste,
    long_run,
    opened,
    resume,
    sampler,
    warnings,
)
from torch import Tensor
from watching import Hang, Watch

import optuna_hypergrad as ohg
from optuna_hypergrad import HypergradError, cli, load_tensors
from optuna_hypergrad.stores import TensorStore
from optuna_hypergrad.studies import leases, processes

SECONDS = 60.0
"""For all that is done in one case."""

MEGABYTES = 300
"""Of memory, for the same, beyond what was in use."""

ADDRESS_SPACE = 2 << 30
"""Bytes of address space, beyond what was in use; asking for more fails."""


@ohg.differentiable
def mixed(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    n = trial.suggest_int("n", 1, 3)
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    t = trial.suggest_tensor("t", (2, 3), 0.0, 1.0)
    tree = trial.suggest_tensor_like("tree", {"w": torch.zeros(2), "b": torch.zeros(1)}, -1.0, 1.0)
    loss = (x.log() - n) ** 2 + (t - 0.3).pow(2).sum() + tree["w"].sum() ** 2 + tree["b"].sum() ** 2
    return loss + float(kind == "a")


def plain(trial: optuna.Trial) -> float:
    trial.suggest_categorical("kind", ["a", "b"])
    return trial.suggest_int("n", 1, 3) + trial.suggest_float("x", 1e-3, 1e3, log=True)


def our_sampler() -> ohg.HypergradientSampler:
    return sampler(slice_steps=1, start="best")


class HostileSpecimen(Specimen):
    """Study ``mixed``: trajectories of several settings, a trial in the queue, one whose process has died
    with a checkpoint; and study ``run``."""

    chunk_bytes = 1000

    def fill(self, storage: RDBStorage) -> None:
        study = optuna.create_study(storage=storage, study_name="mixed", sampler=our_sampler())
        study.optimize(mixed, n_trials=4)
        dead = study.ask()
        dead.suggest_categorical("kind", ["a", "b"])
        run = optuna.create_study(storage=storage, study_name="run", sampler=RandomSampler(0))
        for trial in (dead, run.ask()):
            with contextlib.suppress(CutOff):
                long_run(trial, CUT_OFF_AT)
        host, _, birth = processes.this_process().split("|")
        process = f"{host}|99999999|1@{birth.partition('@')[2]}"
        storage.set_trial_system_attr(
            dead._trial_id, leases.OWNER, {"process": process, "until": 0}
        )
        study.enqueue_trial({"x": 2.0}, user_attrs={"note": "queued"})


def _loaded(storage: RDBStorage, name: str = "mixed") -> optuna.Study:
    return optuna.load_study(storage=storage, study_name=name, sampler=our_sampler())


def _load(storage: RDBStorage, directory: Path) -> None:
    study = _loaded(storage)
    for trial in study.get_trials(deepcopy=False):
        with contextlib.suppress(HypergradError):  # of others there may be something left
            load_tensors(trial, study=study)


def _best(storage: RDBStorage, directory: Path) -> None:
    load_tensors(_loaded(storage))


def _pointers(storage: RDBStorage, directory: Path) -> None:
    study = _loaded(storage)
    store = TensorStore.of_study(study)
    for trial in study.get_trials(deepcopy=False):
        with contextlib.suppress(HypergradError):
            for pointer in store.pointers(trial):
                store.load(pointer)


def _verify(storage: RDBStorage, directory: Path) -> None:
    str(TensorStore.of_study(_loaded(storage)).verify())


def _sweep(storage: RDBStorage, directory: Path) -> None:
    store = TensorStore.of_study(_loaded(storage))
    str(store.sweep(dry_run=True, min_age=0.0))
    str(store.sweep(min_age=0.0))


def _retain(storage: RDBStorage, directory: Path) -> None:
    study = _loaded(storage)
    TensorStore.of_study(study).apply_retention(study._study_id)


def _optimize(storage: RDBStorage, directory: Path) -> None:
    _loaded(storage).optimize(mixed, n_trials=1)


def _resume(storage: RDBStorage, directory: Path) -> None:
    resume(storage)


def _command(*arguments: str) -> Callable[[RDBStorage, Path], None]:
    def run(storage: RDBStorage, directory: Path) -> None:
        output, error = io.StringIO(), io.StringIO()
        name, *rest = [a.format(directory=directory) for a in arguments]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = cli.main([name, f"sqlite:///{directory}/copy.db", *rest])
        shown = (output.getvalue() + error.getvalue()).replace("\n", "")
        odd = sorted({c for c in shown if not c.isprintable()})
        assert not odd, f"the terminal gets {odd}"
        assert status in (0, cli.DAMAGE, cli.FAILURE), status
        raw = re.match(r"optuna-hypergrad: (\w*(?:Error|Exception|Warning)): ", error.getvalue())
        if status == cli.FAILURE and raw is not None:
            raise CommandError(raw[1], error.getvalue()[:500])

    return run


class CommandError(Exception):
    """The command has met an error, by name, that is none of ours."""


Actions = dict[str, Callable[[RDBStorage, Path], None]]
READERS: tuple[Actions, ...] = (
    {
        "load_tensors": _load,
        "command show": _command("show"),
        "study.optimize": _optimize,
        "command show --study": _command("show", "--study", "mixed", "--all"),
    },
    {
        "pointers": _pointers,
        "minimize_bilevel": _resume,
        "command verify": _command("verify"),
    },
    {
        "load_tensors of the best": _best,
        "verify": _verify,
        "command show --json": _command("show", "--json"),
        "command export": _command(
            "export", "-o", "{directory}/out", "--force", "--study", "mixed"
        ),
        "retention": _retain,
        "sweep": _sweep,
    },
)
"""Those of one round share a case: all of them for each would take three times as long."""


ALL = {name: action for readers in READERS for name, action in readers.items()}


def _plain_reading(storage: RDBStorage, directory: Path) -> None:
    for study in optuna.get_all_study_summaries(storage):
        str(study)


def _plain_trials(storage: RDBStorage, directory: Path) -> None:
    for name in ("mixed", "run"):
        study = optuna.load_study(storage=storage, study_name=name)
        str(study.trials)
        str([trial.constraints for trial in study.trials])


def _plain_best(storage: RDBStorage, directory: Path) -> None:
    str(optuna.load_study(storage=storage, study_name="mixed").best_trial)


def _plain_optimize(storage: RDBStorage, directory: Path) -> None:
    study = optuna.load_study(storage=storage, study_name="mixed", sampler=TPESampler(seed=0))
    study.optimize(plain, n_trials=2)


def _plain_suggest(storage: RDBStorage, directory: Path) -> None:
    study = optuna.load_study(storage=storage, study_name="mixed", sampler=RandomSampler(0))
    study.optimize(plain, n_trials=2)


def _plain_resume(storage: RDBStorage, directory: Path) -> None:
    study = optuna.load_study(storage=storage, study_name="run", sampler=RandomSampler(0))
    trial = optuna.Trial(study, study.get_trials(deepcopy=False)[0]._trial_id)
    trial.report(0.0, 100)
    trial.should_prune()


PLAIN = {
    function.__name__: function
    for function in (
        _plain_reading,
        _plain_trials,
        _plain_best,
        _plain_optimize,
        _plain_suggest,
        _plain_resume,
    )
}
"""What somebody does who has never heard of this library."""


class Examiner:
    """Spoils copies of a database and watches who reads them.

    Args:
        directory: For the copies. Nothing may be written elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.specimen = HostileSpecimen(directory)
        self.watch = Watch(directory, SECONDS, MEGABYTES)
        for readers in (*READERS, *READERS):  # the first time, what is imported late is imported
            for name, error in self._run(readers, lambda path: None).items():
                assert error is None, f"{name} fails on a sound database: {error!r}"

    def __call__(self, seed: int) -> dict[str, Any]:
        """What one garbage has led to: an outcome for each reader, and failures in words."""
        spoiled: list[str] = []
        failures: list[str] = []

        def spoil_it(path: Path) -> None:
            spoiled[:] = spoil(path, seed)

        try:
            errors = self._run(ALL if seed < 0 else READERS[seed % len(READERS)], spoil_it)
        except Hang as hang:
            errors = {}
            failures.append(str(hang))
        failures += self.watch.violations
        unknown = {
            n: e for n, e in errors.items() if not isinstance(e, (HypergradError, type(None)))
        }
        if unknown:
            plain = {_kind(e) for e in self._run(PLAIN, spoil_it).values()}
            failures += [_told(n, e) for n, e in unknown.items() if _kind(e) not in plain]
        if os.environ.pop(MARK, None) is not None:
            failures.append("code was run")
        outcomes = {name: _kind(error) for name, error in errors.items()}
        return {"seed": seed, "spoiled": spoiled, "outcomes": outcomes, "failures": failures}

    def _run(self, actions: Actions, change: Callable[[Path], None]) -> dict[str, Exception | None]:
        errors: dict[str, Exception | None] = {}
        with self._copy() as path, opened(path) as storage:
            change(path)
            with warnings(), self.watch:
                for name, action in actions.items():
                    errors[name] = _error(action, storage, self.directory)
                    storage.remove_session()
        return errors

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        path = self.directory / "copy.db"
        path.write_bytes(self.specimen.path.read_bytes())
        yield path
        for left in self.directory.glob("copy.db*"):
            left.unlink()


def _error(
    action: Callable[[RDBStorage, Path], None], storage: RDBStorage, directory: Path
) -> Exception | None:
    try:
        action(storage, directory)
    except Exception as error:
        return error
    return None


def _told(name: str, error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name}: {_kind(error)}: {str(error)[:300]} ({place.filename}:{place.lineno})"


def _kind(error: BaseException | None) -> str:
    if error is None:
        return "success"
    return str(error.args[0]) if isinstance(error, CommandError) else type(error).__name__


def examine(first: int, last: int) -> Iterator[dict[str, Any]]:
    """The cases with these seeds, in a process of their own; that it ends early is a failure too."""
    command = [sys.executable, __file__, str(first), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        done = first
        for line in worker.stdout:
            yield json.loads(line)
            done += 1
    if done < last:
        failure = f"the worker has ended with status {worker.returncode}"
        yield {"seed": done, "spoiled": [], "outcomes": {}, "failures": [failure]}


def main() -> None:
    first, last = map(int, sys.argv[1:])
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, command_in_haste():
        examiner = Examiner(Path(name))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for seed in range(first, last):
            print(json.dumps(examiner(seed)), flush=True)


if __name__ == "__main__":
    main()
