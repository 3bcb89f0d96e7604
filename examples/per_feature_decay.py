"""One weight decay per feature of a logistic regression: 64 hyperparameters, 20 trials.

Each trial solves the training problem and differentiates its solution; the sampler takes the step.
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features, labels = features[order] / 16, labels[order]
    return features[:300], labels[:300], features[300:1000], labels[300:1000]


def main(num_trials: int = 20, storage: str | None = None) -> float:
    x_train, y_train, x_validation, y_validation = load_data()

    def training_loss(w: dict[str, Tensor], lam: dict[str, Tensor], batch: None) -> Tensor:
        penalty = (lam["decay"][:, None] * w["weight"].square()).sum() / 2
        return cross_entropy(x_train @ w["weight"], y_train) + penalty

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        start = torch.full((64,), 1e-2, dtype=torch.float64)
        decay = trial.suggest_tensor("decay", start.shape, 1e-6, 10.0, log=True, init=start)
        zeros = {"weight": torch.zeros(64, 10, dtype=torch.float64)}
        w = ohg.solve(training_loss, zeros, {"decay": decay})
        return cross_entropy(x_validation @ w["weight"], y_validation)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)

    decay = ohg.load_tensors(study, "decay")["decay"]
    print(f"validation loss: {study.trials[0].value:.4f} at the start, {study.best_value:.4f} now")
    print("log10 of the decay of each pixel:")
    print("\n".join(" ".join(f"{d:5.1f}" for d in row) for row in decay.log10().view(8, 8)))
    return study.best_value


if __name__ == "__main__":
    main()
