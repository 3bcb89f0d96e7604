"""Betty: two ``ImplicitProblem`` levels under its ``Engine``, as in its tutorial on data reweighting."""

from __future__ import annotations

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from common import OutOfTime, Task, Weights, inner_objective, outer_objective
from torch import Tensor, nn

task: Task


class Samples(nn.Module):
    def __init__(self, lam: Tensor) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam.clone())

    def forward(self) -> Tensor:
        return self.lam


class Batches:
    """An endless loader."""

    def __init__(self, part: str) -> None:
        self.part, self.step = part, 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> object:
        self.step += 1
        return task.batch(self.part, self.step - 1)

    def __len__(self) -> int:
        return 10**9


class Outer(ImplicitProblem):
    def training_step(self, batch: object) -> Tensor:
        task.note(self.inner(), self())
        return outer_objective(self.inner(), batch)


class Inner(ImplicitProblem):
    def training_step(self, batch: object) -> Tensor:
        return inner_objective(self(), self.outer(), batch)


def main(step_size: float = 0.1, lr: float = 300.0) -> None:
    global task
    task = Task()
    weights, samples = Weights(task.w), Samples(task.lam)
    outer = Outer(
        name="outer",
        module=samples,
        optimizer=torch.optim.SGD(samples.parameters(), lr=lr),
        train_data_loader=Batches("validation"),
        config=Config(type="darts", log_step=10**9),
    )
    inner = Inner(
        name="inner",
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=step_size),
        train_data_loader=Batches("train"),
        config=Config(
            type="neumann", neumann_iterations=5, neumann_alpha=step_size, unroll_steps=1
        ),
    )
    engine = Engine(
        config=EngineConfig(train_iters=10**9, valid_step=10**9),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    try:
        engine.run()
    except OutOfTime:
        task.save()


if __name__ == "__main__":
    main()
