"""The learning rate and momentum of a training run, by differentiating through the run itself.

Implicit differentiation cannot see them: where training ends up converged, they no longer matter.
``Unroll`` differentiates the steps, so that "as good as possible after 50 steps" has a gradient.
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg


def main(num_trials: int = 25, num_steps: int = 50) -> float:
    features, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    features = features / 16
    train, validation = slice(0, 1000), slice(1000, None)

    def training_loss(w: dict[str, Tensor], lam: dict[str, Tensor], batch: None) -> Tensor:
        return cross_entropy(features[train] @ w["weight"], labels[train])

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        lam = {
            "step_size": trial.suggest_float("step_size", 1e-3, 10.0, log=True, init=0.05),
            "momentum": trial.suggest_float("momentum", 0.0, 0.99, init=0.5),
        }
        # A solver's setting that is a string is the name of a hyperparameter.
        solver = ohg.HeavyBall(step_size="step_size", momentum="momentum", max_steps=num_steps)
        start = {"weight": torch.zeros(64, 10, dtype=torch.float64)}
        w = ohg.solve(training_loss, start, lam, solver=solver, estimator=ohg.Unroll())
        return cross_entropy(features[validation] @ w["weight"], labels[validation])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)
    for label, trial in ("start", study.trials[0]), ("best", study.best_trial):
        settings = ", ".join(f"{k} {v:.3g}" for k, v in trial.params.items())
        print(f"{label:6} validation loss after {num_steps} steps {trial.value:.4f}: {settings}")
    return study.best_value


if __name__ == "__main__":
    main()
