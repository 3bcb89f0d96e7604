"""The viscosity of Burgers' equation from 64 observations, the solver a black box in NumPy.

``ohg.evaluate`` makes a simulation that nobody can differentiate an objective with a hypergradient: it calls
the solver once more, at a displaced viscosity. (``benchmarks/pde_discovery.py`` has more equations, and rivals.)
"""

from __future__ import annotations

import numpy as np
import optuna
from torch import Tensor

import optuna_hypergrad as ohg

K = np.pi * np.arange(129)  # wave numbers on 256 points of -1 <= x < 1
MODES = np.arange(129) <= 85  # the others would be aliases


def burgers(viscosity: float, num_steps: int = 400) -> np.ndarray:
    """``u_t + u u_x = viscosity u_xx`` from ``-sin(pi x)``: Fourier modes at all times up to 1, by RK4."""
    h = 1 / num_steps
    decay = np.exp(-0.5 * h * viscosity * K**2)  # diffusion over half a step, exactly

    def slope(v: np.ndarray) -> np.ndarray:
        return -0.5j * K * MODES * np.fft.rfft(np.fft.irfft(v) ** 2)

    v = np.fft.rfft(-np.sin(np.pi * np.linspace(-1, 1, 256, endpoint=False)))
    states = [v]
    for _ in range(num_steps):
        a = slope(v)
        b = slope(decay * (v + 0.5 * h * a))
        c = slope(decay * v + 0.5 * h * b)
        d = slope(decay * (decay * v + h * c))
        v = decay * (decay * (v + h / 6 * a) + h / 3 * (b + c)) + h / 6 * d
        states.append(v)
    return np.array(states)


def main(num_trials: int = 12, truth: float = 0.01 / np.pi) -> float:
    rng = np.random.default_rng(0)
    x, times = rng.uniform(-1, 1, 64), rng.integers(1, 401, 64)
    series = np.exp(1j * np.outer(x + 1, K)) * np.where(K > 0, 2, 1) / 256
    num_calls = 0

    def simulated(viscosity: float) -> np.ndarray:
        return (burgers(viscosity)[times] * series).real.sum(1)

    observed = simulated(truth) + 5e-4 * rng.standard_normal(64)

    def misfit(lam: dict[str, Tensor]) -> float:
        nonlocal num_calls
        num_calls += 1
        return float(np.mean((simulated(np.exp(float(lam["log_viscosity"]))) - observed) ** 2))

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        viscosity = trial.suggest_float("viscosity", 1e-4, 1e-1, log=True, init=3e-2)
        return ohg.evaluate(misfit, {"log_viscosity": viscosity.log()})

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)
    found = study.best_params["viscosity"]
    error = abs(found / truth - 1)
    print(f"viscosity {found:.6f}, in truth {truth:.6f}: {error:.2%} off")
    print(f"{len(study.trials)} trials, {num_calls} solver calls, misfit {study.best_value:.2e}")
    return error


if __name__ == "__main__":
    main()
