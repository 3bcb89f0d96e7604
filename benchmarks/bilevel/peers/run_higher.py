"""higher 0.2.1: one differentiable SGD step at a time, as in its tutorials for learned sample weights."""

from __future__ import annotations

import higher
import torch
from common import OutOfTime, Task, Weights, inner_objective, outer_objective


def main(step_size: float = 0.1, lr: float = 300.0) -> None:
    task = Task()
    module, lam = Weights(task.w), task.lam.clone().requires_grad_()
    inner = torch.optim.SGD(module.parameters(), lr=step_size)
    outer = torch.optim.SGD([lam], lr=lr)
    step = 0
    try:
        while True:
            task.note(module(), lam)
            train = task.batch("train", step)
            with higher.innerloop_ctx(module, inner) as (functional, differentiable):
                differentiable.step(inner_objective(functional(), lam, train))
                value = outer_objective(functional(), task.batch("validation", step))
                lam.grad = torch.autograd.grad(value, lam)[0]
            inner.zero_grad()
            inner_objective(module(), lam.detach(), train).backward()
            inner.step()
            outer.step()
            step += 1
    except OutOfTime:
        task.save()


if __name__ == "__main__":
    main()
