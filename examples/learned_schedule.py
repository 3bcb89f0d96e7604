"""A learning rate for every step of a training run, and a momentum for every layer.

``Reversible`` differentiates the run by undoing it, in the memory of one step (``Unroll()`` gives the same for
less work and more memory). Each trial averages over two initializations, so that others are served, too.
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

NUM_STEPS = 60
SHAPES = {"hidden": (64, 32), "hidden_bias": (32,), "last": (32, 10), "last_bias": (10,)}
Params = dict[str, Tensor]


def main(num_trials: int = 20) -> float:
    features, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    features = features / 16
    validation = slice(1000, None)

    def loss(w: Params, rows: slice | Tensor) -> Tensor:
        hidden = torch.tanh(features[rows] @ w["hidden"] + w["hidden_bias"])
        return cross_entropy(hidden @ w["last"] + w["last_bias"], labels[rows])

    def start(seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        return {
            k: torch.randn(s, generator=generator, dtype=torch.float64) / 8 * (len(s) - 1)
            for k, s in SHAPES.items()
        }

    def batch(step: int) -> Tensor:  # a function of the step alone: it is asked for twice
        return torch.randperm(1000, generator=torch.Generator().manual_seed(step))[:128]

    # Schedules: a name is that of an entry for each step, a function gives a factor for each layer.
    solver = ohg.HeavyBall(
        step_size="rates",
        momentum=lambda lam, step: dict(zip(SHAPES, lam["momenta"], strict=True)),
        max_steps=NUM_STEPS,
    )

    def trained(lam: Params, seed: int) -> Tensor:
        lam = {"rates": lam["rates"].expand(NUM_STEPS), "momenta": lam["momenta"].expand(4)}
        settings = {"solver": solver, "estimator": ohg.Reversible(), "inner_batch": batch}
        return loss(
            ohg.solve(lambda w, _, rows: loss(w, rows), start(seed), lam, **settings), validation
        )

    def tuned(num_rates: int, num_momenta: int) -> optuna.Study:
        @ohg.differentiable
        def objective(trial: ohg.DifferentiableTrial) -> Tensor:
            rates = trial.suggest_tensor("rates", (num_rates,), 1e-3, 3.0, log=True, init=0.1)
            momenta = trial.suggest_tensor("momenta", (num_momenta,), 0.1, 0.98, init=0.5)
            lam = {"rates": rates, "momenta": momenta}
            return (trained(lam, 0) + trained(lam, 1)) / 2

        study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
        study.optimize(objective, n_trials=num_trials, show_progress_bar=True)
        return study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for label, study in ("constant", tuned(1, 1)), ("learned", tuned(NUM_STEPS, len(SHAPES))):
        found = ohg.load_tensors(study)
        others = sum(float(trained(found, seed)) for seed in range(2, 7)) / 5
        print(f"{label:8} loss {study.best_value:.4f}, from other initializations {others:.4f}")
        print("  rates  ", " ".join(f"{float(v):.3f}" for v in found["rates"][::6]))
        print("  momenta", " ".join(f"{float(v):.2f}" for v in found["momenta"]))
    return study.best_value


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are slower on two
    main()
