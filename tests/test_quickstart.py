"""The demo: it runs, it beats its baseline, it can be stopped and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_hypergrad.trial_attributes import value_kind_of

EXAMPLES = Path(__file__).parent.parent / "examples"
FEWER = "quickstart.TRAINING_STEPS = 200; quickstart.main(num_trials=2, num_steps=24)"


def run_demo(directory: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The demo in a process of its own, as a user runs it; with ``before`` executed ahead of it."""
    code = f"import quickstart\n{before}\n{FEWER}"
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def load(directory: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{directory / 'study.db'}")


STOP = """
import optuna_hypergrad as ohg
minimize_bilevel = ohg.minimize_bilevel
def stopped(*args, trial, **kwargs):
    report = trial.report
    def stop_at_12(value, step):
        report(value, step)
        if step == 12:
            raise KeyboardInterrupt
    trial.report = stop_at_12
    return minimize_bilevel(*args, trial=trial, **kwargs)
ohg.minimize_bilevel = stopped
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("demo")
    done = run_demo(directory)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_prints_a_table_and_the_way_to_the_dashboard(finished):
    directory, output = finished
    assert "validation loss   test accuracy   AUROC of weights" in output
    assert "optuna-dashboard sqlite:///study.db" in output
    assert (directory / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_hypergradients_beat_the_baseline_and_find_the_wrong_labels(finished):
    directory, _ = finished
    ours, baseline = load(directory, "hypergradients"), load(directory, "uniform weights")
    assert ours.best_value < 0.5 * baseline.best_value
    notes = ours.best_trial.user_attrs
    assert value_kind_of(ours.best_trial) == "retrained"
    assert notes["num_tuned"] > 10_000
    assert notes["auroc"] > 0.9
    assert notes["test_accuracy"] > baseline.best_trial.user_attrs["test_accuracy"]


def test_goes_on_after_a_stop_with_the_same_result(finished, tmp_path):
    stopped = run_demo(tmp_path, before=STOP)
    assert "KeyboardInterrupt" in stopped.stderr
    assert run_demo(tmp_path).returncode == 0
    study = load(tmp_path, "hypergradients")
    assert [t.state for t in study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    whole = load(finished[0], "hypergradients").trials[0]
    resumed = study.trials[1]
    assert resumed.params == whole.params
    assert resumed.values == whole.values
    assert resumed.intermediate_values == whole.intermediate_values


def test_run_again_it_adds_trials_and_keeps_those_it_had(finished):
    directory, _ = finished
    before = [(t.params, t.values) for t in load(directory, "hypergradients").trials]
    again = run_demo(directory)
    assert again.returncode == 0, again.stderr
    after = [(t.params, t.values) for t in load(directory, "hypergradients").trials]
    assert after[: len(before)] == before
    assert len(after) == 2 * len(before)
