"""TorchOpt 0.7: one step of ``MetaSGD`` at a time, as in its documentation for meta-learned losses."""

from __future__ import annotations

import torch
import torchopt
from common import OutOfTime, Task, Weights, inner_objective, outer_objective


def main(step_size: float = 0.1, lr: float = 300.0) -> None:
    task = Task()
    module, lam = Weights(task.w), task.lam.clone().requires_grad_()
    inner, outer = torchopt.MetaSGD(module, lr=step_size), torch.optim.SGD([lam], lr=lr)
    step = 0
    try:
        while True:
            task.note(module(), lam)
            inner.step(inner_objective(module(), lam, task.batch("train", step)))
            value = outer_objective(module(), task.batch("validation", step))
            lam.grad = torch.autograd.grad(value, lam)[0]
            outer.step()
            torchopt.stop_gradient(module)
            torchopt.stop_gradient(inner)
            step += 1
    except OutOfTime:
        task.save()


if __name__ == "__main__":
    main()
