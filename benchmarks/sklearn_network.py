"""Four decays of a network: ``HypergradientRegressor`` beside TPE that has the same CPU time.

    OMP_NUM_THREADS=1 python benchmarks/sklearn_network.py [number of seeds]

Friedman's first function, 150 samples, 1,000 more for the test; a network of one hidden layer of 32, a decay for each of its
four tensors. TPE's trials train the same network from the beginning, for a number of steps that TPE chooses (ours stops early), are
judged by the same held-back samples, and what is best is trained on all samples, as ours is. ``results/sklearn_network.md`` has the test errors by seed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import optuna
import torch
from sklearn.datasets import make_friedman1
from threadpoolctl import threadpool_limits

from optuna_hypergrad import HypergradientRegressor
from optuna_hypergrad.sklearn_adapters._network_problem import Network, build, split
from optuna_hypergrad.sklearn_adapters._network_training import Schedule, train_anew

RESULTS = Path(__file__).parent / "results" / "sklearn_network.md"
SIZES, ACTIVATION = (32,), "tanh"
LOW, HIGH = 1e-7, 10.0


def data(seed: int) -> tuple[np.ndarray, ...]:
    x, y = make_friedman1(1150, 10, noise=1.0, random_state=seed)
    x, y = (x - x[:150].mean(0)) / x[:150].std(0), (y - y[:150].mean()) / y[:150].std()
    return x[:150], y[:150], x[150:], y[150:]


def ours(seed: int) -> tuple[float, float, int]:
    """Test error, CPU seconds, decays."""
    x, y, x_test, y_test = data(seed)
    model = HypergradientRegressor(
        hidden_layer_sizes=SIZES, activation=ACTIVATION, decay="per_tensor", random_state=seed
    )
    began = time.process_time()
    model.fit(x, y)
    spent = time.process_time() - began
    error = float(np.mean((model.predict(x_test) - y_test) ** 2))
    return error, spent, len(model.hyperparameters_)


def tpe(seed: int, seconds: float) -> tuple[float, int]:
    """Test error after so many CPU seconds, and its trials."""
    x, y, x_test, y_test = data(seed)
    inputs, targets = torch.tensor(x), torch.tensor(y)
    module = build(None, SIZES, ACTIVATION, x.shape[1], 1, seed).double()
    network = Network(module, lambda out, t: (out[:, 0] - t).square(), "per_tensor")
    inside, held = split(y, 0.2, False, seed)
    schedule = Schedule(1, 10, 0, 0.01, 0.1, 10, None, None)

    def part(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        counts = torch.ones(len(rows), dtype=torch.float64)
        return inputs[rows], targets[rows], torch.arange(len(rows)), counts

    def trained(rows: np.ndarray, steps: int, lam: dict[str, float]) -> dict[str, torch.Tensor]:
        decays = {k: torch.tensor(v, dtype=torch.float64) for k, v in lam.items()}
        return train_anew(network, part(rows), decays, schedule, steps, seed)

    names = list(network.weights())
    began = time.process_time()

    def objective(trial: optuna.Trial) -> float:
        steps = trial.suggest_int("steps", 50, 1000, log=True)
        w = trained(inside, steps, {n: trial.suggest_float(n, LOW, HIGH, log=True) for n in names})
        if time.process_time() - began > seconds:
            trial.study.stop()
        return float(network.validation_loss(w, {}, part(held)))

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective)
    best = dict(study.best_params)
    w = trained(np.arange(len(y)), best.pop("steps"), best)
    out = torch.func.functional_call(module, w, (torch.tensor(x_test),))[:, 0]
    return float((out - torch.tensor(y_test)).square().mean()), len(study.trials)


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    lines = [
        "# Four decays of a network, and TPE with the same CPU time",
        "",
        "Test error (mean square, targets of variance one) of a network of 32 hidden units on 150 samples of Friedman's first",
        "function. By `sklearn_network.py`.",
        "",
        "| seed | HypergradientRegressor | TPE | CPU seconds of each | trials of TPE |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        with threadpool_limits(1):
            error, seconds, _ = ours(seed)
            other, trials = tpe(seed, seconds)
        errors.append((error, other))
        lines.append(f"| {seed} | {error:.3f} | {other:.3f} | {seconds:.1f} | {trials} |")
        print(lines[-1], flush=True)
    means = np.mean(errors, 0)
    lines.append(f"| mean | {means[0]:.3f} | {means[1]:.3f} | | |")
    print(lines[-1])
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
