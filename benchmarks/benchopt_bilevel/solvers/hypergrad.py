"""Our one-loop methods as a solver of ``benchopt/benchmark_bilevel``.

Copy this file into ``solvers/`` of a checkout of that benchmark, then::

    benchopt run . -s optuna_hypergrad -s SOBA -d quadratic

The benchmark's objectives are JAX functions ``f(inner_var, outer_var, start=, batch_size=)``. :class:`JaxObjective` makes a torch
function of one: its value, its gradient and the product of its Hessian with a vector are JAX's, jitted, and torch only carries
vectors from one to the next. So every method that asks for no more than these can run; each batch of the benchmark's own
``start`` goes to JAX as a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator, EstimatorState

METHODS: dict[str, Callable[[], AbstractHypergradientEstimator]] = {
    "SOBA": ohg.SOBA,
    "MA-SOBA": ohg.MASOBA,
    "F2SA": ohg.F2SA,
    "BOME": ohg.BOME,
}


class JaxObjective:
    """A JAX function ``f(inner_var, outer_var, start=, batch_size=)`` for torch, differentiable twice.

    Args:
        function: Of arrays.
        batch_size: Of all its batches.
    """

    def __init__(self, function: Callable[..., Any], batch_size: int) -> None:
        def value(w: Any, lam: Any, start: Any) -> Any:
            return function(w, lam, start=start, batch_size=batch_size)

        slope = jax.grad(value, argnums=(0, 1))

        def curved(w: Any, lam: Any, start: Any, by_w: Any, by_lam: Any) -> Any:
            return jax.vjp(lambda a, b: slope(a, b, start), w, lam)[1]((by_w, by_lam))

        self.value, self.slope, self.curved = map(jax.jit, (value, slope, curved))

    def __call__(
        self, inner_params: dict[str, Tensor], outer_params: dict[str, Tensor], start: int
    ) -> Tensor:
        found: Tensor = _Value.apply(inner_params["w"], outer_params["lam"], self, start)
        return found


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, lam: Tensor, of: JaxObjective, start: int) -> Tensor:
        ctx.save_for_backward(w, lam)
        ctx.of, ctx.start = of, start
        return _tensor(of.value(_array(w), _array(lam), start))

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        slope_w, slope_lam = _Slope.apply(*ctx.saved_tensors, ctx.of, ctx.start)
        return by * slope_w, by * slope_lam, None, None


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, lam: Tensor, of: JaxObjective, start: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(w, lam)
        ctx.of, ctx.start = of, start
        slope_w, slope_lam = of.slope(_array(w), _array(lam), start)
        return _tensor(slope_w), _tensor(slope_lam)

    @staticmethod
    def backward(ctx: Any, by_w: Tensor, by_lam: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        w, lam = map(_array, ctx.saved_tensors)
        found = ctx.of.curved(w, lam, ctx.start, _array(by_w), _array(by_lam))
        return _tensor(found[0]), _tensor(found[1]), None, None


def _array(x: Tensor) -> Any:
    return jax.numpy.asarray(x.detach().numpy())


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


class Solver(BaseSolver):
    """One step of ``w``, of ``v`` (or ``y``) and of ``lam`` at a time, on batches; all steps fall as ``t^(-1/2)``."""

    name = "optuna_hypergrad"
    stopping_criterion = SufficientProgressCriterion(patience=100, strategy="callback")
    parameters = {  # noqa: RUF012 (benchopt's own convention)
        "method": list(METHODS),
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        "eval_freq": [128],
        "random_state": [1],
    }
    requirements = ["pip:jax", "pip:torch", "pip:optuna_hypergrad"]  # noqa: RUF012

    @staticmethod
    def get_next(stop_val: int) -> int:
        return stop_val + 1

    def set_objective(
        self,
        f_inner: Callable[..., Any],
        f_outer: Callable[..., Any],
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: Any,
        outer_var0: Any,
        **others: Any,
    ) -> None:
        """Args as the benchmark gives them; ``others`` (its full-batch functions) are not used."""
        sizes = [
            n if self.batch_size == "full" else min(int(self.batch_size), n)
            for n in (n_inner_samples, n_outer_samples)
        ]
        starts = [
            functools.partial(_start, n, size, (int(self.random_state), salt))
            for salt, (n, size) in enumerate(
                zip((n_inner_samples, n_outer_samples), sizes, strict=True)
            )
        ]
        objectives = JaxObjective(f_inner, sizes[0]), JaxObjective(f_outer, sizes[1])
        self.problem = ohg.BilevelProblem(*objectives, *starts)
        self.start = {"w": _tensor(inner_var0)}, {"lam": _tensor(outer_var0)}
        self.run_once(2)  # compiles

    def run(self, callback: Callable[[], bool]) -> None:
        w, lam = self.start
        estimator, state, step = METHODS[self.method](), EstimatorState(), 0
        solver = ohg.GradientDescent(lambda _, t: self.step_size * (1 + t) ** -0.5, max_steps=1)
        if "step_size" in type(estimator).__dataclass_fields__:
            estimator = type(estimator)(step_size=lambda t: self.step_size * (1 + t) ** -0.5)
        estimator.check(self.problem, solver, w, lam)
        self.inner_var, self.outer_var = (_array(x) for x in (w["w"], lam["lam"]))
        while callback():
            for _ in range(self.eval_freq):
                found = estimator.estimate(self.problem, solver, w, lam, step, state)
                found.result.raise_if_failed()
                lr = self.step_size / self.outer_ratio * (1 + step) ** -0.5
                lam = {"lam": lam["lam"].detach() - lr * found.value["lam"]}
                w, state, step = found.inner_params, found.state, step + 1
            self.inner_var, self.outer_var = _array(w["w"]), _array(lam["lam"])

    def get_result(self) -> dict[str, Any]:
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}


def _start(num_samples: int, batch_size: int, key: tuple[int, int], step: int) -> int:
    """Where the batch of a step begins: batches in an order that is drawn anew for each epoch."""
    batches = max(1, num_samples // batch_size)
    epoch, place = divmod(step, batches)
    order = np.random.default_rng((*key, epoch)).permutation(batches)
    return int(order[place]) * batch_size
