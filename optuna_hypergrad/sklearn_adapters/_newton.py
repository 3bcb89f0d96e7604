"""Logistic regression by Newton's method with the whole Hessian, and the derivative of its optimum."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._errors import SolverError
from .._results import Result, Status
from ._newton_cg import solved_by_products

MAX_STEPS = 100

MAX_AT_ONCE = 2_000_000
"""Entries of what makes a Hessian by one product of matrices, 16 MB; of more, it is made block by block."""

MAX_DENSE = 200
"""Unknowns whose Hessian is a matrix; of more, it is a product."""


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

    def log_probabilities(self, theta: Tensor) -> Tensor:
        """Of all classes, ``(n, classes)``."""
        return log_probabilities(theta, self.x)

    def value(self, theta: Tensor, log_p: Tensor | None = None) -> Tensor:
        """At ``theta``, whose log probabilities may be known."""
        log_p = self.log_probabilities(theta) if log_p is None else log_p
        if theta.shape[1] == 1:
            each = -torch.where(self.targets[:, 0] > 0, log_p[:, 1], log_p[:, 0])
        else:
            each = -(log_p * self.targets).sum(1)
        square = theta[: self.num_penalized].square().sum()
        return (self.weights @ each + square / (2 * self.c)) / self.weights.sum()

    def gradient(self, theta: Tensor, log_p: Tensor | None = None) -> Tensor:
        """By ``theta``, ``(p, k)``; with a graph to the data, the weights and ``C`` where they have one."""
        error = self.probabilities(theta, log_p) - self.targets
        penalty = torch.cat([theta[: self.num_penalized] / self.c, theta[self.num_penalized :] * 0])
        return (self.x.mT @ (self.weights[:, None] * error) + penalty) / self.weights.sum()

    def shares(self) -> Tensor:
        """Of each sample in the loss, ``(n,)``."""
        return self.weights / self.weights.sum()

    def penalty(self) -> Tensor:
        """Of each row of ``theta``, ``(p,)``."""
        found = self.x.new_zeros(self.shape[0])
        found[: self.num_penalized] = 1 / (self.c.detach() * self.weights.detach().sum())
        return found

    def best_of(self, starts: list[Tensor]) -> list[Tensor]:
        """The one of the lowest finite value, in a list, if there is one."""
        if len(starts) < 2:
            return starts
        values = [float(self.value(s)) for s in starts]
        lowest = min(values, key=lambda v: v if math.isfinite(v) else math.inf)
        return [starts[values.index(lowest)]] if math.isfinite(lowest) else []

    def hessian(self, theta: Tensor, log_p: Tensor | None = None) -> Tensor:
        """``(k p, k p)``, ``theta`` in the order of its columns.

        For several classes, a constant added to all intercepts changes nothing; the square of their sum is added to the
        Hessian, which is zero at the optimum that Newton's method finds from a sum of zero.
        """
        (p, k), n = self.shape, len(self.x)
        probabilities = self.probabilities(theta, log_p)
        scaled = self.shares()[:, None] * probabilities
        if n * k * k * p <= MAX_AT_ONCE:
            curvature = scaled.diag_embed() - scaled[:, :, None] * probabilities[:, None, :]
            columns = curvature.reshape(n, k * k, 1) * self.x[:, None, :]
            found = (self.x.mT @ columns.reshape(n, -1)).view(
                p, k, k, p
            )  # row, and then i, j, column
            hessian = found.permute(1, 0, 2, 3).contiguous()
        else:
            hessian = theta.new_empty(k, p, k, p)
            for i in range(k):
                for j in range(i, k):
                    curvature = scaled[:, i] * (float(i == j) - probabilities[:, j])
                    block = self.x.mT @ (curvature[:, None] * self.x)
                    hessian[i, :, j] = block
                    hessian[j, :, i] = block
        if k > 1 and p > self.num_penalized:
            hessian[:, -1, :, -1] += 1.0
        matrix = hessian.view(k * p, k * p)
        matrix.diagonal().add_(self.penalty().repeat(k))
        return matrix

    def probabilities(self, theta: Tensor, log_p: Tensor | None = None) -> Tensor:
        """Of the classes that have a column, ``(n, k)``."""
        log_p = self.log_probabilities(theta) if log_p is None else log_p
        return log_p[:, -self.targets.shape[1] :].exp()


def log_probabilities(theta: Tensor, x: Tensor) -> Tensor:
    """``(m, classes)``."""
    z = x @ theta
    if theta.shape[1] == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    return torch.log_softmax(z, 1)


class LogisticOptimum(torch.autograd.Function):
    """``(x, targets, weights, C, num_penalized, starts, memory) -> theta``, ``(p, k)``; differentiable once, in all tensors but
    targets.

    Of ``starts``, the one of the lowest value is taken; zero is tried where it fails.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
        c: Tensor,
        num_penalized: int,
        starts: list[Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        problem = LogisticProblem(x, targets, weights, c, num_penalized)
        # Far off, a warm start has probabilities that are rounded to 0 and 1, and zero is nearer.
        tried = [*problem.best_of(starts), torch.zeros(problem.shape, dtype=x.dtype)]
        p, k = problem.shape
        solve = (
            _solved if p * k <= MAX_DENSE else functools.partial(solved_by_products, memory=memory)
        )
        found = next((f for s in tried if (f := solve(problem, s)) is not None), None)
        if found is None:
            raise unsolved(float(c))
        theta, ctx.inverse = found
        ctx.save_for_backward(x, targets, weights, c, theta)
        ctx.num_penalized = num_penalized
        return theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient is zero at the optimum, whatever the arguments: ``d theta = -H^-1 d gradient``."""
        x, targets, weights, c, theta = ctx.saved_tensors
        v = ctx.inverse(cotangent)
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if wanted == [False, False, True]:
            penalized = slice(ctx.num_penalized)
            by_c = (v[penalized] * theta[penalized]).sum() / (c.square() * weights.sum())
            return None, None, None, by_c, None, None, None
        leaves = [
            t.detach().requires_grad_(w) for t, w in zip((x, weights, c), wanted, strict=True)
        ]
        with torch.enable_grad():
            problem = LogisticProblem(leaves[0], targets, leaves[1], leaves[2], ctx.num_penalized)
            product = -(v * problem.gradient(theta)).sum()
            needed = [t for t in leaves if t.requires_grad]
            slopes = iter(torch.autograd.grad(product, needed))
        by_x, by_weights, by_c = (next(slopes) if w else None for w in wanted)
        return by_x, None, by_weights, by_c, None, None, None


def unsolved(c: float) -> SolverError:
    """What to say of a regression at ``C``."""
    message = (
        f"A logistic regression at C={c:.3g} could not be solved: its Hessian is not positive definite to "
        f"rounding, or {MAX_STEPS} Newton steps were not enough. Lower the upper bound of C, or scale the features."
    )
    return SolverError(message, Result(Status.MAX_STEPS_REACHED, message))


def _solved(
    problem: LogisticProblem, theta: Tensor, rough: bool = False
) -> tuple[Tensor, InverseByFactor] | None:
    """The optimum, and the inverse of the Hessian there; ``None`` if Newton's method fails from ``theta``.

    The Hessian is that of a point whose distance is the root of the optimum's rounding.
    """
    close = 1e-6 if rough else 1e-8  # so close that errors are squared at each step
    log_p, num_last = problem.log_probabilities(theta), 0
    value = float(problem.value(theta, log_p))
    for _ in range(MAX_STEPS):
        factor, failed = torch.linalg.cholesky_ex(problem.hessian(theta, log_p))
        if failed:
            return None
        inverse = InverseByFactor(factor)
        gradient = problem.gradient(theta, log_p)
        step = inverse(gradient)
        decrease, length = float((gradient * step).sum()), 1.0
        if decrease <= close * value:
            num_last += 1
            theta = theta - step
            if rough or num_last == 2:
                return theta, inverse
            log_p = problem.log_probabilities(theta)
            continue
        while True:
            moved = theta - length * step
            log_p = problem.log_probabilities(moved)
            new = float(problem.value(moved, log_p))
            if new <= value - 1e-4 * length * decrease or length < 1e-8:
                break
            length /= 2
        theta, value = moved, new
    return None


@dataclass(frozen=True)
class InverseByFactor:
    """The inverse of the Hessian at an optimum, by its Cholesky factor ``(k p, k p)``."""

    factor: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """``H^-1 v``, ``(p, k)``."""
        p, k = v.shape
        return torch.cholesky_solve(v.mT.reshape(-1, 1), self.factor).view(k, p).mT
