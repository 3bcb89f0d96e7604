"""Runs in pictures: each trial trains a classifier while it learns which of 300 labels are wrong.

Of every run: the curve, the hypergradient, what its weights gave in a training from scratch. Of the best: the weights
beside the truth, the spectrum of the training loss, what several ways to take the hypergradient cost.
"""

from __future__ import annotations

from pathlib import Path

import optuna
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg
from optuna_hypergrad import visualization


def make_problem() -> tuple[ohg.BilevelProblem, torch.Tensor]:
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x, rng = x / 16, torch.Generator().manual_seed(0)
    train, clean = torch.randperm(len(x), generator=rng)[:600].split(300)
    labels, noise = y[train].clone(), torch.rand(300, generator=rng) < 0.4
    labels[noise] = torch.randint(10, (int(noise.sum()),), generator=rng)

    def weighted_loss(w, lam, batch):
        each = cross_entropy(x[train] @ w["w"], labels, reduction="none")
        return (lam["weights"] * each).mean() + 1e-3 * w["w"].square().sum()

    def clean_loss(w, lam, batch):
        return cross_entropy(x[clean] @ w["w"], y[clean])

    return ohg.BilevelProblem(weighted_loss, clean_loss), labels == y[train]  # which are right


def main(num_trials: int = 6, num_steps: int = 40, directory: str = "figures_of_runs") -> float:
    torch.set_num_threads(1)  # the tensors are small
    problem, right = make_problem()
    w0 = {"w": torch.zeros(64, 10, dtype=torch.float64)}

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_categorical("rate", [0.05, 0.2, 0.5, 1.0])
        return ohg.minimize_bilevel(
            problem,
            w0,
            {"weights": torch.full((300,), 0.5).double()},
            inner_solver=ohg.HeavyBall(rate, max_steps=10),
            estimator=ohg.Implicit(ohg.Neumann(10), damping=1e-2),
            bounds={"weights": (0.0, 1.0)},
            num_steps=num_steps,
            trial=trial,
            final_eval="retrain",
        ).retrained_value

    sampler, pruner = ohg.HypergradientSampler(seed=0), optuna.pruners.NopPruner()
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=num_trials)

    Path(directory).mkdir(exist_ok=True)
    lam = ohg.load_tensors(study)["bilevel"]
    w = ohg.inner_solve(problem, ohg.NewtonCG(), w0, lam).inner_params
    ways = {k.__name__: [ohg.Implicit(k(n)) for n in (2, 4, 8, 16)] for k in (ohg.CG, ohg.Neumann)}
    for name, arguments in (
        ("plot_trajectories", (study,)),
        ("plot_hypergradient_norms", (study,)),
        ("plot_warm_against_retrained", (study,)),
        ("plot_sample_weights", (study, "bilevel/weights", right)),
        ("plot_spectrum", (ohg.probe_curvature(problem, w, lam),)),
        ("plot_cost_against_error", (visualization.sweep_estimators(problem, w, lam, ways),)),
    ):
        path = f"{directory}/{name.removeprefix('plot_')}"
        getattr(visualization, name)(*arguments).write_html(f"{path}.html", include_plotlyjs="cdn")
        getattr(visualization.matplotlib, name)(*arguments).figure.savefig(f"{path}.png")
    print(f"best clean loss, retrained: {study.best_value:.3f}; see {directory}")
    return study.best_value


if __name__ == "__main__":
    main()
