"""Logistic regression of many unknowns: Newton's method without the whole Hessian, by preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status

MAX_BLOCK_ENTRIES = 4_000_000
"""Of a preconditioner with a block per class, 32 MB; beyond, it is the diagonal."""

_MAX_STEPS = 100
_MAX_CG_STEPS = 2000
_ACCURATE, _ROUGH = 1e-9, 1e-2
"""Of the root of what a Newton step would gain, relative to that of the value."""

_ADJOINT_RTOL = 1e-9
_MANY = 4.0
"""Products for each digit of a linear solve after which the preconditioner is made anew."""


@dataclass(frozen=True)
class SoftmaxHessian:
    """The Hessian at an optimum or on the way there, as products with it.

    For several classes, adding the same vector to the weights of all of them changes probabilities not at all. Everything here
    is of zero mean over the classes, where the Hessian is positive definite, with or without an intercept.

    Attributes:
        x: ``(n, p)``.
        probabilities: ``(n, k)``; of two classes, of the second one, ``k = 1``.
        scaled: Times each sample's share of the weights.
        penalty: ``(p,)``.
    """

    x: Tensor
    probabilities: Tensor
    scaled: Tensor
    penalty: Tensor

    def times(self, v: Tensor) -> Tensor:
        """``(p, k)``."""
        z = self.scaled * (self.x @ v)
        found: Tensor = self.x.mT @ (z - self.probabilities * z.sum(1, keepdim=True))
        return found.addcmul_(self.penalty[:, None], v)

    def blocks(self) -> Tensor:
        """Of each class, without the penalty, ``(k, p, p)``; the diagonals, ``(k, p)``, where these are too many."""
        curvature = (self.scaled * (1 - self.probabilities)).mT  # (k, n)
        if blocks_fit(self.x.shape[1], len(curvature)):
            return torch.stack([self.x.mT @ (c[:, None] * self.x) for c in curvature])
        return curvature @ self.x.square()


def blocks_fit(p: int, k: int) -> bool:
    """Whether a preconditioner may have a block per class."""
    return k * p * p <= MAX_BLOCK_ENTRIES


class Preconditioner:
    """The Hessian's blocks of each class, from some earlier point, with the penalty of now.

    Args:
        blocks: Of :meth:`SoftmaxHessian.blocks`.
        penalty: ``(p,)``.
    """

    def __init__(self, blocks: Tensor, penalty: Tensor) -> None:
        self._inverse: Tensor
        if blocks.dim() == 2:
            self._inverse = 1 / (blocks + penalty).clamp(min=1e-300).mT
            return
        matrix = blocks.clone()
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.add_(penalty)
        diagonal.add_(1e-12 * diagonal.amax(1, keepdim=True))  # blocks at rounded probabilities
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            self._inverse = 1 / diagonal.clamp(min=1e-300).mT
        else:
            self._inverse = torch.cholesky_inverse(factor)

    def __call__(self, v: Tensor) -> Tensor:
        if self._inverse.dim() == 2:
            z = self._inverse * v
        else:
            z = (self._inverse @ v.mT.unsqueeze(2)).squeeze(2).mT
        return centered(z)


def centered(v: Tensor) -> Tensor:
    """Of zero mean over several classes."""
    return v - v.mean(1, keepdim=True) if v.shape[1] > 1 else v


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    preconditioner: Callable[[Tensor], Tensor],
    rhs: Tensor,
    rtol: float,
    start: Tensor | None = None,
) -> tuple[Tensor, int, bool]:
    """``A^-1 rhs``, the number of products, and whether its residual is below ``rtol`` in the norm of the preconditioner.

    Reference: Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving linear systems".
    """
    found, residual = torch.zeros_like(rhs), rhs.clone()
    z = preconditioner(residual)
    enough = rtol**2 * float((residual * z).sum())
    if start is not None:
        found = start.clone()
        residual -= product(found)
        z = preconditioner(residual)
    direction, size = z, float((residual * z).sum())
    for count in range(_MAX_CG_STEPS):
        if size <= enough:
            return found, count, True
        bent = product(direction)
        curvature = float((direction * bent).sum())
        if not curvature > 0:
            return found, count, False
        length = size / curvature
        found.add_(direction, alpha=length)
        residual.sub_(bent, alpha=length)
        z = preconditioner(residual)
        new = float((residual * z).sum())
        direction = z + (new / size) * direction
        size = new
    return found, _MAX_CG_STEPS, False


@dataclass(frozen=True)
class InverseByProducts:
    """The inverse of the Hessian at an optimum.

    Attributes:
        hessian: There.
        preconditioner: Of it.
        memory: Of the fold: the last solution is where the next one begins.
    """

    hessian: SoftmaxHessian
    preconditioner: Preconditioner
    memory: dict[str, Any]

    def __call__(self, v: Tensor) -> Tensor:
        """``H^-1 v``, ``(p, k)``.

        Raises:
            SolverError: if conjugate gradients do not get there.
        """
        found, _, good = conjugate_gradients(
            self.hessian.times,
            self.preconditioner,
            centered(v),
            _ADJOINT_RTOL,
            self.memory.get("adjoint"),
        )
        if not good:
            raise _failure("the linear system of its hypergradient did not converge")
        self.memory["adjoint"] = found
        return found


def solved_by_products(
    problem: Any, start: Tensor, memory: dict[str, Any]
) -> tuple[Tensor, InverseByProducts] | None:
    """The optimum of a :class:`LogisticProblem` and the inverse Hessian there; ``None`` if Newton's method fails from ``start``.

    Each step is solved as far as it pays (Dembo, Eisenstat & Steihaug 1982, "Inexact Newton methods").

    Args:
        problem: To solve.
        start: ``(p, k)``.
        memory: Of the fold: blocks of the preconditioner, made anew where they have aged, and whether ``"rough"`` will do.
    """
    accurate = _ROUGH if memory.get("rough") else _ACCURATE
    here, last = _Point.of(problem, centered(start)), math.inf
    preconditioner = None
    for _ in range(_MAX_STEPS):
        hessian, gradient = here.hessian(), here.gradient()
        if preconditioner is None:
            preconditioner = Preconditioner(_blocks(hessian, memory), hessian.penalty)
        size = float((gradient * preconditioner(gradient)).sum())
        distance = math.sqrt(max(size, 0.0) / max(here.value, 1e-300))
        if not math.isfinite(distance):
            return None
        if distance <= accurate or (distance <= 1e-6 and distance > 0.5 * last):
            return here.theta, InverseByProducts(hessian, preconditioner, memory)
        last = distance
        rtol = min(0.3, max(distance, 1e-5))
        step, count, _ = conjugate_gradients(hessian.times, preconditioner, gradient, rtol)
        decrease, length = float((gradient * step).sum()), 1.0
        if not decrease > 0:
            return None
        while True:
            ahead = _Point.of(problem, here.theta - length * step)
            close = decrease <= 1e-8 * here.value  # the difference of two values is rounding
            enough = here.value - 1e-4 * length * decrease
            if close or ahead.value <= enough or length < 1e-8:
                break
            length /= 2
        here = ahead
        if count > _MANY * (1 - math.log10(rtol)):
            memory["blocks"], preconditioner = hessian.blocks(), None
    return None


def _blocks(hessian: SoftmaxHessian, memory: dict[str, Any]) -> Tensor:
    """Of the preconditioner: what the fold has, or a neighbor, most of whose samples are the same."""
    p, k = hessian.x.shape[1], hessian.scaled.shape[1]
    for known in (memory, memory.get("neighbor", {})):
        blocks: Tensor | None = known.get("blocks")
        if blocks is not None and (len(blocks), blocks.shape[-1]) == (k, p):
            memory["blocks"] = blocks
            return blocks
    memory["blocks"] = blocks = hessian.blocks()
    return blocks


@dataclass(frozen=True)
class _Point:
    """A point on the way, with the logarithms of its probabilities, ``(n, classes)``."""

    problem: Any
    theta: Tensor
    log_p: Tensor
    value: float

    @classmethod
    def of(cls, problem: Any, theta: Tensor) -> _Point:
        log_p = problem.log_probabilities(theta)
        return cls(problem, theta, log_p, float(problem.value(theta, log_p)))

    def gradient(self) -> Tensor:
        shares = self.problem.shares()
        error = shares[:, None] * (self._probabilities() - self.problem.targets)
        penalty = self.problem.penalty()[:, None]
        return torch.addcmul(self.problem.x.mT @ error, penalty, self.theta)

    def hessian(self) -> SoftmaxHessian:
        probabilities = self._probabilities()
        scaled = self.problem.shares()[:, None] * probabilities
        return SoftmaxHessian(self.problem.x, probabilities, scaled, self.problem.penalty())

    def _probabilities(self) -> Tensor:
        return self.log_p[:, -self.theta.shape[1] :].exp()


def _failure(why: str) -> SolverError:
    message = f"A logistic regression could not be solved: {why}. Lower the upper bound of C, or scale the features."
    return SolverError(message, Result(Status.MAX_STEPS_REACHED, message))
