"""Studies whose connections break: what one worker does, what must be the same afterwards, who disturbs it.

Run as a script, this file is a worker: ``connection_losses.py URL SEED DIRECTORY``. It works until there is a
file ``DIRECTORY/stop``, and tells in ``DIRECTORY/SEED.jsonl`` which trials it has finished. With a further
argument ``plain`` it is Optuna's own, without any of this library.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from cutting_proxy import CuttingProxy
from servers import Server
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores._pointer import ATTRIBUTE_PREFIX
from optuna_hypergrad.studies.events import CLAIM, GRADIENT, OUTCOME

NAME = "study"
WRITES = tuple(
    b"INSERT INTO " + table
    for table in (
        b"trials",
        b"trial_params",
        b"trial_system_attributes",
        b"trial_user_attributes",
        b"trial_intermediate_values",
        b"trial_values",
        b"hypergrad_blobs",
    )
)
"""What a trial writes, each in a transaction of its own."""


def loss(trial: Any) -> Tensor:
    n = trial.suggest_int("n", 0, 2)
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    t = trial.suggest_tensor("t", (40, 3), -1.0, 1.0)
    return (x.log() - n) ** 2 + (t - 0.3).pow(4).sum() + n


def objective(during: Callable[[int], None] = lambda number: None) -> Callable[..., float]:
    """:func:`loss`, with something that happens in the middle of each trial, by its number."""

    @ohg.differentiable
    def differentiated(trial: Any) -> Tensor:
        value = loss(trial)
        during(trial.number)
        trial.set_user_attr("seen", trial.number)
        trial.report(float(value.detach()), 0)
        return value

    return differentiated


def tune(trial: optuna.Trial, during: Callable[[int], None] = lambda step: None) -> float:
    """A run of ``minimize_bilevel`` with a checkpoint at every step, and something that happens in each."""

    def outer(w: Any, lam: Any, step: int) -> Tensor:
        during(step)
        return (w["w"] - torch.linspace(-1, 1, 5)).pow(2).sum() + 0.1 * lam["x"].exp().sum()

    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((w["w"] - 1) ** 2 + lam["x"].exp() * w["w"] ** 2).sum(),
        outer,
        outer_batch=lambda step: step,
    )
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.zeros(5)},
        {"x": torch.zeros(5)},
        inner_solver=ohg.GradientDescent(0.1, max_steps=3),
        num_steps=12,
        trial=trial,
        checkpoint_every=1,
    )
    return found.outer_value


def open_study(
    storage: optuna.storages.BaseStorage | str, seed: int = 3, **settings: Any
) -> optuna.Study:
    return optuna.create_study(
        study_name=NAME,
        storage=storage,
        sampler=ohg.HypergradientSampler(seed=seed, **settings),
        load_if_exists=True,
    )


def facts(study: optuna.Study) -> list[dict[str, Any]]:
    """Everything that a trial leaves behind, but for names of blobs and processes, and times."""
    found = []
    for trial in study.trials:
        attributes = trial.system_attrs.items()
        found.append(
            {
                "number": trial.number,
                "state": trial.state,
                "values": trial.values,
                "params": trial.params,
                "user": trial.user_attrs,
                "reports": trial.intermediate_values,
                "events": {k: v for k, v in attributes if k in (CLAIM, GRADIENT, OUTCOME)},
                "pointers": {k: v["step"] for k, v in attributes if k.startswith(ATTRIBUTE_PREFIX)},
            }
        )
    return found


def tensors_of(study: optuna.Study) -> dict[str, dict[str, Any]]:
    """The best trial's tensors, bit for bit."""
    trees = {n: v if isinstance(v, dict) else {"": v} for n, v in ohg.load_tensors(study).items()}
    return {name: {k: t.tolist() for k, t in tree.items()} for name, tree in trees.items()}


class Disturber:
    """Cuts connections in one of five ways, in turn, each at a moment of chance."""

    def __init__(self, proxy: CuttingProxy, seed: int = 0) -> None:
        self.proxy = proxy
        self.random = random.Random(seed)
        self.num_asked = 0

    def next(self) -> None:
        draw, proxy = self.random.randrange, self.proxy
        ways: list[Callable[[], object]] = [
            lambda: proxy.lose_answer_to(*[b"COMMIT"] * (1 + draw(6))),
            proxy.cut,
            lambda: proxy.cut_after(draw(2000), "from_server"),
            lambda: proxy.cut_after(draw(2000), "to_server"),
            lambda: proxy.refuse(0.2 * self.random.random()),
        ]
        ways[self.num_asked % len(ways)]()
        self.num_asked += 1


def undisturbed(num_trials: int) -> optuna.Study:
    study = open_study(optuna.storages.InMemoryStorage())
    study.optimize(objective(), n_trials=num_trials)
    return study


def compare_with_undisturbed(study: optuna.Study) -> int:
    """In how many trials, or tensors, the study differs from one in which nothing happened."""
    whole = undisturbed(len(study.trials))
    differences = sum(a != b for a, b in zip(facts(study), facts(whole), strict=True))
    return differences + (tensors_of(study) != tensors_of(whole))


def lose_each_answer(study: optuna.Study, proxy: CuttingProxy, request: bytes) -> int:
    """In the k-th of further trials, lose the answer to the k-th such request, until a trial has no k-th one.
    How many were lost."""
    for k in itertools.count(1):
        proxy.lose_answer_to(*[request] * k)
        study.optimize(objective(), n_trials=1)
        if proxy.is_waiting:
            break
    proxy.let_through()
    return k - 1


def lose_answers_to_writes(study: optuna.Study, proxy: CuttingProxy) -> int:
    """In each further trial, lose the answer to the commit of what it writes into one of the tables.
    How many were lost."""
    lost = 0
    for write in WRITES:
        proxy.lose_answer_to(write, b"COMMIT")
        study.optimize(objective(), n_trials=1)
        lost += not proxy.is_waiting
        proxy.let_through()
    return lost


def restart(server: Server, *, crash: bool) -> None:
    server.stop(crash=crash)
    server.start()


@dataclass
class Damage:
    """What a campaign has cost."""

    num_trials: int = 0
    num_cuts: int = 0
    num_restarts: int = 0
    dead_workers: int = 0
    lost: int = 0
    """Trials that a worker has finished and that are not stored as it finished them."""
    doubled: int = 0
    """Steps that were worked on twice, and trials that no worker knows of."""
    errors: list[str] = field(default_factory=list)
    """What dead workers have said."""

    @property
    def failures(self) -> int:
        return self.dead_workers + self.lost + self.doubled


def campaign(
    server: Server,
    directory: Path,
    *,
    workers: int,
    cuts: int,
    restarts: int,
    seed: int = 0,
    plain: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Damage:
    """Several processes work on one study while connections are cut and the server is restarted.

    Args:
        restarts: every other one a crash.
        plain: have them use Optuna as it is.
        tick: called after each disturbance.
    """
    url, chance = server.new_database(), random.Random(seed)
    open_study(url)
    with CuttingProxy(server.port) as proxy:
        arguments = [proxy.url(url), str(directory), *(["plain"] if plain else [])]
        processes = [_start_worker(seed + i, arguments) for i in range(workers)]
        _wait_for(directory, processes, workers)
        disturber, damage = Disturber(proxy, seed), Damage()
        disturbances = ["cut"] * cuts + ["restart"] * restarts
        chance.shuffle(disturbances)
        for kind in disturbances:
            if all(p.poll() is not None for p in processes):
                break
            if kind == "restart":
                restart(server, crash=damage.num_restarts % 2 == 0)
                damage.num_restarts += 1
            else:
                damage.num_cuts += _cut(disturber, processes)
            tick()
            told = _num_told(directory)
            _until(lambda told=told: _num_told(directory) > told, 4.0)  # type: ignore[misc]
            time.sleep(0.1 * chance.random())
        proxy.let_through()
        (directory / "stop").touch()
        for process in processes:
            _, error = process.communicate(timeout=300)
            if process.returncode:
                damage.dead_workers += 1
                damage.errors.append(error)
    _assess(url, directory, damage)
    return damage


def _cut(disturber: Disturber, processes: list[subprocess.Popen[str]]) -> bool:
    """Ask for cuts until there is one; whether there was, before everybody was dead."""
    proxy, before = disturber.proxy, disturber.proxy.num_cut

    def happened() -> bool:
        return proxy.num_cut > before and not proxy.is_waiting

    while not happened() and any(p.poll() is None for p in processes):
        disturber.next()
        _until(lambda: happened() or not proxy.is_waiting, 10.0)
    return happened()


def _start_worker(seed: int, arguments: list[str]) -> subprocess.Popen[str]:
    url, *rest = arguments
    command = [sys.executable, __file__, url, str(seed), *rest]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


def _wait_for(directory: Path, processes: list[subprocess.Popen[str]], workers: int) -> None:
    """Until each has finished a trial."""
    _until(
        lambda: (
            len(list(directory.glob("*.jsonl"))) == workers
            or any(p.poll() is not None for p in processes)
        ),
        120.0,
    )


def _num_told(directory: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in directory.glob("*.jsonl"))


def _assess(url: str, directory: Path, damage: Damage) -> None:
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name=NAME, storage=storage, sampler=None).trials
    storage.remove_session()
    storage.engine.dispose()
    told = [
        json.loads(line)
        for path in directory.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    damage.num_trials = len(trials)
    stored = {t.number: t for t in trials}
    damage.lost = sum(
        number not in stored or stored[number].values != [value] for number, value in told
    )
    known = Counter(number for number, _ in told)
    damage.doubled = sum(n - 1 for n in known.values())
    damage.doubled += max(0, len(trials) - len(known) - damage.dead_workers)
    claims = [t.system_attrs.get("hypergrad:claim") for t in trials]
    steps = Counter((c["trajectory"], c["parent"]) for c in claims if c and c["parent"] is not None)
    damage.doubled += sum(n - 1 for n in steps.values())


def work(url: str, seed: int, directory: Path, *, plain: bool = False) -> None:
    """Work on the study until there is a file that says stop."""
    report = directory / f"{seed}.jsonl"
    if plain:
        study = optuna.load_study(
            study_name=NAME, storage=url, sampler=optuna.samplers.TPESampler()
        )
        function: Callable[[Any], float] = lambda trial: trial.suggest_float("x", 0, 1)  # noqa: E731
    else:
        study = open_study(ohg.RetryingStorage(url, patience=120.0), seed)
        function = objective()

    def tell(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        with report.open("a") as file:
            file.write(json.dumps([trial.number, trial.value]) + "\n")
        if (directory / "stop").exists():
            study.stop()

    study.optimize(function, callbacks=[tell])


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), plain=sys.argv[4:] == ["plain"])
