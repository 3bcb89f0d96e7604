"""Support vector machines solved to rounding: libsvm comes close, a linear system gives the free support vectors.

A machine is ``f(x) = sum_e beta_e k(x_row(e), x) + b`` with ``low <= beta <= high`` and ``sum beta = 0``. Of the residual
``r_e = target_e - f(x_row(e))``, which is zero where ``beta_e`` is free, at most zero where it is at its lower bound, and at
least zero at its upper one, are made:

* classification: an entry for each sample, target ``y`` in {-1, 1}, bounds 0 and ``y C``;
* regression: two for each sample, ``y - epsilon`` with bounds 0 and ``C``, and ``y + epsilon`` with ``-C`` and 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack  # type: ignore[import-untyped]
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status

_JITTER = 1e-13
"""Of the kernel's size: what tells samples apart that are the same."""


@dataclass(frozen=True)
class Machine:
    """The dual problem, differentiable in all of its tensors.

    Attributes:
        kernel: ``(n, n)``.
        rows: ``(N,)``: the sample of each entry.
        target, low, high: ``(N,)``.
    """

    kernel: Tensor
    rows: np.ndarray
    target: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class LU:
    """A symmetric matrix of order ``n``, factorized by LAPACK."""

    factor: np.ndarray
    pivots: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> LU:
        """Of a matrix that is lost."""
        factor, pivots, _ = lapack.dgetrf(matrix.T, overwrite_a=1)
        return cls(factor, pivots)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """As torch's functions take it."""
        return torch.as_tensor(self.factor), torch.as_tensor(self.pivots + 1)

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """``(n,)``."""
        found: np.ndarray = lapack.dgetrs(self.factor, self.pivots, rhs)[0]
        return found


def solved(machine: Machine, start: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """The solution with a graph: one Newton step from it, the Hessian held fixed, which has the derivative of the implicit
    function (Chapelle, Vapnik, Bousquet & Mukherjee 2002, "Choosing multiple parameters for support vector machines").

    Args:
        machine: The problem.
        start: ``(N,)``, feasible, best close to the solution.

    Returns:
        ``beta`` ``(N,)``, ``b``, and ``beta`` as an array, the next start.

    Raises:
        SolverError: if there is none to be found.
    """
    arrays = Arrays.of(machine)
    beta, free, at_high = active_set(arrays, start)
    bound = torch.where(torch.as_tensor(at_high), machine.high, machine.low)
    if not free.any():
        return _without_free(machine, arrays, beta, bound)
    factor = arrays.factor(free)
    found = arrays.on(free, beta, factor)
    beta = beta.copy()
    beta[free] = found[:-1]
    mask = torch.as_tensor(free)
    held = torch.where(mask, torch.as_tensor(beta), bound)
    each = held.new_zeros(len(machine.kernel)).index_add(0, torch.as_tensor(machine.rows), held)
    products = (machine.kernel @ each)[torch.as_tensor(machine.rows[free])]
    left = products + float(found[-1]) - machine.target[mask]
    residual = torch.cat([left, held.sum().reshape(1)])
    step = torch.linalg.lu_solve(*factor.tensors, residual.unsqueeze(1)).squeeze(1)
    moved = torch.zeros_like(held).masked_scatter(mask, step[:-1])
    return held - moved, float(found[-1]) - step[-1], beta


def _without_free(
    machine: Machine, arrays: Arrays, beta: np.ndarray, bound: Tensor
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Any ``b`` of an interval will do, and libsvm takes its middle."""
    least, most = arrays.ends(beta)
    ends = [
        machine.target[e] - machine.kernel[machine.rows[e]][machine.rows] @ bound
        for e in (least, most)
        if e is not None
    ]
    return bound, torch.stack(ends).mean(), beta


class Arrays:
    """A machine's numbers, without a graph."""

    def __init__(self, kernel: np.ndarray, rows: np.ndarray, *vectors: np.ndarray) -> None:
        self.kernel, self.rows = kernel, rows
        self.target, self.low, self.high = vectors

    @classmethod
    def of(cls, machine: Machine) -> Arrays:
        vectors = (machine.target, machine.low, machine.high)
        return cls(
            machine.kernel.detach().numpy(), machine.rows, *(v.detach().numpy() for v in vectors)
        )

    def products(self, beta: np.ndarray) -> np.ndarray:
        """``f - b`` for each entry."""
        found: np.ndarray = (self.kernel @ self.each(beta))[self.rows]
        return found

    def each(self, beta: np.ndarray) -> np.ndarray:
        """The sum of the entries of each sample, ``(n,)``."""
        found: np.ndarray = np.bincount(self.rows, beta, minlength=len(self.kernel))
        return found

    def factor(self, free: np.ndarray) -> LU:
        """Of the conditions on free entries and ``b``."""
        rows = self.rows[free]
        size = len(rows)
        matrix = np.ones((size + 1, size + 1))
        matrix[:size, :size] = self.kernel[np.ix_(rows, rows)]
        largest = max(float(matrix.diagonal()[:size].max()), 1e-300)
        matrix[np.arange(size), np.arange(size)] += _JITTER * largest
        matrix[size, size] = 0.0
        return LU.of(matrix)

    def on(self, free: np.ndarray, beta: np.ndarray, factor: LU) -> np.ndarray:
        """Free entries and ``b`` that satisfy the conditions, others as in ``beta``."""
        fixed = np.where(free, 0.0, beta)
        side = np.append((self.target - self.products(fixed))[free], -fixed.sum())
        return factor.solve(side)

    def ends(self, beta: np.ndarray) -> tuple[int | None, int | None]:
        """Entries that bound ``b`` most from below and from above, where all are at their bounds."""
        each = self.target - self.products(beta)  # b if the residual were zero
        below, above = beta < self.high, beta > self.low  # residual <= 0: b >= each, and >= 0
        least = int(np.flatnonzero(below)[np.argmax(each[below])]) if below.any() else None
        most = int(np.flatnonzero(above)[np.argmin(each[above])]) if above.any() else None
        return least, most


def active_set(arrays: Arrays, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The solution, which entries are free, and which are at their upper bounds.

    The conditions of a set of free entries are solved; one that would leave its bounds stays at them, the one whose residual
    has the wrong sign most is freed, and so on: each step lowers the objective.
    """
    rounding = 1e-11 * (arrays.high - arrays.low)
    beta = np.where(start <= arrays.low + rounding, arrays.low, start)
    beta = np.where(beta >= arrays.high - rounding, arrays.high, beta)
    free = (beta > arrays.low) & (beta < arrays.high)
    movable = arrays.low < arrays.high
    for _ in range(100 + 4 * len(beta)):
        if free.any():
            found = arrays.on(free, beta, arrays.factor(free))
            here, there = beta[free], found[:-1]
            low, high = arrays.low[free], arrays.high[free]
            outside = (there <= low + rounding[free]) | (there >= high - rounding[free])
            if outside.any():
                wall = np.where(there - low < high - there, low, high)
                moves = np.where(there == here, 1.0, there - here)[outside]
                shares = ((wall - here)[outside] / moves).clip(min=0.0)
                step = min(float(shares.min()), 1.0)
                beta[free] = (here + step * (there - here)).clip(low, high)
                blocked = np.flatnonzero(free)[outside][shares <= step]
                beta[blocked] = wall[outside][shares <= step]
                free[blocked] = False
                continue
            beta[free], b = there, found[-1]
            each = arrays.products(beta)
            residual = arrays.target - each - b
            wrong = np.where(beta <= arrays.low, residual, -residual)
            wrong[free | ~movable] = 0.0
            scale = np.abs(arrays.target).max() + np.abs(each).max() + abs(b)
            worst = int(np.argmax(wrong))
            if wrong[worst] <= 1e-10 * scale:
                return beta, free, beta >= arrays.high
            free[worst] = True
            continue
        least, most = arrays.ends(beta)
        if least is None or most is None:
            return beta, free, beta >= arrays.high
        each = arrays.target - arrays.products(beta)
        if each[least] - each[most] <= 1e-10 * (np.abs(each).max() + 1e-300):
            return beta, free, beta >= arrays.high
        free[[least, most]] = True
    message = (
        "A support vector machine could not be solved: which samples are free support vectors did not settle. Lower the upper "
        "bound of C, raise the lower bound of gamma, or scale the features."
    )
    raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))
