"""BOAT 1.1.1: ``Problem`` with ``fo_op="VFO"``, its value-function method, as in its tutorial on data hyper-cleaning.

    pip install --no-deps boat-torch==1.1.1 && pip install higher matplotlib    # it asks for an older NumPy than it needs

``y_hat``, which stands for the solution of the inner problem, starts at ``w`` and has to get ahead of it for ``lam`` to move: at equal
step sizes and one step (momentum aside) both are one point, and with ``u1 = 0.1`` ``lam`` stayed where it was.
"""

from __future__ import annotations

import os
from typing import Any

import boat_torch
import torch
from common import OutOfTime, Task, Weights, inner_objective, outer_objective
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


class Samples(nn.Module):
    def __init__(self, lam: Tensor) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam.clone())


def inner_loss(fed: Any, samples: Samples, weights: Weights) -> Tensor:
    return inner_objective(weights(), samples.lam, fed["batch"])


def outer_loss(fed: Any, samples: Samples, weights: Weights) -> Tensor:
    return outer_objective(weights(), fed["batch"])


def main(
    step_size: float = 0.2,
    lr: float = 300.0,
    lower_iters: int = 2,
    y_hat_lr: float = 0.6,
    u1: float = 10.0,
    falling: bool = False,
) -> None:
    task = Task()
    weights, samples = Weights(task.w), Samples(task.lam)
    config = {
        "fo_op": "VFO",
        "gm_op": None,
        "na_op": None,
        "lower_level_model": weights,
        "upper_level_model": samples,
        "lower_level_var": list(weights.parameters()),
        "upper_level_var": list(samples.parameters()),
        "lower_level_opt": torch.optim.SGD(weights.parameters(), lr=step_size),
        "upper_level_opt": torch.optim.SGD(samples.parameters(), lr=lr),
        "lower_iters": lower_iters,
        "VFO": {"y_hat_lr": y_hat_lr, "eta": 0.5, "u1": u1},
        "device": "cpu",
        "fo_ol_batch_input": False,
        "return_grad": False,
        "loss_log_path": os.devnull,
    }
    losses = {
        "lower_level_loss": {"function": f"{__name__}.inner_loss", "params": {}},
        "upper_level_loss": {"function": f"{__name__}.outer_loss", "params": {}},
    }
    problem = boat_torch.Problem(config, losses)
    problem.save_losses = lambda **_: None  # it writes all of its log anew at each step
    problem.build_ll_solver().build_ul_solver()
    optimizers = config["lower_level_opt"], config["upper_level_opt"]
    pace = [LambdaLR(o, lambda t: (1.0 + t / 200.0) ** -0.5) for o in optimizers if falling]
    step = 0
    try:
        while True:
            task.note(weights(), samples.lam)
            fed = ({"batch": task.batch(part, step)} for part in ("train", "validation"))
            problem.run_iter(*fed, current_iter=step)
            for schedule in pace:
                schedule.step()
            step += 1
    except OutOfTime:
        task.save()


if __name__ == "__main__":
    main()
