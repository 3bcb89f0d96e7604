"""Hypergradients from elsewhere: ridge regression in NumPy, its gradient by hand.

No torch and no decorator: an ordinary objective tells Optuna the gradient of what it returns.
"""

from __future__ import annotations

import numpy as np
import optuna
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale

import optuna_hypergrad as ohg


def main(num_trials: int = 15) -> float:
    features, target = map(scale, load_diabetes(return_X_y=True))
    x, y, x_validation, y_validation = features[:100], target[:100], features[100:], target[100:]
    names = [f"decay_{i}" for i in range(x.shape[1])]

    def objective(trial: optuna.Trial) -> float:
        decay = np.array([trial.suggest_float(name, 1e-4, 1e4, log=True) for name in names])
        hessian = x.T @ x + np.diag(decay)
        w = np.linalg.solve(hessian, x.T @ y)
        error = x_validation @ w - y_validation
        # d loss / d decay_i = -w_i v_i,  hessian v = d loss / d w
        v = np.linalg.solve(hessian, 2 * x_validation.T @ error / len(error))
        ohg.report_hypergradient(trial, dict(zip(names, -w * v, strict=True)))
        return float(np.mean(error**2))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)
    print(f"validation error: {study.trials[0].value:.4f} at the start, {study.best_value:.4f} now")
    for name, decay in study.best_params.items():
        print(f"  {name:9} {decay:10.3g}")
    return study.best_value


if __name__ == "__main__":
    main()
