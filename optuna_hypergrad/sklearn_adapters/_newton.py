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
    """``mean of s_i loss_i(x_i theta) + |weights|^2 / (2 n C)``, in the order of scikit-learn's ``LogisticRegression``.

    Attributes:
        x: ``(n, p)``, with a last column of ones where there is an intercept.
        targets: ``(n, k)``, one-hot; ``k = 1`` for two classes: the second one.
        weights: ``s``, ``(n,)``.
        num_penalized: ``p`` without the intercept.
    """

    x: Tensor
    targets: Tensor
    weights: Tensor
    num_penalized: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of ``theta``, ``(p, k)``."""
        return self.x.shape[1], self.targets.shape[1]

    def log_probabilities(self, theta: Tensor, x: Tensor) -> Tensor:
        """``(m, classes)``."""
        z = x @ theta
        if theta.shape[1] == 1:
            z = torch.cat([torch.zeros_like(z), z], 1)
        return torch.log_softmax(z, 1)

    def value(self, theta: Tensor, c: Tensor) -> Tensor:
        log_p = self.log_probabilities(theta, self.x)
        if theta.shape[1] == 1:
            each = -torch.where(self.targets[:, 0] > 0, log_p[:, 1], log_p[:, 0])
        else:
            each = -(log_p * self.targets).sum(1)
        square = theta[: self.num_penalized].square().sum()
        return (self.weights @ each + square / (2 * c)) / self.weights.sum()

    def derivatives(self, theta: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(p, k)`` and Hessian ``(k p, k p)``, ``theta`` in the order of its columns.

        For several classes, a constant added to all intercepts changes nothing; the square of their sum is added to the
        Hessian, which is zero at the optimum that Newton's method finds from a sum of zero.
        """
        p, k = self.shape
        total = self.weights.sum()
        probabilities = self.log_probabilities(theta, self.x).exp()[:, -k:]
        penalty = torch.zeros(p, dtype=theta.dtype)
        penalty[: self.num_penalized] = 1 / (c * total)
        error = (self.weights / total)[:, None] * (probabilities - self.targets)
        gradient = self.x.mT @ error + penalty[:, None] * theta
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
        return gradient, hessian.reshape(k * p, k * p)


class LogisticOptimum(torch.autograd.Function):
    """``(problem, C, start) -> theta``, ``(p, k)``; differentiable once, with respect to ``C``."""

    @staticmethod
    def forward(ctx: Any, problem: LogisticProblem, c: Tensor, start: Tensor | None) -> Tensor:
        theta = torch.zeros(problem.shape, dtype=problem.x.dtype) if start is None else start
        p, k = problem.shape
        value, num_last = problem.value(theta, c), 0
        for _ in range(MAX_STEPS):
            gradient, hessian = problem.derivatives(theta, c)
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if failed:
                break
            step = torch.cholesky_solve(gradient.mT.reshape(-1, 1), factor).view(k, p).mT
            decrease = float((gradient * step).sum())
            if decrease <= 1e-8 * float(value):  # so close that errors are squared at each step
                num_last += 1
                theta = theta - step
                if num_last == 3:
                    ctx.save_for_backward(theta, factor, c)
                    ctx.problem = problem
                    return theta
                continue
            length = 1.0
            while True:
                moved = theta - length * step
                new = problem.value(moved, c)
                if bool(new <= value - 1e-4 * length * decrease) or length < 1e-8:
                    break
                length /= 2
            theta, value = moved, new
        message = (
            f"A logistic regression at C={float(c):.3g} could not be solved: its Hessian is not positive definite to rounding, "
            f"or {MAX_STEPS} Newton steps were not enough. Lower the upper bound of C, or scale the features."
        )
        raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, None]:
        theta, factor, c = ctx.saved_tensors
        problem: LogisticProblem = ctx.problem
        p, k = problem.shape
        v = torch.cholesky_solve(cotangent.mT.reshape(-1, 1), factor).view(k, p).mT
        n = problem.num_penalized
        # d gradient / dC = -theta / (C^2 sum s)
        return None, (v[:n] * theta[:n]).sum() / (c.square() * problem.weights.sum()), None
