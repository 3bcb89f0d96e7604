"""Every example runs, with fewer trials than it has."""

from __future__ import annotations

import importlib
from pathlib import Path

import optuna
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
AT_MOST = {  # objective after a few trials; all start well above it
    "per_feature_decay": ({"num_trials": 4}, 0.4),
    "numpy_gradients": ({"num_trials": 8}, 0.532),
    "black_box_pde": ({"num_trials": 6}, 0.7),  # the relative error
    "learning_rate": ({"num_trials": 5}, 0.8),
    "learned_schedule": ({"num_trials": 5}, 0.3),
    "per_weight_decay": ({"num_steps": 30}, 0.13),
    "imaml": ({"num_steps": 25}, 0.25),
    "pretraining": ({"num_steps": 10}, 0.45),
    "pipeline_search": ({"num_trials": 12, "grid_size": 2}, 56.0),
    "condensed_digits": ({"num_trials": 5}, 0.6),
    "choosing_a_solver": ({"num_products": (5, 40)}, 1e-3),  # the relative error
    "equilibrium_digits": ({"num_epochs": 3}, 0.25),  # the test error
    "data_cleaning": ({"num_steps": 600}, 0.15),  # one minus the AUROC
    "data_mixture": ({"num_steps": 60}, 0.1),  # the share of corrupted text; a third at the start
    "kernel_ridge_loo": ({"num_trials": 15}, 2.5),  # 7.4 at the start; the noise alone is 1
    "kernel_distillation": ({"num_trials": 12}, 0.15),
    "figures": ({"num_trials": 4}, 0.32),
    "figures_of_runs": ({"num_trials": 3, "num_steps": 15}, 0.7),
    "svc_search": ({"num_trials": 8, "grid_size": 2}, 0.03),  # the error
    "model_choice_search": ({"num_trials": 16, "grid_size": 2}, 4.0),  # 1 is noise
    "network_classifier": ({"max_iter": 10, "grid_size": 1}, 0.25),  # log loss on new data
    "per_feature_ridge": ({"num_trials": 20}, 3.5),  # 10.4 with one penalty; the noise alone is 1
    "noisy_labels_search": ({"num_trials": 12}, 0.15),  # one minus the AUROC
}


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    verbosity = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(verbosity)


def test_every_example_has_a_test():
    scripts = {p.stem for p in EXAMPLES.glob("*.py")}
    assert scripts == AT_MOST.keys() | {"quickstart", "quickstart_report"}


@pytest.mark.parametrize("name", AT_MOST)
def test_example(name, capsys):
    arguments, bound = AT_MOST[name]
    assert importlib.import_module(name).main(**arguments) < bound
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_example_is_short(name):
    limit = 165 if name.startswith("quickstart") else 80
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= limit
