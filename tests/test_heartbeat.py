"""Optuna's heartbeat: a trial whose process was killed is retried, and goes on from its checkpoint."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import long_run
import optuna
import pytest
import torch
from conftest import server, url_of
from long_run import study_with_heartbeat

import optuna_hypergrad as ohg

CUT_AT = 5
CASES = {
    "sqlite": ("sqlite", "random"),
    "postgresql": ("postgresql", "random"),
    "mariadb": ("mariadb", "random"),
    "leases too": ("sqlite", "hypergradient"),
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Databases, each with a trial of one process that was killed when it had seen them all."""
    found: dict[str, str] = {}
    for name, (kind, _) in CASES.items():
        try:
            found[name] = url_of(kind, tmp_path_factory.mktemp(kind))
        except pytest.skip.Exception:
            continue  # and the test that asks for it is skipped
    arguments = [text for name, url in found.items() for text in (CASES[name][1], url)]
    command = [sys.executable, long_run.__file__, str(CUT_AT), *arguments]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250)
    assert killed.returncode == -9, killed.stderr
    return found


@pytest.fixture
def study(case: str, urls: dict[str, str]) -> Iterator[optuna.Study]:
    if case not in urls:
        server(CASES[case][0])  # skips with the reason
    opened = study_with_heartbeat(urls[case], CASES[case][1])
    yield opened
    opened._storage.remove_session()
    opened._storage._backend.engine.dispose()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_retried_trial_goes_on_from_its_checkpoint(case: str, study: optuna.Study) -> None:
    while study.trials[0].state == optuna.trial.TrialState.RUNNING:
        optuna.storages.fail_stale_trials(study)
        time.sleep(0.1)
    seen: list[int] = []
    study.optimize(lambda trial: long_run.long_run(trial, seen=seen), n_trials=1)
    failed, retried = study.trials
    pointers = ohg.TensorStore.of_study(study).pointers(failed, role="checkpoint")
    step = max(p.step for p in pointers)
    assert step in (2, 4)  # of which the second may have been on its way
    assert seen == list(range(step, long_run.NUM_STEPS))
    assert retried.system_attrs["retry_history"] == [0]
    assert retried.params == failed.params
    whole = optuna.create_study(sampler=ohg.HypergradientSampler(seed=1))
    whole.enqueue_trial(failed.params)
    whole.optimize(long_run.long_run, n_trials=1)
    assert retried.value == whole.best_value
    found, expected = (
        ohg.load_tensors(s.trials[-1], study=s)["bilevel"]["decay"] for s in (study, whole)
    )
    assert torch.equal(found, expected)
    assert list(retried.intermediate_values.items()) == list(
        whole.trials[0].intermediate_values.items()
    )
