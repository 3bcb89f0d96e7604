"""Logistic regression of two classes with weights of features, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit  # type: ignore[import-untyped]

from ._newton import MAX_STEPS
from ._plain import SCALES, Factor


@dataclass(frozen=True)
class TwoClasses:
    """``sum of s_i log(1 + exp(-t_i z_i)) + sum of r_j theta_j^2 / 2`` with ``z = x W theta``, ``t = +-1``.

    Attributes:
        x: ``(n, p)``, with a last column of ones where there is an intercept.
        x_test: ``(m, p)``, as ``x``.
        positive: ``(n,)``, 1 for the second class, else 0.
        shares: ``s``, ``(n,)``, of sum 1.
        penalized: ``(p,)``, ``r`` times ``C``.
        c: ``C``.
        w: Weights of features, ``(p,)``, with a last 1 where there is an intercept.
    """

    x: np.ndarray
    x_test: np.ndarray
    positive: np.ndarray
    shares: np.ndarray
    penalized: np.ndarray
    c: float = 1.0
    w: np.ndarray | float = 1.0

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        x_test: np.ndarray,
        positive: np.ndarray,
        weights: np.ndarray,
        intercept: bool,
    ) -> TwoClasses:
        """Of ``(n, p)``, ``(m, p)``, ``(n,)`` and ``(n,)``."""
        penalized = np.full(x.shape[1] + intercept, 1 / weights.sum())
        if intercept:
            x, x_test = (np.hstack([part, np.ones((len(part), 1))]) for part in (x, x_test))
            penalized[-1] = 0.0
        return cls(x, x_test, positive, weights / weights.sum(), penalized)

    def at(self, c: float, scales: np.ndarray | None) -> TwoClasses:
        """The same at hyperparameters."""
        w: np.ndarray | float = 1.0
        if scales is not None:
            w = np.ones(self.x.shape[1])
            w[: len(scales)] = scales
        return replace(self, c=c, w=w)

    def optimum(self, starts: Sequence[np.ndarray], rough: bool) -> Optimum | None:
        """By Newton's method from the best of ``starts``, and from zero where that fails; ``None`` where both do."""
        found = None
        values = [self._value(s, self.x @ (self.w * s)) for s in starts]
        finite = [v for v in values if math.isfinite(v)]
        if finite:
            # Far off, a warm start has probabilities that are rounded to 0 and 1, and zero is nearer.
            found = self._from(starts[values.index(min(finite))], rough)
        return found or self._from(np.zeros(self.x.shape[1]), rough)

    def _value(self, theta: np.ndarray, z: np.ndarray) -> float:
        loss = np.logaddexp(0.0, z) - self.positive * z
        return float(self.shares @ loss + 0.5 * (self.penalized / self.c) @ theta**2)

    def _from(self, theta: np.ndarray, rough: bool) -> Optimum | None:
        close = 1e-6 if rough else 1e-8  # so close that errors are squared at each step
        x, w, penalty, num_last = self.x, self.w, self.penalized / self.c, 0
        z = x @ (w * theta)
        value = self._value(theta, z)
        for _ in range(MAX_STEPS):
            p = expit(z)
            gradient = w * (x.T @ (self.shares * (p - self.positive))) + penalty * theta
            factor, failed = Factor.of(self._hessian(p, penalty))
            if failed:
                return None
            step = factor.solve(gradient)
            decrease, length = float(gradient @ step), 1.0
            if decrease <= close * value:
                num_last += 1
                theta = theta - step
                if rough or num_last == 2:
                    return Optimum(self, theta, factor)
                z = x @ (w * theta)
                continue
            while True:
                moved = theta - length * step
                z = x @ (w * moved)
                new = self._value(moved, z)
                if new <= value - 1e-4 * length * decrease or length < 1e-8:
                    break
                length /= 2
            theta, value = moved, new
        return None

    def _hessian(self, p: np.ndarray, penalty: np.ndarray) -> np.ndarray:
        curvature = self.shares * p * (1 - p)
        found: np.ndarray = self.x.T @ (curvature[:, None] * self.x)
        if isinstance(self.w, np.ndarray):
            found *= self.w
            found *= self.w[:, None]
        found.flat[:: len(found) + 1] += penalty
        return found


@dataclass(frozen=True)
class Optimum:
    """Where it is, and the slopes of what it predicts.

    Attributes:
        problem: Its own.
        theta: ``(p,)``.
        factor: Of the Hessian; of a point whose distance is the root of the rounding of ``theta``.
    """

    problem: TwoClasses
    theta: np.ndarray
    factor: Factor

    def log_probabilities(self) -> np.ndarray:
        """Of both classes for the test samples, ``(m, 2)``."""
        z = self.problem.x_test @ (self.problem.w * self.theta)
        return np.stack([-np.logaddexp(0.0, z), -np.logaddexp(0.0, -z)], 1)

    def pulled(self, slope: np.ndarray) -> dict[str, Any]:
        """From the slope of a loss by the log probabilities to those by ``C`` and the weights.

        The gradient is zero at the optimum, whatever the hyperparameters: ``d theta = -H^-1 d gradient``.
        """
        problem, theta, w = self.problem, self.theta, self.problem.w
        p = expit(problem.x_test @ (w * theta))
        direct = problem.x_test.T @ (slope[:, 1] * (1 - p) - slope[:, 0] * p)
        v = self.factor.solve(w * direct)
        by_c = float((problem.penalized * v) @ theta) / problem.c**2
        if not isinstance(w, np.ndarray):
            return {"C": by_c}
        p = expit(problem.x @ (w * theta))
        bent = problem.x.T @ (problem.shares * p * (1 - p) * (problem.x @ (w * v)))
        error = problem.x.T @ (problem.shares * (p - problem.positive))
        by_w = theta * (direct - bent) - v * error
        return {"C": by_c, SCALES: by_w[problem.penalized > 0]}
