"""Tune tens of thousands of hyperparameters by gradient and two by TPE, in one Optuna study.

40 % of the training labels of scikit-learn's digits are wrong. Optuna's TPE picks the width and the
activation of a small network; within each trial, hypergradients tune one weight per training sample
and one decay per network weight while the network trains. Beside it, with as many trials: uniform
weights and a single decay, tuned by TPE. Stop it and start it again: it goes on from ``study.db``.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from quickstart_report import draw, print_table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
SOLVER = ohg.HeavyBall(step_size=0.2, momentum=0.9, max_steps=10)  # inner steps per outer step
TRAINING_STEPS = 500  # of a network that is trained from scratch


@dataclass(frozen=True)
class Data:
    """Images ``(n, 64)`` and labels ``(n,)``; ``clean`` marks the training labels that are right."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    clean: Tensor


def load_data(seed: int = 0, num_train: int = 1000, num_validation: int = 300) -> Data:
    rng = torch.Generator().manual_seed(seed)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=rng)
    images, labels = (images[order] / 16 - 0.3).float(), labels[order]
    wrong = torch.randperm(num_train, generator=rng)[: num_train * 4 // 10]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape, generator=rng)) % 10
    clean = torch.ones(num_train, dtype=torch.bool).index_fill(0, wrong, False)
    sizes = [num_train, num_validation, len(labels) - num_train - num_validation]
    return Data(*zip(images.split(sizes), labels.split(sizes), strict=True), clean)


def suggest_network(trial: optuna.Trial) -> tuple[nn.Module, Params]:
    width = trial.suggest_int("width", 128, 384)
    activation = trial.suggest_categorical("activation", list(ACTIVATIONS))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, width), ACTIVATIONS[activation](), nn.Linear(width, 10))
    return network, {k: v.detach() for k, v in network.named_parameters()}


def make_problem(network: nn.Module, data: Data) -> ohg.BilevelProblem:
    def training_loss(w: Params, lam: Params, batch: None) -> Tensor:
        images, labels = data.train
        losses = cross_entropy(functional_call(network, w, images), labels, reduction="none")
        decay = sum((lam[f"decay/{k}"] * v.square()).sum() for k, v in w.items())
        return (lam["sample_weight"] * losses).mean() + decay / 2

    def validation_loss(w: Params, lam: Params, batch: None) -> Tensor:
        images, labels = data.validation
        return cross_entropy(functional_call(network, w, images), labels)

    return ohg.BilevelProblem(inner_objective=training_loss, outer_objective=validation_loss)


def tuned_by_gradient(trial: optuna.Trial, data: Data, num_steps: int) -> float:
    network, w = suggest_network(trial)
    decays = {f"decay/{k}": torch.full_like(v, 3e-3) for k, v in w.items()}
    lam = {"sample_weight": torch.ones(len(data.clean)), **decays}
    found = ohg.minimize_bilevel(
        make_problem(network, data),
        w,
        lam,
        inner_solver=SOLVER,
        estimator=ohg.Implicit(ohg.Neumann(num_steps=5, alpha=0.2), damping=0.1),
        optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        bounds={"sample_weight": ohg.Domain(0.0, 1.0, unit=1.0)}
        | dict.fromkeys(decays, ohg.Domain(1e-6, 1e-1, log=True)),
        num_steps=num_steps,
        burn_in=50,
        final_eval="retrain",
        retrain_steps=TRAINING_STEPS,
        trial=trial,
        progress=True,
    )
    trial.set_user_attr("num_tuned", 2 + sum(v.numel() for v in lam.values()))
    note(trial, network, found.retrained_params, found.outer_params, data)
    return found.retrained_value


def tuned_by_tpe(trial: optuna.Trial, data: Data) -> float:
    network, w = suggest_network(trial)
    decay = trial.suggest_float("decay", 1e-6, 1e-1, log=True)
    lam = {f"decay/{k}": torch.tensor(decay) for k in w}
    lam["sample_weight"] = torch.ones(len(data.clean))
    problem = make_problem(network, data)
    w = ohg.inner_solve(problem, SOLVER, w, lam, num_steps=TRAINING_STEPS).inner_params
    trial.set_user_attr("num_tuned", 3)
    note(trial, network, w, lam, data)
    return float(problem.outer_objective(w, lam, None))


def note(trial: optuna.Trial, network: nn.Module, w: Params, lam: Params, data: Data) -> None:
    """What the search never sees: the test set, and which labels are right."""
    images, labels = data.test
    correct = functional_call(network, w, images).argmax(1) == labels
    trial.set_user_attr("test_accuracy", float(correct.float().mean()))
    trial.set_user_attr("auroc", float(roc_auc_score(data.clean, lam["sample_weight"])))


def run(name: str, objective: Callable, url: str, num_trials: int) -> optuna.Study:
    """Bring a study to the next multiple of ``num_trials`` finished trials."""
    pruner = optuna.pruners.NopPruner()
    study = optuna.create_study(storage=url, study_name=name, load_if_exists=True, pruner=pruner)
    for interrupted in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(interrupted.number, state=TrialState.FAIL)
    if study.trials and study.trials[-1].state is TrialState.FAIL:  # go on from its checkpoint
        RetryHeartbeatStaleTrialCallback(max_retry=3)(study, study.trials[-1])
    done = len(study.get_trials(states=[TrialState.COMPLETE]))
    missing = num_trials - done % num_trials
    print(f"{name}: {done} trials done, {missing} to go")
    study.sampler = optuna.samplers.TPESampler(seed=done, n_startup_trials=num_trials // 2)
    study.optimize(objective, n_trials=missing, show_progress_bar=True)
    return study


def main(
    num_trials: int = 10, num_steps: int = 100, directory: Path = Path(), seed: int = 0
) -> None:
    torch.set_num_threads(1)  # the matrices are small: threads would wait for each other
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data, url = load_data(seed), f"sqlite:///{directory / 'study.db'}"
    by_gradient = functools.partial(tuned_by_gradient, data=data, num_steps=num_steps)
    ours = run("hypergradients", by_gradient, url, num_trials)
    baseline = run("uniform weights", functools.partial(tuned_by_tpe, data=data), url, num_trials)
    print_table([baseline, ours])
    draw(ours, baseline, data.clean, directory / "quickstart.png")
    print(f"\nFigure: {directory / 'quickstart.png'}\nEvery trial: optuna-dashboard {url}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. Start it again, and it goes on.")
