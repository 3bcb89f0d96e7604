"""A weight decay for each of 4,810 weights of a network, learned while it trains.

After every 10 steps of training, the decays take one step of Adam along the hypergradient of the validation loss.
The study gets the *retrained* value: that of a network trained from the beginning with the decays found.
"""

from __future__ import annotations

import functools

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params, Batch = dict[str, Tensor], tuple[Tensor, Tensor]


def load_data() -> list[Batch]:
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [(x[i].float() / 16, y[i]) for i in order.split([200, 600, 997])]


def initial() -> Params:
    generator = torch.Generator().manual_seed(0)
    first, last = (torch.randn(64, n, generator=generator) / 8 for n in (64, 10))
    return {"first": first, "bias": torch.zeros(64), "last": last, "last_bias": torch.zeros(10)}


def network(w: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"] + w["bias"]) @ w["last"] + w["last_bias"]


def validation_loss(w: Params, lam: Params, batch: Batch) -> Tensor:
    return cross_entropy(network(w, batch[0]), batch[1])


def training_loss(w: Params, lam: Params, batch: Batch) -> Tensor:
    return validation_loss(w, lam, batch) + sum((lam[k] * w[k].square()).sum() for k in w) / 2


def main(num_steps: int = 300) -> float:
    train, valid, test = load_data()
    problem = ohg.BilevelProblem(training_loss, validation_loss, lambda _: train, lambda _: valid)

    def objective(trial: optuna.Trial) -> float | None:
        start = {k: torch.full_like(v, 1e-3) for k, v in initial().items()}
        found = ohg.minimize_bilevel(
            problem,
            initial(),
            start,
            inner_solver=ohg.HeavyBall(0.2, momentum=0.9, max_steps=10),
            num_steps=num_steps if trial.number else 0,
            estimator=ohg.Implicit(ohg.Neumann(5, alpha=0.2)),
            optimizer=functools.partial(torch.optim.Adam, lr=0.1),
            bounds={k: ohg.Domain(1e-6, 1.0, log=True) for k in start},
            final_eval="retrain",
            retrain_steps=1500,
            trial=trial,
        )
        assert found.retrained_params is not None
        right = network(found.retrained_params, test[0]).argmax(1) == test[1]
        trial.set_user_attr("accuracy", 100 * float(right.float().mean()))
        return found.retrained_value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=2)
    for trial, label in zip(study.trials, ("one decay", "a decay per weight"), strict=True):
        right = trial.user_attrs["accuracy"]
        print(f"{label}: {trial.value:.4f} retrained; {right:.1f} % on the test set")
    return study.best_value


if __name__ == "__main__":
    main()
