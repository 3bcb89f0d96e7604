"""Any number of workers on one study: no trial is lost, none doubled, and no step is taken twice."""

from __future__ import annotations

import random
from pathlib import Path

from crowds import Crowd, Objective

import optuna_hypergrad as ohg


def test_processes_some_of_which_are_killed(tmp_path: Path) -> None:
    crowd = Crowd("sqlite", tmp_path / "study", workers=4, trials=10, kills=4)
    assert crowd.run(random.Random(0)) == []
    assert crowd.killed == 4


def test_threads(tmp_path: Path) -> None:
    crowd = Crowd("sqlite", tmp_path / "study", workers=0, trials=0, kills=0)
    objective = ohg.differentiable(Objective(crowd.log, 0))
    crowd.study.optimize(objective, n_trials=20, n_jobs=4)
    assert crowd.audit(20) == []
