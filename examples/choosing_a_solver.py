"""Which linear solver, with which settings? A probe of twenty products says it before anything is differentiated.

The training problem of ``per_feature_decay.py``: 640 weights, 64 decays. The probe's report is printed and its
picture of the spectrum saved; then conjugate gradients and the Neumann series, at the step length that it
recommends, are held against the exact hypergradient.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params = dict[str, Tensor]


def make_problem() -> ohg.BilevelProblem:
    features, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = features[order] / 16, labels[order]

    def training_loss(w: Params, lam: Params, batch: None) -> Tensor:
        penalty = (lam["decay"][:, None] * w["weight"].square()).sum() / 2
        return cross_entropy(x[:300] @ w["weight"], y[:300]) + penalty

    def validation_loss(w: Params, lam: Params, batch: None) -> Tensor:
        return cross_entropy(x[300:1000] @ w["weight"], y[300:1000])

    return ohg.BilevelProblem(training_loss, validation_loss)


def main(num_products: tuple[int, ...] = (5, 10, 20, 40, 80), picture: str | None = None) -> float:
    problem = make_problem()
    lam = {"decay": torch.full((64,), 1e-2, dtype=torch.float64)}
    zeros = {"weight": torch.zeros(64, 10, dtype=torch.float64)}
    w = ohg.inner_solve(problem, ohg.NewtonCG(), zeros, lam).inner_params

    report = ohg.probe_curvature(problem, w, lam)
    print(report)
    if picture is not None:
        report.plot().figure.savefig(picture)

    def slope(solver: ohg.CG | ohg.Neumann | ohg.Direct) -> Tensor:
        return ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit(solver)).value["decay"]

    exact = slope(ohg.Direct())
    print("\nrelative error of the hypergradient\nproducts        CG   Neumann")
    for count in num_products:
        found = [slope(ohg.CG(count, 0.0)), slope(ohg.Neumann(count, alpha=report.alpha))]
        errors = [float((v - exact).norm() / exact.norm()) for v in found]
        print(f"{count:8}  {errors[0]:8.1e}  {errors[1]:8.1e}")
    return errors[0]


if __name__ == "__main__":
    main(picture="spectral_density.png")
