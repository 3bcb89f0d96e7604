"""Learning to learn sine waves from ten points: iMAML (Rajeswaran et al. 2019).

Each wave's network starts from shared weights theta and is pulled back to them: theta and the pull are learned.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
SOLVER = ohg.HeavyBall(step_size=0.03, momentum=0.8, max_steps=25)


def predict(w: Params, x: Tensor) -> Tensor:
    hidden = torch.tanh(x[:, None] @ w["first"] + w["bias"])
    return (torch.tanh(hidden @ w["second"]) @ w["last"]).squeeze(1)


def loss(w: Params, outer_params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (predict(w, x) - y).square().mean()


def waves(step: int, num_tasks: int = 10, num_points: int = 10) -> list[tuple]:
    """Support and query of each task, drawn from the outer step alone."""
    rng = torch.Generator().manual_seed(step)
    tasks = []
    for _ in range(num_tasks):
        amplitude, phase = 0.5 + 2 * torch.rand(2, generator=rng)
        x = 6 * torch.rand(2, num_points, generator=rng) - 3
        y = amplitude * torch.sin(x + phase)
        tasks.append(((x[0], y[0]), (x[1], y[1])))
    return tasks


def main(num_steps: int = 400) -> float:
    torch.set_num_threads(1)  # the tensors are small
    rng = torch.Generator().manual_seed(0)
    shapes = {"first": (1, 24), "bias": (24,), "second": (24, 24), "last": (24, 1)}
    lam = {f"theta.{k}": torch.randn(s, generator=rng) / s[0] ** 0.5 for k, s in shapes.items()}
    lam["strength"] = torch.tensor(1.0)
    pulled = ohg.proximal(loss, "strength", "theta.")
    problem = ohg.Episodes(pulled, loss, waves, "theta.", vectorize=True)

    def on_new_waves(outer_params: Params) -> float:
        """Loss on 50 waves that no outer step has seen, each learned from ten points."""
        new = ohg.Episodes(pulled, loss, lambda step: waves(10**6, 50), "theta.")
        w = ohg.inner_solve(new.at(0), SOLVER, new.start(outer_params), outer_params).inner_params
        return float(new.at(0).outer_objective(w, outer_params, new.at(0).outer_batch(0)))

    curvature = problem.gauss_newton(
        lambda w, outer_params, batch: predict(w, batch[0]),
        lambda outputs, outer_params, batch: (outputs - batch[1]).square().mean(),
    )
    before = on_new_waves(lam)
    found = ohg.minimize_bilevel(
        problem,
        problem.start(lam),
        lam,
        inner_solver=SOLVER,
        estimator=ohg.Implicit(ohg.CG(max_steps=5), curvature=curvature),
        optimizer=functools.partial(torch.optim.Adam, lr=0.01),
        bounds={"strength": ohg.Domain(0.05, 10.0, log=True)},
        num_steps=num_steps,
        warm_start=False,  # each task starts from theta
        progress=True,
    )
    after = on_new_waves(found.outer_params)
    print(f"loss on new waves: {before:.3f} before, {after:.3f} now")
    print(f"strength of the pull: 1 before, {float(found.outer_params['strength']):.2f} now")
    return after


if __name__ == "__main__":
    main()
