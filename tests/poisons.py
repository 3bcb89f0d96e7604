"""NaN and infinity in the middle of a hypergradient, at one step, at one of six places."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import faults
import optuna
import torch
from torch import Tensor

import optuna_hypergrad as ohg

PLACES = (
    "inner loss",
    "outer loss",
    "hypergradient entry",
    "product",
    "linear solver",
    "inner solver",
)
ESTIMATORS = ("implicit, CG", "implicit, Neumann", "unroll")
OPTIMIZERS: dict[str, Any] = {
    "auto": "auto",
    "adam": "adam",
    "lbfgs": "lbfgs",
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}
KINDS = (math.nan, math.inf, -math.inf)
STEPS = 6
TARGET = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


@dataclass
class Poison:
    """``kind`` comes up at ``place`` while ``step`` is evaluated."""

    place: str
    estimator: str
    step: int = 3
    kind: float = math.nan
    optimizer: str = "auto"
    now: int = -1
    """The step that is evaluated."""
    struck: int = 0

    @classmethod
    def draw(cls, r: random.Random) -> Poison:
        optimizer = r.choice(list(OPTIMIZERS))
        step = r.randrange(STEPS)
        return cls(r.choice(PLACES), r.choice(ESTIMATORS), step, r.choice(KINDS), optimizer)

    def into(self, x: Tensor, place: str) -> Tensor:
        """``x``, with its first entry replaced if this is the place and the time."""
        if place != self.place or self.now != self.step:
            return x
        self.struck += 1
        first = torch.arange(x.numel(), device=x.device).reshape(x.shape) == 0
        return torch.where(first, torch.full_like(x, self.kind), x)

    def inner(self, w: ohg.Params, lam: ohg.Params, batch: Any) -> Tensor:
        v = _SecondOrder.apply(w["w"], self)
        loss = 0.5 * (lam["a"].exp() * v**2).sum() - (lam["t"] * v).sum() + 0.1 * (v**4).sum()
        return self.into(loss, "inner loss")

    def outer(self, w: ohg.Params, lam: ohg.Params, batch: Any = None) -> Tensor:
        if batch is not None:
            self.now = batch
        t = _FirstOrder.apply(lam["t"], self)
        loss = ((w["w"] - TARGET) ** 2).sum() + 0.01 * lam["a"] ** 2 + 0.001 * (t**2).sum()
        return self.into(loss, "outer loss")

    def inner_batch(self, index: int) -> None:
        self.now = index // 40

    def solver(self) -> ohg.GradientDescent:
        return _Descent(0.2, max_steps=40, poison=self)

    def method(self) -> Any:
        if self.estimator == "unroll":
            return _Unroll(poison=self)
        if self.estimator == "implicit, CG":
            return ohg.Implicit(_CG(50, 1e-10, poison=self))
        return ohg.Implicit(_Neumann(60, alpha=0.2, poison=self))


class _FirstOrder(torch.autograd.Function):
    """The identity, with a poison in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, poison: Poison) -> Tensor:
        ctx.poison = poison
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return ctx.poison.into(given, "hypergradient entry"), None


class _SecondOrder(torch.autograd.Function):
    """The identity, with a poison in the gradient of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, poison: Poison) -> Tensor:
        ctx.poison = poison
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return _InGradient.apply(given, ctx.poison), None


class _InGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, poison: Poison) -> Tensor:
        ctx.poison = poison
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return ctx.poison.into(given, "product"), None


@dataclass(frozen=True)
class _Descent(ohg.GradientDescent):
    poison: Any = None

    def step(self, evaluate: Any, inner_params: Any, outer_params: Any, state: Any, index: int):
        w, *rest = super().step(evaluate, inner_params, outer_params, state, index)
        if (index + 1) % 40 == 0:
            w = {k: self.poison.into(v, "inner solver") for k, v in w.items()}
        return w, *rest


@dataclass(frozen=True)
class _CG(ohg.CG):
    poison: Any = None

    def compute(self, *arguments: Any) -> Any:
        found = super().compute(*arguments)
        return replace(found, x=self.poison.into(found.x, "linear solver"))


@dataclass(frozen=True)
class _Neumann(ohg.Neumann):
    poison: Any = None

    def compute(self, *arguments: Any) -> Any:
        found = super().compute(*arguments)
        return replace(found, x=self.poison.into(found.x, "linear solver"))


@dataclass(frozen=True)
class _Unroll(ohg.Unroll):
    """Its linear solve is the recursion backwards through the steps."""

    poison: Any = None

    def solve(self, *arguments: Any) -> Any:
        solved = super().solve(*arguments)

        def pullback(cotangent: Any) -> Any:
            pulled = solved.pullback(cotangent)
            outer = {k: self.poison.into(v, "linear solver") for k, v in pulled.outer.items()}
            return replace(pulled, outer=outer)

        return replace(solved, pullback=pullback, last_pullback=None)


def study_with(poison: Poison) -> list[str]:
    """A study of which one trial meets the poison; what was wrong."""

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        poison.now = trial.number
        lam = {
            "a": trial.suggest_float("a", -1.0, 1.0),
            "t": trial.suggest_tensor("t", 3, -2.0, 2.0, init=0.4, dtype=torch.float64),
        }
        w0 = {"w": torch.zeros(3, dtype=torch.float64)}
        settings = {"solver": poison.solver(), "estimator": poison.method()}
        return poison.outer(ohg.solve(poison.inner, w0, lam, **settings), lam)

    sampler = ohg.HypergradientSampler(
        seed=0, optimizer=OPTIMIZERS[poison.optimizer], retention=ohg.Retention(every=1)
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=STEPS + 2, catch=ohg.HypergradError)
    return _wrong(poison, study, study.trials[poison.step], range(STEPS + 2))


def run_with(poison: Poison) -> list[str]:
    """A run of outer steps of which one meets the poison, and another one; what was wrong."""
    if poison.place in ("product", "linear solver") and poison.estimator != "unroll":
        poison.step += 1  # products are on the inner batch with which the next step begins

    def objective(trial: optuna.Trial) -> float:
        problem = ohg.BilevelProblem(poison.inner, poison.outer, poison.inner_batch, int)
        optimizer = OPTIMIZERS[poison.optimizer]
        settings = {} if isinstance(optimizer, str) else {"optimizer": optimizer}
        return ohg.minimize_bilevel(
            problem,
            {"w": torch.zeros(3, dtype=torch.float64)},
            {"a": torch.tensor(0.0, dtype=torch.float64), "t": torch.full((3,), 0.4).double()},
            inner_solver=poison.solver(),
            estimator=poison.method(),
            bounds={"a": (-1.0, 1.0), "t": (-2.0, 2.0)},
            num_steps=STEPS,
            trial=trial,
            checkpoint_every=1,
            **settings,
        ).outer_value

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=1, catch=ohg.HypergradError)
    struck, step = study.trials[0], poison.step
    poison.step = -2
    study.optimize(objective, n_trials=1)
    poison.step = step
    return _wrong(poison, study, struck, [1])


def _wrong(poison: Poison, study: optuna.Study, struck: Any, others: Any) -> list[str]:
    wrong = [] if poison.struck else ["the poison was not met"]
    outcome = struck.system_attrs.get("hypergrad:outcome", {})
    taken = struck.state.name == "COMPLETE" and (outcome.get("stop") is None)
    if taken and poison.place not in ("hypergradient entry", "product", "linear solver"):
        wrong.append("the trial counts")
    for blob, tensors in faults.stored(study).items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                wrong.append(f"{blob} holds {name} = {tensor}")
    for trial in study.trials:
        finite = [*trial.params.values(), *(trial.values or [])]
        finite += trial.intermediate_values.values()
        if not all(map(math.isfinite, finite)):
            wrong.append(f"trial {trial.number} holds {finite}")
        attributes = {k: v for k, v in trial.system_attrs.items() if k != "hypergrad:gradient"}
        try:
            json.dumps([attributes, trial.user_attrs], allow_nan=False)
        except ValueError:
            wrong.append(f"trial {trial.number} has NaN among {attributes}")
    after = [study.trials[n] for n in others if n != struck.number]
    if not all(t.state.name == "COMPLETE" for t in after):
        wrong.append(f"it did not go on: {[t.state.name for t in study.trials]}")
    return wrong


SURVIVES: dict[str, Callable[[Poison], list[str]]] = {"study": study_with, "run": run_with}
