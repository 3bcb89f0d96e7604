"""Support vector regression of a fold in arrays, and the slopes of what it predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._machines import regressor_start
from ._plain import radial
from ._support_vectors import LU, Arrays, active_set


@dataclass(frozen=True)
class RegressorFit:
    """Predictions ``k(x_test, x) a + b``, ``a`` the sum of the two entries ``beta`` of each sample.

    On free entries the residual is zero, ``K a + b = y -+ epsilon``, and others are at bounds that are 0 or ``+-C s``. A slope ``q`` by the
    predictions has the adjoint ``(v, v_b)``, ``M (v, v_b) = (K_test^T q on free entries, sum of q)`` with the same matrix ``M`` as of a
    Newton step (Chapelle, Vapnik, Bousquet & Mukherjee 2002, section 4.2).

    Attributes:
        among, across: What the kernels are the exponentials of, times ``gamma``; the kernels themselves where it is ``None``.
        kernel, seen: ``(n, n)`` and ``(m, n)``.
        rows: Samples of the free entries.
        signs: -1 where a free entry is of the upper edge, of ``y - epsilon``, else 1.
        each: ``a``, ``(n,)``.
        bound: The part of it at bounds, ``(n,)``.
        constant: ``b``.
        factor: Of ``M``.
        gamma: Of the kernel.
    """

    among: np.ndarray
    across: np.ndarray
    kernel: np.ndarray
    seen: np.ndarray
    rows: np.ndarray
    signs: np.ndarray
    each: np.ndarray
    bound: np.ndarray
    constant: float
    factor: LU
    gamma: float | None

    @classmethod
    def of(
        cls,
        among: np.ndarray,
        across: np.ndarray,
        gamma: float | None,
        y: np.ndarray,
        most: np.ndarray,
        epsilon: float,
    ) -> RegressorFit | None:
        """``None`` where no entry is free.

        Raises:
            SolverError: if there is no solution to be found.
        """
        kernel, seen = among, across
        if gamma is not None:
            kernel, seen = radial(among, gamma), radial(across, gamma)
        nothing, n = np.zeros(len(y)), len(y)
        arrays = Arrays(
            kernel,
            np.tile(np.arange(n), 2),
            np.concatenate([y - epsilon, y + epsilon]),
            np.concatenate([nothing, -most]),
            np.concatenate([most, nothing]),
        )
        beta, free, _ = active_set(arrays, regressor_start(kernel, y, most, epsilon))
        if not free.any():
            return None
        factor = arrays.factor(free)
        found = arrays.on(free, beta, factor)
        beta = beta.copy()
        beta[free] = found[:-1]
        return cls(
            *(among, across, kernel, seen),
            arrays.rows[free],
            np.where(np.flatnonzero(free) < n, -1.0, 1.0),
            arrays.each(beta),
            arrays.each(np.where(free, 0.0, beta)),
            float(found[-1]),
            factor,
            gamma,
        )

    def predicted(self) -> np.ndarray:
        """``(m,)``."""
        found: np.ndarray = self.seen @ self.each + self.constant
        return found

    def pulled(self, slope: np.ndarray) -> tuple[float, float, float]:
        """Slopes by the logarithm of ``C``, by ``epsilon`` and by ``gamma``."""
        rows = self.rows
        right = self.seen.T @ slope
        adjoint = self.factor.solve(np.append(right[rows], slope.sum()))
        v, last = adjoint[:-1], float(adjoint[-1])
        spread = np.bincount(rows, v, minlength=len(self.each))
        by_scale = float((right - self.kernel @ spread - last) @ self.bound)
        by_epsilon, by_gamma = float(v @ self.signs), 0.0
        if self.gamma is not None:
            some = np.flatnonzero(self.each)
            a, at = self.each[some], np.ix_(rows, some)
            bent = (self.across * self.seen)[:, some] @ a
            by_gamma = float(slope @ bent - v @ ((self.among[at] * self.kernel[at]) @ a))
        return by_scale, by_epsilon, by_gamma
