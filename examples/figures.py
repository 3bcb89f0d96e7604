"""What a study has learned, in pictures: trajectories, hypergradients, and a decay for each weight of a small network.

A classifier of digits is trained to the end in each trial, with a width and a nonlinearity that TPE picks, and hundreds
of decays that move by hypergradients. The figures are written as HTML, with plotly, and as PNG, with Matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg
from optuna_hypergrad import visualization

NONLINEAR = {"tanh": nn.Tanh, "softplus": nn.Softplus}


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, valid = order[:150], order[150:750]
    return x[train] / 16, y[train], x[valid] / 16, y[valid]


def main(num_trials: int = 20, directory: str = "figures") -> float:
    torch.set_num_threads(1)  # the tensors are small
    x, y, xv, yv = load_data()

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        width = trial.suggest_int("width", 4, 8)
        kind = trial.suggest_categorical("kind", list(NONLINEAR))
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, width), NONLINEAR[kind](), nn.Linear(width, 10)).double()
        w0 = {k: v.detach() for k, v in net.named_parameters()}
        decay = trial.suggest_tensor_like("decay", w0, 1e-5, 1.0, log=True, init=1e-3)

        def inner(w, lam, batch):
            penalty = sum((lam[k] * v**2).sum() for k, v in w.items())
            return cross_entropy(functional_call(net, w, x), y) + penalty

        solver = ohg.LBFGS(max_steps=100)
        estimator = ohg.Implicit(ohg.CG(max_steps=50), damping=1e-3)
        w = ohg.solve(inner, w0, decay, estimator=estimator, solver=solver)
        return cross_entropy(functional_call(net, w, xv), yv)

    sampler = ohg.HypergradientSampler(seed=0, retention=ohg.Retention(every=1))
    study = optuna.create_study(study_name="digits", sampler=sampler)
    study.optimize(objective, n_trials=num_trials)

    Path(directory).mkdir(exist_ok=True)
    pixels = ohg.load_tensors(study, "decay")["decay"]["0.weight"].log().mean(0)
    for name, arguments in (
        ("plot_trajectories", (study,)),
        ("plot_hypergradient_norms", (study,)),
        ("plot_tensor_evolution", (study, "decay")),
        ("plot_extreme_hyperparameters", (study, "decay")),
        ("plot_layers", (study, "decay")),
        ("plot_images", (pixels.reshape(8, 8), "log decay by pixel")),
    ):
        path = Path(directory) / name.removeprefix("plot_")
        getattr(visualization, name)(*arguments).write_html(
            f"{path}.html", include_plotlyjs="directory"
        )
        getattr(visualization.matplotlib, name)(*arguments).figure.savefig(f"{path}.png")
        print(f"{path}.html and .png")
    print(f"validation loss: {study.trials[0].value:.3f} with equal decays, {study.best_value:.3f}")
    return study.best_value


if __name__ == "__main__":
    main()
