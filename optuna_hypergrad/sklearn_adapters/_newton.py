"""Logistic regression by Newton's method with the whole Hessian, and the derivative of its optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._errors import SolverError
from .._results import Result, Status

MAX_STEPS = 100


@dataclass(frozen=True)
class LogisticProblem:
    """``sum of s_i loss_i(x_i theta) / sum of s_i + |weights|^2 / (2 C sum of s_i)``, as scikit-learn's ``LogisticRegression``.

    Attributes:
        x: ``(n, p)``, with a last column of ones where there is an intercept.
        targets: ``(n, k)``, one-hot; ``k = 1`` for two classes: the second one.
        weights: ``s``, ``(n,)``.
        c: ``C``, 0-d.
        num_penalized: ``p`` without the intercept.
    """

    x: Tensor
    targets: Tensor
    weights: Tensor
    c: Tensor
    num_penalized: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of ``theta``, ``(p, k)``."""
        return self.x.shape[1], self.targets.shape[1]

    def value(self, theta: Tensor) -> Tensor:
        log_p = log_probabilities(theta, self.x)
        if theta.shape[1] == 1:
            each = -torch.where(self.targets[:, 0] > 0, log_p[:, 1], log_p[:, 0])
        else:
            each = -(log_p * self.targets).sum(1)
        square = theta[: self.num_penalized].square().sum()
        return (self.weights @ each + square / (2 * self.c)) / self.weights.sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """By ``theta``, ``(p, k)``; with a graph to the data, the weights and ``C`` where they have one."""
        error = self._probabilities(theta) - self.targets
        penalty = torch.cat([theta[: self.num_penalized] / self.c, theta[self.num_penalized :] * 0])
        return (self.x.mT @ (self.weights[:, None] * error) + penalty) / self.weights.sum()

    def hessian(self, theta: Tensor) -> Tensor:
        """``(k p, k p)``, ``theta`` in the order of its columns.

        For several classes, a constant added to all intercepts changes nothing; the square of their sum is added to the
        Hessian, which is zero at the optimum that Newton's method finds from a sum of zero.
        """
        p, k = self.shape
        total = self.weights.sum()
        probabilities = self._probabilities(theta)
        penalty = torch.zeros(p, dtype=theta.dtype)
        penalty[: self.num_penalized] = 1 / (self.c * total)
        scaled = (self.weights / total)[:, None] * probabilities
        hessian = theta.new_empty(k, p, k, p)
        for i in range(k):
            for j in range(i, k):
                curvature = scaled[:, i] * (float(i == j) - probabilities[:, j])
                block = self.x.mT @ (curvature[:, None] * self.x)
                hessian[i, :, j] = block
                hessian[j, :, i] = block
            hessian[i, :, i] += penalty.diag()
        if k > 1 and p > self.num_penalized:
            hessian[:, -1, :, -1] += 1.0
        return hessian.reshape(k * p, k * p)

    def _probabilities(self, theta: Tensor) -> Tensor:
        return log_probabilities(theta, self.x).exp()[:, -self.targets.shape[1] :]


def log_probabilities(theta: Tensor, x: Tensor) -> Tensor:
    """``(m, classes)``."""
    z = x @ theta
    if theta.shape[1] == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    return torch.log_softmax(z, 1)


class LogisticOptimum(torch.autograd.Function):
    """``(x, targets, weights, C, num_penalized, start) -> theta``, ``(p, k)``; differentiable once, in all but targets."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
        c: Tensor,
        num_penalized: int,
        start: Tensor | None,
    ) -> Tensor:
        problem = LogisticProblem(x, targets, weights, c, num_penalized)
        # Far off, a warm start has probabilities that are rounded to 0 and 1, and zero is nearer.
        starts = [torch.zeros(problem.shape, dtype=x.dtype)]
        starts = starts if start is None else [start, *starts]
        found = next((f for s in starts if (f := _solved(problem, s)) is not None), None)
        if found is None:
            message = (
                f"A logistic regression at C={float(c):.3g} could not be solved: its Hessian is not positive definite to "
                f"rounding, or {MAX_STEPS} Newton steps were not enough. Lower the upper bound of C, or scale the features."
            )
            raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))
        theta, factor = found
        ctx.save_for_backward(x, targets, weights, c, theta, factor)
        ctx.num_penalized = num_penalized
        return theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient is zero at the optimum, whatever the arguments: ``d theta = -H^-1 d gradient``."""
        x, targets, weights, c, theta, factor = ctx.saved_tensors
        v = _times_inverse(factor, cotangent)
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        leaves = [
            t.detach().requires_grad_(w) for t, w in zip((x, weights, c), wanted, strict=True)
        ]
        with torch.enable_grad():
            problem = LogisticProblem(leaves[0], targets, leaves[1], leaves[2], ctx.num_penalized)
            product = -(v * problem.gradient(theta)).sum()
            needed = [t for t in leaves if t.requires_grad]
            slopes = iter(torch.autograd.grad(product, needed))
        by_x, by_weights, by_c = (next(slopes) if w else None for w in wanted)
        return by_x, None, by_weights, by_c, None, None


def _solved(problem: LogisticProblem, theta: Tensor) -> tuple[Tensor, Tensor] | None:
    """The optimum, and the Cholesky factor of the Hessian there; ``None`` if Newton's method fails from ``theta``."""
    value, num_last = problem.value(theta), 0
    for _ in range(MAX_STEPS):
        factor, failed = torch.linalg.cholesky_ex(problem.hessian(theta))
        if failed:
            return None
        gradient = problem.gradient(theta)
        step = _times_inverse(factor, gradient)
        decrease = float((gradient * step).sum())
        if decrease <= 1e-8 * float(value):  # so close that errors are squared at each step
            num_last += 1
            theta = theta - step
            if num_last == 3:
                return theta, factor
            continue
        length = 1.0
        while True:
            moved = theta - length * step
            new = problem.value(moved)
            if bool(new <= value - 1e-4 * length * decrease) or length < 1e-8:
                break
            length /= 2
        theta, value = moved, new
    return None


def _times_inverse(factor: Tensor, vector: Tensor) -> Tensor:
    """``H^-1`` times what has the shape of ``theta``."""
    p, k = vector.shape
    return torch.cholesky_solve(vector.mT.reshape(-1, 1), factor).view(k, p).mT
